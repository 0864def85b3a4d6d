//! The program that runs inside sandboxes, carried by this one, and the hidden
//! subcommands that start it there.

/// How the `oci` provider starts this binary again; not for people.
pub(crate) const SPAWNER_COMMAND: &str = "sandbox-spawner";

/// How the `proot` provider starts this binary again; not for people.
pub(crate) const LAUNCHER_COMMAND: &str = "proot-launcher";

/// Becomes one sandbox's PRoot.
pub(crate) fn launcher() -> ! {
    stacyvm_providers::proot::launcher_main()
}

/// Forks sandboxes for the server on whose socket it was started.
pub(crate) fn spawner() -> ! {
    stacyvm_providers::oci::spawner_main(stacyvm_agent_embed::AGENT)
}
