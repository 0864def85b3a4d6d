//! Which runtime really made the sandbox: from inside, and from whoever made
//! it. A name in a configuration proves nothing.

use stacyvm_client::SandboxClient;

use super::{Looked, Making, Seen, daemon, make, output, same};
use crate::Target;
use crate::host::Daemon;
use crate::run::Run;
use crate::server::Subject;

/// Probes by Python: calls that workloads use and that kernels in user space
/// may lack. Each says whether it worked, and why not.
const PROBES: &str = include_str!("probes.py");

/// Rounds of writing on one side and reading on the other.
const ROUNDS: usize = 10;

pub(crate) async fn look(run: &mut Run<'_>, subject: &Subject) {
    let rows = ["OC-R15", "DK-R15", "GV-R2", "GV-R3", "GV-R4", "KT-R2", "QM-R3"];
    if !rows.iter().any(|id| run.has(id)) {
        return;
    }
    let (client, target) = (subject.client(), run.target);
    let (mark, image) = (run.mark.clone(), run.options.image.clone());
    let wanted = run.options.settings.runtime_for(target);
    let Ok(sandbox) = make(&client, Making::of(target, &image, &mark)).await else {
        let see = format!("see {}", run.own("R2"));
        return run.close(&rows.map(str::to_owned), "not reached: no sandbox could be made", &see);
    };
    run.look("OC-R15", container_of_ours(&sandbox)).await;
    if let Some(daemon) = daemon(run) {
        run.look("DK-R15", made_with(&daemon, &sandbox, &wanted)).await;
        run.look("GV-R2", gvisor(&daemon, &sandbox, &wanted)).await;
    }
    run.look("GV-R3", system_calls(&sandbox)).await;
    run.look("GV-R4", both_sides(&sandbox)).await;
    run.look("KT-R2", kernel_of_its_own(&sandbox)).await;
    run.look("QM-R3", kernel_of_its_own(&sandbox)).await;
    let _ = sandbox.destroy().await;
}

/// What our own runtime promises, as the kernel shows it to the guest.
async fn container_of_ours(sandbox: &SandboxClient) -> Looked {
    let map = output(sandbox, "cat /proc/self/uid_map").await?;
    let status = output(sandbox, "cat /proc/self/status").await?;
    let value = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.map(|value| value.trim().to_owned()).unwrap_or_default()
    };
    let mut first = map.split_whitespace();
    let (inside, outside) = (first.next().unwrap_or_default(), first.next().unwrap_or_default());
    if map.lines().count() == 0 || (inside == "0" && outside == "0") {
        return Err(format!("root inside is root of the host: uid_map says {map:?}").into());
    }
    same("Seccomp (2 is a filter)", &"2".to_owned(), &value("Seccomp"))?;
    same("NoNewPrivs", &"1".to_owned(), &value("NoNewPrivs"))?;
    let host = rustix::system::uname().release().to_string_lossy().into_owned();
    let kernel = output(sandbox, "uname -r").await?;
    same("the kernel, which is the host's", &host, &kernel.trim().to_owned())?;
    Ok(Seen::pass("a user namespace, a system call filter and no new privileges, on the host's kernel")
        .with(format!("uid_map: {}", map.trim()))
        .with(format!("CapBnd: {}", value("CapBnd"))))
}

/// The daemon's own word for it.
async fn runtime_of(daemon: &Daemon, sandbox: &SandboxClient) -> Result<String, super::Trouble> {
    let containers = daemon.containers_of(sandbox.id().as_str()).await?;
    let [container] = &containers[..] else {
        return Err(format!("the daemon has {} containers of {}", containers.len(), sandbox.id()).into());
    };
    Ok(daemon.runtime_of(&container.id).await?)
}

async fn made_with(daemon: &Daemon, sandbox: &SandboxClient, wanted: &str) -> Looked {
    let runtime = runtime_of(daemon, sandbox).await?;
    if runtime == wanted {
        return Ok(Seen::pass(format!("HostConfig.Runtime is {runtime}")));
    }
    let fix = format!("set providers.docker.runtime to {wanted} on the server");
    Ok(Seen::fail(format!("HostConfig.Runtime is {runtime}, not {wanted}"), fix))
}

async fn gvisor(daemon: &Daemon, sandbox: &SandboxClient, wanted: &str) -> Looked {
    let runtime = runtime_of(daemon, sandbox).await?;
    let inside = output(sandbox, "dmesg 2>/dev/null; cat /proc/version").await?;
    Ok(judge_gvisor(&runtime, wanted, &inside))
}

/// Both sides have to say so: the daemon what it used, the kernel what it is.
fn judge_gvisor(runtime: &str, wanted: &str, inside: &str) -> Seen {
    let is_gvisor = inside.to_lowercase().contains("gvisor");
    let kernel = if is_gvisor { "gVisor" } else { "not gVisor" };
    let message = format!("the daemon used {runtime}, and the kernel inside is {kernel}");
    let seen = if runtime == wanted && is_gvisor {
        Seen::pass(message)
    } else {
        Seen::fail(message, "set providers.docker.runtime to runsc, and see that the daemon has it registered")
    };
    seen.with(crate::host::tail(inside))
}

async fn kernel_of_its_own(sandbox: &SandboxClient) -> Looked {
    let host = rustix::system::uname();
    let host = format!("{} {}", host.release().to_string_lossy(), host.version().to_string_lossy());
    let guest = output(sandbox, "echo $(uname -r) $(uname -v)").await?;
    Ok(judge_kernel(guest.trim(), &host))
}

fn judge_kernel(guest: &str, host: &str) -> Seen {
    if guest.is_empty() || guest == host {
        return Seen::fail(
            format!("the kernel inside is the host's, {host}: this is no virtual machine"),
            "see which runtime the server really uses: providers.docker.runtime, and what the daemon registered",
        );
    }
    Seen::pass(format!("{guest} inside, {host} outside"))
}

async fn system_calls(sandbox: &SandboxClient) -> Looked {
    let python = sandbox.exec(&super::shell("command -v python3")).await?;
    if python.exit_code != 0 {
        return Ok(Seen::unavailable(
            "not available: the image has no python3 to make the calls with",
            "certify with --image python:3.12-alpine, or another image that has python3",
        ));
    }
    let request = stacyvm_api::ExecRequest { stdin: Some(PROBES.to_owned()), ..super::shell("python3 -") };
    let result = sandbox.exec(&request).await?;
    if result.exit_code != 0 {
        return Err(format!("the probes ended with {}: {}", result.exit_code, result.stderr.trim()).into());
    }
    let lines: Vec<&str> = result.stdout.lines().collect();
    let supported = lines.iter().filter(|line| line.ends_with(": supported")).count();
    let mut seen = Seen::pass(format!("{supported} of {} probes are supported; the rest is recorded", lines.len()));
    seen.evidence = lines.into_iter().map(str::to_owned).collect();
    Ok(seen)
}

/// What one side writes the other must read at once (gVisor caches files).
async fn both_sides(sandbox: &SandboxClient) -> Looked {
    const PATH: &str = "/workspace/stacyvm-certify-sides";
    for round in 0..ROUNDS {
        let text = format!("by the API, {round}\n");
        let request = stacyvm_api::WriteRequest {
            path: PATH.to_owned(),
            content: text.clone(),
            ..stacyvm_api::WriteRequest::default()
        };
        sandbox.write_file(&request).await?;
        same("what a command reads", &text, &output(sandbox, &format!("cat {PATH}")).await?)?;
        output(sandbox, &format!("echo by a command, {round} > {PATH}")).await?;
        let read = sandbox.read_file(PATH).await?;
        same("what the API reads", &format!("by a command, {round}\n").into_bytes(), &read)?;
    }
    Ok(Seen::pass(format!("{ROUNDS} rounds of writing on one side and reading on the other")))
}

impl Target {
    /// Its sandboxes have a kernel that is not the host's.
    #[cfg(test)]
    fn has_own_kernel(self) -> bool {
        crate::rows_of(self).iter().any(|row| matches!(row.id, "GV-R2" | "KT-R2" | "QM-R3" | "FC-R3"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Status;

    #[test]
    fn nothing_but_gvisor_is_certified_as_gvisor() {
        const RUNC: &str = "Linux version 6.1.0 (debian-kernel@lists.debian.org)";
        const GVISOR: &str = "[   0.000000] Starting gVisor...\nLinux version 4.4.0";
        assert_eq!(judge_gvisor("runsc", "runsc", GVISOR).status, Status::Pass);
        assert_eq!(judge_gvisor("runc", "runsc", RUNC).status, Status::Fail);
        assert_eq!(judge_gvisor("runsc", "runsc", RUNC).status, Status::Fail, "a name alone");
        assert_eq!(judge_gvisor("runc", "runsc", GVISOR).status, Status::Fail, "a guest's word alone");
    }

    #[test]
    fn the_hosts_kernel_is_no_virtual_machine() {
        assert_eq!(judge_kernel("6.1.0 #1 SMP", "6.1.0 #1 SMP").status, Status::Fail);
        assert_eq!(judge_kernel("", "6.1.0 #1 SMP").status, Status::Fail);
        assert_eq!(judge_kernel("6.12.1 #2 SMP", "6.1.0 #1 SMP").status, Status::Pass);
    }

    #[test]
    fn whatever_claims_a_kernel_of_its_own_has_to_show_it() {
        for target in [Target::Gvisor, Target::Kata, Target::Qemu, Target::Firecracker] {
            assert!(target.has_own_kernel(), "{target}");
        }
        assert!(!Target::Docker.has_own_kernel() && !Target::Oci.has_own_kernel());
    }
}
