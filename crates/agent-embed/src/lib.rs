//! Builds the agent as a static program and carries its bytes.
//!
//! Users handle one file: the agent travels inside `stacyvm`. A launcher writes
//! it once to a sealed, read-only place and starts every sandbox from there, so
//! that all of them share its pages.

/// The statically linked `stacyvm-agent` for the machine this was built for.
pub static AGENT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/stacyvm-agent"));

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::process::Command;

    use super::AGENT;

    #[test]
    fn carries_a_static_program_that_runs() {
        assert_eq!(&AGENT[..4], b"\x7fELF");
        // A program that needs a loader has a PT_INTERP segment naming it.
        let needs_loader = AGENT.windows(8).take(4096).any(|window| window == b"/lib64/l");
        assert!(!needs_loader, "the agent must not need a dynamic loader");

        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("stacyvm-agent");
        std::fs::write(&path, AGENT).expect("writable");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("our own file");
        let output = Command::new(&path).arg("version").env_clear().output().expect("it starts");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(text.starts_with("stacyvm-agent "), "{text}");
    }
}
