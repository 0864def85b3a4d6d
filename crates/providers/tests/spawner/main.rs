//! The spawner, and the launcher of PRoot, as a program of its own, for tests.

fn main() {
    // In PRoot's place, for what the kernel holds when PRoot does not.
    if std::env::args_os().next().is_some_and(|name| name == "proot") {
        eprintln!("{}", as_a_proot_that_was_overcome());
        std::process::exit(1);
    }
    if std::env::args_os().nth(1).is_some_and(|name| name == "--version") {
        println!("0.0 (stands in for PRoot in tests)");
        return;
    }
    if std::env::args_os().nth(1).is_some_and(|name| name == "proot-launcher") {
        stacyvm_providers::proot::launcher_main();
    }
    stacyvm_providers::oci::spawner_main(stacyvm_agent_embed::AGENT)
}

/// Tries what code that has got past PRoot would, and says how it went.
fn as_a_proot_that_was_overcome() -> String {
    let root = std::env::args().skip_while(|argument| argument != "-r").nth(1).expect("a root");
    let sandboxes = std::path::Path::new(&root).ancestors().nth(2).expect("a directory of sandboxes");
    let precious = sandboxes.join("precious");
    let kind = |result: std::io::Result<()>| result.map_err(|error| error.kind());
    let read = std::fs::read_to_string(&precious).map(drop);
    let inside = std::path::Path::new(&root).join("written");
    format!(
        "read {:?}, write {:?}, inside {:?}",
        kind(read),
        kind(std::fs::write(&precious, "overwritten")),
        kind(std::fs::write(inside, "")),
    )
}
