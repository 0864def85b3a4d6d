//! A bundle for support holds no secrets, whatever is secret and wherever it is
//! kept: a mark is planted in every such place, and must not be found.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use rustix::process::Signal;
use serde_json::Value;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{AssertSqlSafe, ConnectOptions as _, Connection as _};
use stacyvm_api::CreateRequest;

use crate::support::{Server, Site, create, in_repository, run};

/// Not a word of ours in any form: upper, lower, base64 or hexadecimal.
const MARK: &str = "Zq7xWv9K";

/// Every setting that may hold text, with the mark in it; the schema says which.
fn marked_configuration() -> (String, usize) {
    let schema = fs::read_to_string(in_repository("docs/configuration.schema.json")).expect("the schema");
    let schema: Value = serde_json::from_str(&schema).expect("JSON");
    let mut lines = Vec::new();
    let mut planted = 0;
    plant(&schema, 0, &mut lines, &mut planted);
    (lines.join("\n"), planted)
}

/// Keys that have to be as they should be: a server would not start, or the
/// marked database would be another one.
const LEFT_ALONE: [&str; 16] = [
    "data_dir",
    "path",
    "host",
    "level",
    "default",
    "network",
    "image",
    "cgroup_parent",
    "run_dir",
    "api_key_file",
    "admin_api_key_file",
    "eab_hmac_key_file",
    "docker_config",
    "tls_cert_file",
    "tls_key_file",
    "trusted_proxies",
];

fn plant(schema: &Value, depth: usize, lines: &mut Vec<String>, planted: &mut usize) {
    for (name, below) in schema["properties"].as_object().into_iter().flatten() {
        let indent = "  ".repeat(depth);
        if below["properties"].is_object() {
            lines.push(format!("{indent}{name}:"));
            plant(below, depth + 1, lines, planted);
            continue;
        }
        let takes = |kind: &str| below["type"].as_array().is_some_and(|kinds| kinds.iter().any(|it| it == kind));
        // Protections that this version has not are refused, and so are hosts
        // that are none; the mark goes to where it may stand.
        let refused = name.starts_with("oidc") || LEFT_ALONE.contains(&name.as_str()) || below.get("pattern").is_some();
        let value = match () {
            () if refused => continue,
            () if ["cpus", "memory", "tmpfs"].contains(&name.as_str()) => continue,
            () if takes("array") && takes("object") => format!("[{MARK}, other]"),
            () if name == "preview_domain" => format!("{MARK}-p.example"),
            () if name == "preview_url" => format!("https://{MARK}-p.example"),
            () if name == "cors_allowed_origins" => format!("['https://{MARK}.example']"),
            () if takes("array") => format!("['{MARK}.example']"),
            () if takes("object") => format!("{{name: {MARK}}}"),
            () if takes("string") => MARK.to_owned(),
            () => continue,
        };
        lines.push(format!("{indent}{name}: {value}"));
        *planted += 1;
    }
}

/// Puts the mark into every text column of every table that takes any text.
async fn mark_database(path: &Path) -> usize {
    let mut connection =
        SqliteConnectOptions::new().filename(path).foreign_keys(false).connect().await.expect("it opens");
    let columns: Vec<(String, String, String)> = sqlx::query_as(
        "SELECT t.name, c.name, c.type FROM sqlite_master t, pragma_table_info(t.name) c \
         WHERE t.type = 'table' AND t.name NOT LIKE 'sqlite%' AND c.type IN ('TEXT', 'BLOB') \
         AND t.name || '.' || c.name NOT IN ('_sqlx_migrations.checksum', 'sandboxes.state', 'exec_log.status')",
    )
    .fetch_all(&mut connection)
    .await
    .expect("columns");
    let mut marked = 0;
    for (table, column, kind) in columns {
        let statement =
            format!("UPDATE OR IGNORE {table} SET {column} = CAST('{MARK}' || hex(randomblob(8)) AS {kind})");
        let done = sqlx::query(AssertSqlSafe(statement)).execute(&mut connection).await.expect("planted");
        marked += usize::from(done.rows_affected() > 0);
    }
    connection.close().await.expect("it closes");
    marked
}

fn forms_of_the_mark() -> Vec<String> {
    let hex = MARK.bytes().fold(String::new(), |hex, byte| format!("{hex}{byte:02x}"));
    vec![MARK.to_lowercase(), hex, "wnE3eFd2OUs".to_lowercase(), "WnE3eFd2OUs".to_lowercase()]
}

fn assert_clean(what: &str, bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes).to_lowercase();
    for form in forms_of_the_mark() {
        assert!(!text.contains(&form), "{form} of the mark is in {what}: {text}");
    }
}

async fn bundle(site: &Site, name: &str, change: impl FnOnce(&mut std::process::Command)) -> Value {
    let mut command = site.program();
    command.args(["support", "bundle", name]);
    change(&mut command);
    let ran = run(command.into(), b"").await.ok();
    assert_clean("standard output", ran.stdout_bytes());
    assert_clean("standard error", ran.stderr().as_bytes());
    let path = site.home().join(name);
    assert_eq!(path.metadata().expect("written").permissions().mode() & 0o777, 0o600);
    let bytes = fs::read(path).expect("readable");
    assert_clean("the bundle", &bytes);
    serde_json::from_slice(&bytes).expect("JSON")
}

/// A server that was used, with the mark in its database.
async fn marked_site() -> std::sync::Arc<Site> {
    let site = Site::new();
    let server = Server::start_with(&site, |serve| {
        serve.env("STACYVM_PROVIDERS_DEFAULT", "mock");
    })
    .await;
    let client = server.client();
    let sandbox = create(&client, &CreateRequest { owner_id: Some("owner".to_owned()), ..Default::default() }).await;
    crate::support::output(&sandbox, "echo said").await;
    server.stop(Signal::TERM).await;
    let marked = mark_database(&site.data_dir().join("stacyvm.db")).await;
    assert!(marked >= 10, "only {marked} columns have rows");
    site
}

#[tokio::test(flavor = "multi_thread")]
async fn no_secret_is_in_a_bundle_wherever_it_is_kept() {
    let site = marked_site().await;
    let (yaml, planted) = marked_configuration();
    assert!(planted > 30, "{yaml}");
    let file = site.home().join("stacyvm.yaml");
    fs::write(&file, &yaml).expect("a file");
    fs::set_permissions(&file, Permissions::from_mode(0o600)).expect("its mode");
    // The mark is where a server would really read it.
    let shown = site.run(&["config", "show"]).await.ok();
    assert!(shown.stdout().contains(MARK) && shown.stdout().contains("(hidden)"), "{shown}");
    let found = bundle(&site, "full.json", |_| {}).await;
    assert!(found["config"].as_array().expect("settings").len() > 30, "{found:#}");
    assert_eq!(found["config_problems"], serde_json::json!([]));
    let sandboxes = &found["store"]["sandboxes"];
    assert!(sandboxes.as_array().is_some_and(|it| !it.is_empty()), "{found:#}");
    assert!(found["doctor"].as_array().is_some_and(|it| it.len() > 10), "{found:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_in_files_and_variables_stay_out() {
    let site = marked_site().await;
    let key = site.home().join(format!("key-{MARK}"));
    fs::write(&key, format!("{MARK}-0123456789abcdef0123456789abcdef")).expect("a file");
    let found = bundle(&site, "keys.json", |command| {
        command.env("STACYVM_AUTH_ADMIN_API_KEY_FILE", &key).env("STACYVM_AUTH_API_KEY", format!("{MARK}-and-more"));
        command.env("STACYVM_API_KEY", MARK).env(format!("STACYVM_{MARK}"), MARK).env("HTTP_PROXY", MARK);
        command.env("STACYVM_SERVER_ALLOWED_HOSTS", format!("{MARK}.example"));
    })
    .await;
    let settings = found["config"].as_array().expect("settings");
    let source = |key: &str| settings.iter().find(|it| it["key"] == key).expect("the setting")["source"].clone();
    assert_eq!((source("auth.api_key"), source("auth.admin_api_key")), ("environment".into(), "key_file".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_configuration_that_cannot_be_read_is_not_quoted() {
    let site = Site::new();
    fs::write(site.home().join("stacyvm.yaml"), format!("server:\n  port: {MARK}\n  {MARK}: 1\n")).expect("a file");
    let found = bundle(&site, "broken.json", |_| {}).await;
    assert_eq!(found["config_problems"], serde_json::json!([{ "line": 3 }, { "line": 2 }]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_server_is_asked_for_its_health() {
    let site = Site::new();
    let server = Server::start_with(&site, |serve| {
        serve.env("STACYVM_PROVIDERS_DEFAULT", "mock");
    })
    .await;
    let url = server.url.clone();
    let found = bundle(&site, "running.json", |command| {
        command.env("STACYVM_URL", &url);
    })
    .await;
    assert_eq!((&found["server"]["is_ready"], &found["server"]["is_same_version"]), (&true.into(), &true.into()));
    site.run(&["support", "bundle", "running.json"]).await.failed(1).says("exists already");
    server.stop(Signal::TERM).await;
    let stopped = site.run(&["support", "bundle", "stopped.json"]).await.ok();
    stopped.says("the bundle says nothing of the server: none answers");
}
