//! The spawner as a program of its own, for tests.

fn main() {
    stacyvm_providers::oci::spawner_main(stacyvm_agent_embed::AGENT)
}
