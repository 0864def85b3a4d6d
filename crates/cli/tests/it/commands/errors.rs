//! What is said when something is wrong: to people, and to programs.

use serde_json::Value;

use super::Fixture;
use crate::support::{Ran, Server, Site, run};

/// Nobody listens there.
const NOBODY: &str = "http://127.0.0.1:1";

/// The error that a failed program told, as the only line of standard error.
fn told(ran: &Ran, status: i32) -> Value {
    assert_eq!((ran.status(), ran.stderr().lines().count()), (Some(status), 1), "{ran}");
    let line: Value = serde_json::from_str(ran.stderr()).unwrap_or_else(|error| panic!("{error}: {ran}"));
    let error = &line["error"];
    assert!(error["message"].is_string() && error["hint"].is_string(), "{ran}");
    error.clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_are_json_where_results_are() {
    let server = Server::shared().await;
    let unknown = told(&server.run(&["--json", "kill", "sb-00000000000000000000"]).await, 1);
    assert_eq!(unknown["code"], "NOT_FOUND", "{unknown}");
    let refused = told(&server.run(&["spawn", "--json", "--provider", "docker"]).await, 1);
    assert_eq!(refused["code"], "NOT_FOUND", "{refused}");
    assert!(refused["hint"].as_str().expect("text").contains("providers.docker.enabled"), "{refused}");
    let absent = told(&server.run(&["list", "--json", "--server", NOBODY]).await, 1);
    assert_eq!(
        (&absent["code"], &absent["message"]),
        (&"NO_SERVER".into(), &format!("no server answers at {NOBODY} (connection refused)").into())
    );
    let not_run = told(&server.run(&["run", "--json", "--server", NOBODY, "--", "true"]).await, 125);
    assert_eq!(not_run["code"], "NO_SERVER", "{not_run}");
    let missing = told(&server.site.run(&["--json", "db", "check", "--database", "/nowhere.db"]).await, 1);
    assert_eq!(missing["code"], "FAILED", "{missing}");

    let slip = told(&server.run(&["spawn", "--json", "--memroy", "5"]).await, 2);
    assert_eq!((&slip["code"], &slip["message"]), (&"USAGE".into(), &"unexpected argument '--memroy' found".into()));
    let words = told(&server.run(&["--json", "exec", "sb-00000000000000000000"]).await, 2);
    assert_eq!(words["code"], "USAGE", "{words}");
    // Behind the dashes it is the command's own.
    let ran = server.run(&["run", "--no-such-option", "--", "echo", "--json"]).await;
    assert!(ran.status() == Some(2) && ran.stderr().starts_with("error: "), "{ran}");
}

#[tokio::test]
async fn a_server_that_is_not_there_takes_two_lines() {
    let site = Site::new();
    for command in [&["list"][..], &["kill", "--all"], &["template", "list"], &["key", "list"]] {
        let nobody = site.run(&[command, &["--server", NOBODY]].concat()).await.failed(1);
        let expected = format!(
            "error: no server answers at {NOBODY} (connection refused)\n\
             hint: start one with `stacyvm serve`, or name another with --server\n"
        );
        assert_eq!(nobody.stderr(), expected, "{command:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_http_needs_no_ca_certificates() {
    let server = Server::shared().await;
    let bare = async |arguments: &[&str]| {
        let mut command = server.program(arguments);
        command.envs([("SSL_CERT_FILE", "/nonexistent"), ("SSL_CERT_DIR", "/nonexistent")]);
        run(command, b"").await
    };
    bare(&["list"]).await.ok();
    let secure = bare(&["list", "--server", "https://127.0.0.1:1"]).await.failed(1);
    assert!(secure.stderr().starts_with("error: no secure connection can be made from this machine\n"), "{secure}");
    assert!(secure.stderr().contains("hint: install this machine's CA certificates"), "{secure}");
}

#[tokio::test]
async fn help_and_usage_are_the_same_whatever_is_set() {
    let site = Site::new();
    let said = async |arguments: &[&str], variables: &[(&str, &str)]| {
        let mut command = site.program();
        command.args(arguments).envs(variables.iter().copied());
        let ran = run(command.into(), b"").await;
        (ran.stdout().to_owned(), ran.stderr().to_owned())
    };
    let set = [
        ("STACYVM_URL", "http://vm.example.com"),
        ("STACYVM_API_KEY", "e2b_0123456789abcdef0123456789abcdef01234567"),
        ("STACYVM_OWNER", "alice"),
        ("STACYVM_SMOKE_URL", "http://vm.example.com"),
    ];
    for arguments in [&["--help"][..], &["spawn", "--help"], &["smoke", "--help"], &["inspect"], &["spawn", "--nope"]] {
        let plain = said(arguments, &[]).await;
        assert_eq!(said(arguments, &set).await, plain, "{arguments:?}");
        assert!(!plain.0.is_empty() || plain.1.contains("Usage: "), "{plain:?}");
    }
    let (help, _) = said(&["spawn", "--help"], &[]).await;
    for named in ["[env: STACYVM_URL]", "[env: STACYVM_API_KEY]", "[env: STACYVM_OWNER]", "16 MiB at least"] {
        assert!(help.contains(named), "{named} is not in {help}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_without_dashes_is_shown_with_them() {
    let fixture = Fixture::start().await;
    let refused = fixture.server.run(&["exec", &fixture.id, "ls", "-la"]).await;
    assert_eq!(refused.status(), Some(2), "{refused}");
    refused.says(&format!("tip: put -- before the command: stacyvm exec {} -- ls -la", fixture.id));
    let refused = fixture.server.run(&["run", "host", "python3", "-c", "print(1)"]).await;
    assert_eq!(refused.status(), Some(2), "{refused}");
    refused
        .says("put -- before the command: stacyvm run -- host python3 -c 'print(1)'")
        .says("stacyvm run --image host -- python3 -c 'print(1)'");
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn numbers_out_of_range_are_refused_with_the_range() {
    let server = Server::shared().await;
    for (slip, range) in [
        (&["spawn", "--memory", "1"][..], "16..=16777216"),
        (&["spawn", "--memory", "0"], "16..=16777216"),
        (&["run", "--vcpus", "0", "--", "true"], "0.01 or more"),
        (&["run", "--vcpus", "-1", "--", "true"], "-1"),
        (&["spawn", "--disk", "0"], "0"),
        (&["spawn", "--pids-limit", "15"], "16..=4194304"),
        (&["audit", "--limit", "501"], "1..=500"),
        (&["audit", "--limit", "0"], "1..=500"),
        (&["logs", "-n", "10001", "sb-00000000000000000000"], "1..=10000"),
    ] {
        let refused = server.run(slip).await;
        assert_eq!(refused.status(), Some(2), "{refused}");
        refused.says(range);
    }
    // The least that is taken is enough.
    let least = server.run(&["run", "--memory", "16", "--", "echo", "it runs"]).await.ok();
    assert_eq!(least.stdout(), "it runs\n");
    let python =
        server.run(&["run", "--memory", "16", "--image", "host", "--", "/bin/sh", "-c", "echo $((6 * 7))"]).await.ok();
    assert_eq!(python.stdout(), "42\n");
}

/// The store of the usual directory is only looked at.
#[tokio::test]
async fn the_data_directory_is_named_where_nobody_chose_it() {
    let site = Site::new();
    let check = async |url: Option<&str>, arguments: &[&str]| {
        let mut command = site.program();
        command.env_remove("STACYVM_DATA_DIR").args(["db", "migrate"]).args(arguments);
        command.envs(url.map(|url| ("STACYVM_URL", url)));
        run(command.into(), b"").await.stderr().to_owned()
    };
    let said = check(None, &[]).await;
    assert!(said.starts_with("data directory: /var/lib/stacyvm, which "), "{said}");
    assert!(said.contains("--data-dir") && !said.contains("does not ask"), "{said}");
    let said = check(Some(NOBODY), &[]).await;
    assert!(said.contains(&format!("does not ask the server {NOBODY}")), "{said}");
    let chosen = check(Some(NOBODY), &["--data-dir", site.data_dir().to_str().expect("text")]).await;
    assert!(!chosen.contains("data directory: "), "{chosen}");
}
