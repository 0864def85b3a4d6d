//! The examples of `docs/api.md` run as they are.

use std::path::Path;

use tokio::process::Command;

use crate::support::{Fixture, within};

#[tokio::test]
async fn the_examples_of_the_api_page_work() {
    let fixture = Fixture::open().await;
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/api.md");
    let text = std::fs::read_to_string(page).unwrap();
    let examples: Vec<&str> =
        text.split("```sh\n").skip(1).map(|rest| rest.split("```").next().unwrap_or_default()).collect();
    assert!(examples.len() > 5, "the page has examples");
    let script = format!("set -eu\nset -o pipefail\nset -x\n{}", examples.concat());
    let mut command = Command::new("bash");
    command.args(["-c", &script]).env("STACYVM", format!("http://{}", fixture.address)).kill_on_drop(true);
    let output = within(command.output()).await.expect("bash and curl are needed for the examples of docs/api.md");
    assert!(output.status.success(), "an example fails:\n{}", String::from_utf8_lossy(&output.stderr));
    let said = String::from_utf8_lossy(&output.stdout);
    for expected in [
        "\"stdout\":\"hello\\n\"",
        "{\"stream\":\"stdout\",\"data\":\"one\\n\"}",
        "\"exit_code\":3",
        "typed",
        "{\"status\":\"extracted\"}",
        "{\"status\":\"destroyed\"}",
    ] {
        assert!(said.contains(expected), "{expected} is not in:\n{said}");
    }
}
