//! What a configuration means, asked of the program itself.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use serde_json::Value;

use crate::support::{Ran, Site, in_repository, run};

const KEY: &str = "0123456789abcdef0123456789abcdef";

fn write(site: &Site, name: &str, text: &str) {
    let path = site.home().join(name);
    std::fs::write(&path, text).expect("a file");
    std::fs::set_permissions(&path, Permissions::from_mode(0o600)).expect("its mode");
}

async fn with(site: &Site, change: impl FnOnce(&mut Command)) -> Ran {
    let mut command = site.program();
    change(&mut command);
    run(command.into(), b"").await
}

#[tokio::test]
async fn showing_names_the_place_of_every_value_and_hides_secrets() {
    let site = Site::new();
    write(&site, "key", KEY);
    write(&site, "stacyvm.yaml", "server:\n  port: 1\nauth:\n  api_key: in-the-file\n  admin_api_key_file: key\n");
    let shown = with(&site, |show| {
        show.args(["config", "show", "--json", "--log-level", "debug"]).env("STACYVM_DEFAULTS_TTL", "7m");
    });
    let shown: Value = shown.await.json();
    let text = shown.to_string();
    assert!(!text.contains("in-the-file") && !text.contains(KEY), "{text}");
    let settings = shown["settings"].as_array().expect("a list");
    let setting = |key: &str| settings.iter().find(|it| it["key"] == key).unwrap_or_else(|| panic!("{key}: {text}"));
    let expected = [
        ("server.port", "1", "file", "stacyvm.yaml:2"),
        ("defaults.ttl", "7m", "environment", "STACYVM_DEFAULTS_TTL"),
        ("logging.level", "debug", "option", "--log-level"),
    ];
    for (key, value, source, place) in expected {
        let shown = setting(key);
        assert_eq!(
            (&shown["value"], &shown["source"], &shown["place"]),
            (&value.into(), &source.into(), &place.into())
        );
    }
    assert_eq!(
        (&setting("server.host")["value"], &setting("server.host")["source"]),
        (&"127.0.0.1".into(), &"default".into())
    );
    for (key, source) in [("auth.api_key", "file"), ("auth.admin_api_key", "key_file")] {
        let shown = setting(key);
        assert_eq!((&shown["value"], &shown["hidden"], &shown["source"]), (&Value::Null, &true.into(), &source.into()));
    }
    let page = site.run(&["config", "show", "--changed"]).await.ok();
    assert!(page.stdout().lines().any(|line| line.starts_with("server.port ") && line.ends_with("stacyvm.yaml:2")));
    assert!(!page.stdout().contains("in-the-file") && !page.stdout().contains("defaults.max_ttl"), "{page}");
}

#[tokio::test]
async fn linting_says_key_line_and_fix_and_fails_in_production() {
    let site = Site::new();
    write(&site, "stacyvm.yaml", "auth:\n  api_key: change-me\nlogging:\n  format: pretty\n");
    let lenient = site.run(&["config", "lint"]).await.ok();
    assert!(lenient.stdout().contains("[WARN] logging.format: "), "{lenient}");
    let strict = site.run(&["config", "lint", "--production"]).await;
    assert_eq!(strict.status(), Some(1), "{strict}");
    let failure = strict.stdout().lines().position(|line| line.starts_with("[FAIL] logging.format: ")).expect("a line");
    let lines: Vec<&str> = strict.stdout().lines().skip(failure).take(2).collect();
    assert!(lines[0].ends_with("(stacyvm.yaml:4)"), "{lines:?}");
    assert_eq!(lines[1], "    fix: set logging.format to json");
    assert!(!strict.stdout().contains("change-me"), "{strict}");

    write(&site, "other.yaml", "server:\n  prot: 1\n");
    let wrong = site.run(&["config", "lint", "--file", "other.yaml", "--json"]).await;
    assert_eq!(wrong.status(), Some(1), "{wrong}");
    let wrong: Value = serde_json::from_str(wrong.stdout()).expect("JSON");
    let check = &wrong["checks"][0];
    assert_eq!((&wrong["status"], &check["place"]), (&"FAIL".into(), &"other.yaml:2".into()));
    assert_eq!(check["fix"], "did you mean `server.port`?");
}

/// What `deploy/` tells people to use has no failures, as they would use it.
#[tokio::test]
async fn the_deployed_configuration_passes_for_production() {
    let site = Site::new();
    let text = std::fs::read_to_string(in_repository("deploy/production.yaml")).expect("the file");
    let home = site.home().display();
    write(&site, "api.key", KEY);
    write(&site, "admin.key", "fedcba9876543210fedcba9876543210");
    assert!(text.contains("/etc/stacyvm/api.key") && text.contains("/etc/stacyvm/admin.key"), "{text}");
    write(&site, "production.yaml", &text.replace("/etc/stacyvm/", &format!("{home}/")));
    let judged = with(&site, |lint| {
        // The file is judged, not the surroundings of this test.
        lint.args(["config", "lint", "--production", "--file", "production.yaml"]).env_remove("STACYVM_DATA_DIR");
        lint.env_remove("STACYVM_DEFAULTS_NETWORK");
    });
    let judged = judged.await.ok();
    assert!(judged.stdout().contains(" 0 failed"), "{judged}");
    // It is written for a proxy, which it has to know of.
    for key in ["server.trusted_proxies", "server.preview_url"] {
        assert!(judged.stdout().contains(&format!("[PASS] {key}: ")), "{judged}");
    }

    // It is no accident: one key less, and it fails.
    let weaker = text.replace("/etc/stacyvm/", &format!("{home}/")).replace("max_ttl: ", "max_ttl: 0s # ");
    write(&site, "production.yaml", &weaker);
    let judged = with(&site, |lint| {
        lint.args(["config", "lint", "--production", "--file", "production.yaml"]).env_remove("STACYVM_DATA_DIR");
    });
    assert_eq!(judged.await.status(), Some(1));
}

#[tokio::test]
async fn the_schema_for_editors_is_the_checked_in_one() {
    let site = Site::new();
    let printed = site.run(&["config", "schema"]).await.ok();
    let checked_in = std::fs::read_to_string(in_repository("docs/configuration.schema.json")).expect("the schema");
    assert_eq!(printed.stdout(), checked_in);
}
