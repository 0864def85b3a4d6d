//! What the configured OCI runtime promises, and whether a sandbox keeps it.
//!
//! A daemon runs whatever program stands behind a runtime's name. What isolates
//! a sandbox is therefore told from inside, by the kernel that the agent sees
//! before any code of the image has run.

use stacyvm_envd::GuestKernel;

/// What a runtime's name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Promise {
    /// Containers on the host's kernel: runc, crun, youki.
    HostKernel,
    /// gVisor: a kernel in user space.
    Gvisor,
    /// A virtual machine with a kernel of its own: Kata.
    OwnKernel,
    /// A name that says nothing.
    Nothing,
}

impl Promise {
    /// By the runtime's name, else by its program at the daemon.
    pub(super) fn of(name: &str, program: Option<&str>) -> Self {
        let program = program.map(|path| path.rsplit('/').next().unwrap_or(path));
        [Some(name), program]
            .into_iter()
            .flatten()
            .map(Self::of_word)
            .find(|found| *found != Self::Nothing)
            .unwrap_or(Self::Nothing)
    }

    fn of_word(word: &str) -> Self {
        let word = word.to_ascii_lowercase();
        let has = |part: &str| word.contains(part);
        if has("runsc") || has("gvisor") {
            Self::Gvisor
        } else if has("kata") {
            Self::OwnKernel
        } else if has("runc") || has("crun") || has("youki") {
            Self::HostKernel
        } else {
            Self::Nothing
        }
    }

    /// Says what is wrong with the kernel that a guest sees.
    pub(super) fn check(self, guest: &GuestKernel, host_release: &str) -> Result<(), String> {
        let shares_host = guest.release == host_release && !guest.is_gvisor;
        match self {
            Self::Gvisor if !guest.is_gvisor => {
                Err(format!("gVisor is configured, but the guest runs on Linux {}", guest.release))
            }
            Self::OwnKernel if shares_host => {
                Err(format!("a virtual machine is configured, but the guest runs on the host's Linux {host_release}"))
            }
            Self::OwnKernel if guest.is_gvisor => {
                Err("a virtual machine is configured, but the guest runs on gVisor".to_owned())
            }
            Self::HostKernel if !shares_host => {
                Err(format!("the host's kernel is {host_release}, but the guest runs on {}", shown(guest)))
            }
            Self::Gvisor | Self::OwnKernel | Self::HostKernel | Self::Nothing => Ok(()),
        }
    }
}

fn shown(guest: &GuestKernel) -> String {
    let name = if guest.is_gvisor { "gVisor's" } else { "Linux" };
    format!("{name} {}", guest.release)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_programs_say_what_is_promised() {
        for (name, program, promise) in [
            ("runc", Some("runc"), Promise::HostKernel),
            ("io.containerd.runc.v2", None, Promise::HostKernel),
            ("crun", None, Promise::HostKernel),
            ("runsc", Some("/usr/bin/runsc"), Promise::Gvisor),
            ("gvisor-kvm", None, Promise::Gvisor),
            ("safe", Some("/opt/runsc"), Promise::Gvisor),
            ("kata-runtime", None, Promise::OwnKernel),
            ("io.containerd.kata.v2", None, Promise::OwnKernel),
            ("mine", Some("/opt/other"), Promise::Nothing),
            // The name is what the user relies on.
            ("runsc", Some("/usr/bin/runc"), Promise::Gvisor),
            ("kata", Some("/usr/bin/runc"), Promise::OwnKernel),
        ] {
            assert_eq!(Promise::of(name, program), promise, "{name} {program:?}");
        }
    }

    #[test]
    fn a_guest_is_what_was_promised_or_refused() {
        let kernel = |release: &str, is_gvisor| GuestKernel { release: release.to_owned(), is_gvisor };
        let (host, gvisor, other) = (kernel("6.1", false), kernel("4.4.0", true), kernel("5.19-kata", false));
        for (promise, good, bad) in [
            (Promise::HostKernel, vec![&host], vec![&gvisor, &other]),
            (Promise::Gvisor, vec![&gvisor], vec![&host, &other]),
            (Promise::OwnKernel, vec![&other], vec![&host, &gvisor]),
            (Promise::Nothing, vec![&host, &gvisor, &other], vec![]),
        ] {
            assert!(good.into_iter().all(|guest| promise.check(guest, "6.1").is_ok()), "{promise:?}");
            assert!(bad.into_iter().all(|guest| promise.check(guest, "6.1").is_err()), "{promise:?}");
        }
    }
}
