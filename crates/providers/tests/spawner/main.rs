//! The spawner, and the launcher of PRoot, as a program of its own, for tests.

fn main() {
    if std::env::args_os().nth(1).is_some_and(|name| name == "proot-launcher") {
        stacyvm_providers::proot::launcher_main();
    }
    stacyvm_providers::oci::spawner_main(stacyvm_agent_embed::AGENT)
}
