//! The store's file in an operator's hands, with a server that writes to it.

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::process::Signal;
use serde_json::Value;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions as _, Connection as _};
use stacyvm_api::{CreateRequest, ListQuery};

use crate::support::{Ran, Server, Site, create};

/// A server whose sandboxes are imitated: this is about their records.
async fn start(site: &Arc<Site>) -> Server {
    Server::start_with(site, |serve| {
        serve.env("STACYVM_PROVIDERS_DEFAULT", "mock");
    })
    .await
}

async fn db(site: &Site, arguments: &[&str]) -> Ran {
    let mut all = vec!["db"];
    all.extend(arguments);
    site.run(&all).await
}

fn database(site: &Site) -> PathBuf {
    site.data_dir().join("stacyvm.db")
}

fn mode(path: &Path) -> u32 {
    path.metadata().expect("a file").permissions().mode() & 0o777
}

async fn ids(server: &Server) -> BTreeSet<String> {
    let listed = server.client().list_all(&ListQuery::default()).await.expect("a list");
    listed.into_iter().map(|sandbox| sandbox.id.to_string()).collect()
}

async fn spawn(server: &Server) -> String {
    create(&server.client(), &CreateRequest::default()).await.id().to_string()
}

async fn execute(database: &Path, statement: &'static str) {
    let mut connection = SqliteConnectOptions::new().filename(database).connect().await.expect("a database");
    sqlx::query(statement).execute(&mut connection).await.expect("done");
    connection.close().await.expect("closed");
}

/// Copies that a command made of the store before it replaced it.
fn safety_copies(site: &Site, before: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(site.data_dir()).expect("the directory").flatten().map(|entry| entry.path());
    let prefix = format!("stacyvm.db.pre-{before}-");
    entries.filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&prefix))).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_of_a_running_server_is_restored_and_the_newer_state_kept() {
    let site = Site::new();
    let server = start(&site).await;
    let early = spawn(&server).await;
    let backup = site.home().join("backups/one.db");
    let backup_text = backup.display().to_string();
    db(&site, &["backup", &backup_text]).await.ok().says("checked");
    assert_eq!(mode(&backup), 0o600);
    db(&site, &["backup", &backup_text]).await.failed(1).says("exists already").says("--force");
    db(&site, &["backup", &backup_text, "--force"]).await.ok();
    let late = spawn(&server).await;

    let holder = format!("process {}", server.pid());
    db(&site, &["restore", &backup_text, "--yes"]).await.failed(1).says("while a server uses it").says(&holder);
    assert_eq!(ids(&server).await, BTreeSet::from([early.clone(), late.clone()]), "nothing was touched");
    server.stop(Signal::TERM).await;

    db(&site, &["restore", &backup_text]).await.failed(1).says("--yes");
    let restored: Value = db(&site, &["restore", &backup_text, "--yes", "--json"]).await.json();
    let kept = safety_copies(&site, "restore");
    assert_eq!(kept, [PathBuf::from(restored["safety_copy"].as_str().expect("a path"))]);
    assert_eq!((mode(&kept[0]), mode(&database(&site))), (0o600, 0o600));

    // Sandboxes of the fake are gone with their server; their records tell.
    let known = |database: &Path, id: &str| {
        let bytes = fs::read(database).expect("readable");
        bytes.windows(id.len()).any(|window| window == id.as_bytes())
    };
    assert!(known(&database(&site), &early) && !known(&database(&site), &late));
    assert!(known(&kept[0], &late), "what was newer is kept");
    let server = start(&site).await;
    db(&site, &["check"]).await.ok();
    server.stop(Signal::TERM).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_whole_backup_is_not_restored() {
    let site = Site::new();
    start(&site).await.stop(Signal::TERM).await;
    let before = fs::read(database(&site)).expect("readable");
    let file = |name: &str, bytes: &[u8]| {
        let path = site.home().join(name);
        fs::write(&path, bytes).expect("a file");
        path.display().to_string()
    };
    let missing = site.home().join("missing.db").display().to_string();
    db(&site, &["restore", &missing, "--yes"]).await.failed(1).says("there is no backup");
    let text = file("text.db", b"this is no database, and long enough to be looked at by anybody");
    let refused = db(&site, &["restore", &text, "--yes"]).await;
    assert_eq!(refused.status(), Some(1), "{refused}");
    let mut torn = before.clone();
    let (middle, end) = (torn.len() / 2, torn.len());
    torn[middle..end].fill(0x5a);
    let torn = file("torn.db", &torn);
    let refused = db(&site, &["restore", &torn, "--yes"]).await;
    assert_eq!(refused.status(), Some(1), "{refused}");
    assert_eq!(fs::read(database(&site)).expect("readable"), before);
    assert_eq!(safety_copies(&site, "restore"), Vec::<PathBuf>::new());

    let check = db(&site, &["check", "--database", &torn]).await;
    assert_eq!(check.status(), Some(1), "{check}");
    assert!(check.stdout().contains("[FAIL] database.integrity: "), "{check}");
}

/// SQL in a backup would run as part of the server.
#[tokio::test(flavor = "multi_thread")]
async fn a_backup_with_a_trigger_or_a_view_is_not_restored() {
    let site = Site::new();
    start(&site).await.stop(Signal::TERM).await;
    let good = site.home().join("good.db").display().to_string();
    db(&site, &["backup", &good]).await.ok();
    let before = fs::read(database(&site)).expect("readable");
    let planted = [
        ("spy", "CREATE TRIGGER spy AFTER INSERT ON sandboxes BEGIN DELETE FROM api_keys; END"),
        ("lies", "CREATE VIEW lies AS SELECT * FROM sandboxes"),
    ];
    for (name, statement) in planted {
        let file = site.home().join(format!("{name}.db")).display().to_string();
        fs::copy(&good, &file).expect("a copy");
        execute(Path::new(&file), statement).await;
        db(&site, &["restore", &file, "--yes"]).await.failed(1).says(name).says("stacyvm db backup");
        assert_eq!(fs::read(database(&site)).expect("readable"), before, "{name}");
        let check = db(&site, &["check", "--database", &file]).await;
        assert!(check.status() == Some(1) && check.stdout().contains("[FAIL] database.schema: "), "{check}");
    }
    assert_eq!(safety_copies(&site, "restore"), Vec::<PathBuf>::new());
    db(&site, &["restore", &good, "--yes"]).await.ok();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_store_is_replaced_and_its_bytes_kept() {
    let site = Site::new();
    let server = start(&site).await;
    let backup = site.home().join("good.db").display().to_string();
    spawn(&server).await;
    db(&site, &["backup", &backup]).await.ok();
    server.stop(Signal::TERM).await;
    let garbage = vec![0x5a; 8192];
    fs::write(database(&site), &garbage).expect("a file");
    // What a log beside it still holds would be read in place of the garbage.
    for companion in ["-wal", "-shm"] {
        let _ = fs::remove_file(format!("{}{companion}", database(&site).display()));
    }
    db(&site, &["restore", &backup, "--yes"]).await.ok();
    let kept = safety_copies(&site, "restore");
    assert_eq!(kept.len(), 1, "{kept:?}");
    assert!(fs::read(&kept[0]).expect("readable") == garbage, "{} is not the damaged store", kept[0].display());
    db(&site, &["check"]).await.ok();
    start(&site).await.stop(Signal::TERM).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_is_restored_where_there_was_none() {
    let site = Site::new();
    let server = start(&site).await;
    let id = spawn(&server).await;
    let backup = site.home().join("moved.db").display().to_string();
    db(&site, &["backup", &backup]).await.ok();
    server.stop(Signal::TERM).await;
    let elsewhere = site.home().join("elsewhere");
    let directory = elsewhere.display().to_string();
    let typo = db(&site, &["restore", &backup, "--yes", "--data-dir", &directory]).await.failed(1);
    assert!(!elsewhere.exists(), "a slip of the fingers makes no directory");
    typo.says(&format!("there is no directory {directory}")).says(&format!("mkdir -p -m 700 {directory}"));
    fs::create_dir(&elsewhere).expect("made");
    db(&site, &["restore", &backup, "--yes", "--data-dir", &directory]).await.ok();
    assert_eq!(elsewhere.metadata().expect("made").permissions().mode() & 0o777, 0o700);
    let bytes = fs::read(elsewhere.join("stacyvm.db")).expect("restored");
    assert!(bytes.windows(id.len()).any(|window| window == id.as_bytes()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_without_keys_does_not_open_a_server_by_accident() {
    let site = Site::new();
    start(&site).await.stop(Signal::TERM).await;
    let path = |name: &str| site.home().join(name).display().to_string();
    let (open, one, data_dir) = (path("open.db"), path("one.db"), path("data"));
    db(&site, &["backup", &open]).await.ok();
    let key = async |arguments: &[&str]| site.run(&[&["key"], arguments, &["--data-dir", &data_dir]].concat()).await;
    key(&["create", "root", "--scope", "admin"]).await.ok();
    key(&["create", "ci"]).await.ok();
    db(&site, &["backup", &one]).await.ok();
    key(&["revoke", "ci"]).await.ok();

    let refused = db(&site, &["restore", &open, "--yes"]).await.failed(1);
    refused.says("from before the first API key").says("--without-keys");
    assert_eq!(safety_copies(&site, "restore"), Vec::<PathBuf>::new(), "nothing was touched");
    db(&site, &["restore", &one, "--yes"]).await.ok().says("valid again: ci");
    let listed = key(&["list"]).await.ok();
    assert!(listed.stdout().contains("root") && listed.stdout().contains("ci"), "{listed}");
    db(&site, &["restore", &open, "--yes", "--without-keys"]).await.ok();
    assert_eq!(key(&["list"]).await.ok().stdout(), "no keys\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn versions_are_shown_and_nothing_is_done_unasked() {
    let site = Site::new();
    db(&site, &["migrate"]).await.failed(1).says("there is no store at");
    start(&site).await.stop(Signal::TERM).await;
    let shown: Value = db(&site, &["migrate", "--json"]).await.json();
    let migrations = shown["migrations"].as_array().expect("a list");
    assert!(!migrations.is_empty() && migrations.iter().all(|it| it["state"] == "applied"), "{shown}");
    assert!(migrations[0]["applied_at"].is_string(), "{shown}");
    db(&site, &["migrate", "--yes"]).await.ok();
    assert_eq!(safety_copies(&site, "migrate"), Vec::<PathBuf>::new(), "there was nothing to do");
}

/// A store may lie in a directory that belongs to others.
#[tokio::test(flavor = "multi_thread")]
async fn directories_of_others_are_left_as_they_are() {
    let site = Site::new();
    let server = start(&site).await;
    let shared = site.home().join("shared");
    fs::create_dir(&shared).expect("a directory");
    fs::set_permissions(&shared, Permissions::from_mode(0o755)).expect("its mode");
    let copy = shared.join("copy.db").display().to_string();
    db(&site, &["backup", &copy]).await.ok();
    server.stop(Signal::TERM).await;
    db(&site, &["check", "--database", &copy]).await.ok();
    let again = shared.join("again.db").display().to_string();
    db(&site, &["restore", &copy, "--yes", "--database", &again]).await.ok();
    assert_eq!(mode(&shared), 0o755);
    let names: BTreeSet<_> =
        fs::read_dir(&shared).expect("readable").flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(names, BTreeSet::from(["again.db".into(), "copy.db".into()]));
}
