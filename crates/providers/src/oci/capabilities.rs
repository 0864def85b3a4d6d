//! What root inside a sandbox may do to the sandbox itself.
//!
//! Docker's default set without `CAP_NET_RAW`. All of them count only inside
//! the sandbox's own user namespace; none reaches the host.

use rustix::thread::{CapabilitySet, CapabilitySets};

/// Docker's default capabilities (moby `oci/caps/defaults.go`), without
/// `NET_RAW`: raw sockets let a guest forge packets.
pub(super) const SANDBOX: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::SETPCAP)
    .union(CapabilitySet::NET_BIND_SERVICE)
    .union(CapabilitySet::SYS_CHROOT)
    .union(CapabilitySet::KILL)
    .union(CapabilitySet::AUDIT_WRITE);

/// Gives up everything beyond [`SANDBOX`], for good.
pub(super) fn drop_to_sandbox() -> rustix::io::Result<()> {
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        if SANDBOX.contains(capability) {
            continue;
        }
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            // The kernel knows no capability of this number nor above it.
            Err(rustix::io::Errno::INVAL) => break,
            result => result?,
        }
    }
    rustix::thread::clear_ambient_capability_set()?;
    rustix::thread::set_capabilities(
        None,
        CapabilitySets { effective: SANDBOX, permitted: SANDBOX, inheritable: CapabilitySet::empty() },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_set_is_dockers_without_raw_sockets() {
        // 0xa80425fb is what `CapBnd` shows in a container of Docker's.
        assert_eq!(SANDBOX.bits(), 0xa804_25fb & !CapabilitySet::NET_RAW.bits());
    }
}
