//! The program that runs inside sandboxes, carried by this one, and the hidden
//! subcommand that starts it there.

/// How the `oci` provider starts this binary again; not for people.
pub(crate) const SPAWNER_COMMAND: &str = "sandbox-spawner";

/// Forks sandboxes for the server on whose socket it was started.
pub(crate) fn spawner() -> ! {
    stacyvm_providers::oci::spawner_main(stacyvm_agent_embed::AGENT)
}
