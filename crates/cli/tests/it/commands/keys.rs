//! API keys and the audit log: the first key without a server, the others on
//! one, and what is left of them.

use std::fs;

use rustix::process::Signal;
use serde_json::Value;
use stacyvm_api::{ApiKey, AuditRecord};

use crate::support::{Ran, Server, Site, run};

impl Server {
    /// `stacyvm` with these arguments, and this key.
    async fn run_as(&self, key: &str, arguments: &[&str]) -> Ran {
        let mut command = self.program(arguments);
        command.env("STACYVM_API_KEY", key);
        run(command, b"").await
    }
}

/// The key that was printed, and nothing beside it.
fn key_of(made: &Ran) -> String {
    let key = made.stdout().trim_end();
    let digits = key.strip_prefix("e2b_").unwrap_or_else(|| panic!("{made}"));
    assert!(digits.len() == 40 && digits.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f')), "{made}");
    key.to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_made_without_a_server_used_on_one_and_revoked() {
    let site = Site::new();
    let data_dir = site.data_dir();
    let data_dir = data_dir.to_str().expect("a path");
    site.run(&["key", "create", "ci", "--data-dir", data_dir]).await.failed(1).says("--scope admin");
    let scopes = ["--scope", "read", "--scope", "api", "--scope", "admin"];
    let made = site.run(&[&["key", "create", "root", "--data-dir", data_dir][..], &scopes].concat()).await.ok();
    assert!(made.stderr().contains("it is shown only now"), "{made}");
    let root = key_of(&made);
    assert!(made.stderr().contains("export STACYVM_API_KEY=") && !made.stderr().contains(&root), "{made}");

    let server = Server::start(&site, &[]).await;
    site.run(&["key", "list", "--data-dir", data_dir]).await.failed(1).says(&format!("process {}", server.pid()));
    server.run(&["list"]).await.failed(1).says("a valid API key is required");
    let ci = key_of(&server.run_as(&root, &["key", "create", "ci", "--ttl", "1h", "--owner", "alice"]).await.ok());
    assert_eq!(server.run_as(&ci, &["list"]).await.ok().stdout(), "no sandboxes\n");
    for admin_only in [&["key", "list"][..], &["audit"], &["key", "create", "more", "--scope", "admin"]] {
        assert_eq!(server.run_as(&ci, admin_only).await.says("admin:*").status(), Some(1));
    }
    // A key of alice makes nothing for bob, and does not pretend to.
    let other = server.run_as(&ci, &["spawn", "--owner", "bob"]).await.failed(1).says("this key acts for alice only");
    assert_eq!(other.stdout(), "");
    let listed = server.run_as(&root, &["key", "list"]).await.ok();
    assert!(listed.stdout().contains("alice") && listed.stdout().contains(&ci[..12]), "{listed}");
    let keys: Vec<ApiKey> = server.run_as(&root, &["key", "ls", "--json"]).await.json();
    let named: Vec<(&str, &str)> = keys.iter().map(|key| (key.name.as_str(), key.created_by.as_str())).collect();
    assert_eq!(named, [("ci", "key:root"), ("root", "command_line")]);

    assert_eq!(server.run_as(&root, &["key", "revoke", "ci"]).await.ok().stdout(), "revoked ci\n");
    server.run_as(&ci, &["list"]).await.failed(1).says("the API key is not valid here");
    server.run_as(&root, &["key", "revoke", &ci]).await.failed(1).says("stacyvm key list");
    server.run_as(&root, &["key", "revoke", "root"]).await.failed(1).says("last key").says("--force");
    server.run_as(&root, &["list"]).await.ok();
    let gone: Vec<ApiKey> = server.run_as(&root, &["key", "list", "--revoked", "--json"]).await.json();
    assert!(gone[0].name == "ci" && gone[0].revoked_at.is_some(), "{gone:?}");

    let refused: Vec<AuditRecord> = server.run_as(&root, &["audit", "--status", "403", "--json"]).await.json();
    let seen: Vec<String> = refused.iter().map(|it| format!("{} {} {}", it.actor, it.method, it.path)).collect();
    let expected =
        ["POST /api/v1/sandboxes", "POST /api/v1/admin/keys", "GET /api/v1/admin/audit", "GET /api/v1/admin/keys"];
    assert_eq!(seen, expected.map(|call| format!("key:ci {call}")));
    assert!(refused.iter().all(|it| it.remote_addr == "127.0.0.1" && it.key_id == Some(keys[0].id.clone())));
    let table = server.run_as(&root, &["audit", "--actor", "key:root", "--method", "DELETE"]).await.ok();
    assert!(table.stdout().contains(&format!("/api/v1/admin/keys/{}", keys[0].id)), "{table}");
    let csv = server.run_as(&root, &["audit", "--status", "401", "--csv"]).await.ok();
    assert!(csv.stdout().starts_with("id,created_at,actor,") && csv.stdout().lines().count() == 3, "{csv}");

    let ended = server.stop(Signal::TERM).await;
    assert!(ended.status.success(), "{ended:?}");
    let said = ended.stdout + &ended.stderr;
    assert!(said.contains("callers need a key") && !said.contains(&root[4..]) && !said.contains(&ci[4..]), "{said}");
    let files = fs::read_dir(site.data_dir()).expect("readable").map(|entry| entry.expect("an entry").path());
    let held: Vec<_> =
        files.filter(|file| file.is_file() && holds(&fs::read(file).expect("readable"), &ci[..12])).collect();
    assert!(!held.is_empty(), "the right files are looked at");
    for file in held {
        assert!(!holds(&fs::read(&file).expect("readable"), &ci[4..]), "{} holds a key", file.display());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_had_keys_does_not_open_again() {
    let site = Site::new();
    let data_dir = site.data_dir();
    let data_dir = data_dir.to_str().expect("a path");
    site.run(&["key", "create", "root", "--scope", "admin", "--data-dir", data_dir]).await.ok();
    site.run(&["key", "revoke", "root", "--data-dir", data_dir]).await.failed(1).says("last key").says("--force");
    let revoked: Value = site.run(&["key", "revoke", "root", "--force", "--json", "--data-dir", data_dir]).await.json();
    assert!(revoked["revoked"].as_str().is_some_and(|id| id.starts_with("key-")), "{revoked}");
    let refused = site.run(&["serve", "--port", "0"]).await.says("no key is valid").says("stacyvm key create");
    assert_eq!(refused.status(), Some(1), "{refused}");
    site.run(&["key", "create", "root", "--scope", "admin", "--data-dir", data_dir]).await.ok();
    let server = Server::start(&site, &[]).await;
    server.run(&["list"]).await.failed(1).says("a valid API key is required");
    assert!(server.stop(Signal::TERM).await.status.success());
}

fn holds(bytes: &[u8], part: &str) -> bool {
    bytes.windows(part.len()).any(|window| window == part.as_bytes())
}
