//! Rehearsing an upgrade: told what would happen, and nothing happens.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use rustix::process::Signal;
use serde_json::Value;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions as _, Connection as _};
use stacyvm_api::CreateRequest;

use crate::support::{Ran, Server, Site, create};

async fn rehearse(site: &Site, arguments: &[&str]) -> Ran {
    let mut all = vec!["upgrade", "rehearse", "--json"];
    all.extend(arguments);
    site.run(&all).await
}

fn page(ran: &Ran) -> Value {
    serde_json::from_str(ran.stdout()).unwrap_or_else(|error| panic!("{error}: {ran}"))
}

fn status(page: &Value, name: &str) -> String {
    let checks = page["checks"].as_array().expect("a list");
    let found = checks.iter().find(|check| check["name"] == name);
    found.unwrap_or_else(|| panic!("no {name} in {page:#}"))["status"].as_str().expect("text").to_owned()
}

/// Every file of the data directory that holds state.
fn files(site: &Site) -> BTreeMap<PathBuf, Vec<u8>> {
    let entries = fs::read_dir(site.data_dir()).expect("the directory").flatten();
    let files = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file()));
    // What SQLite needs for reading a file in this mode comes and goes.
    let state = files.map(|entry| entry.path()).filter(|path| path.extension().is_none_or(|it| it != "db-shm"));
    state.map(|path| (path.clone(), fs::read(path).expect("readable"))).filter(|(_, bytes)| !bytes.is_empty()).collect()
}

async fn change_store(site: &Site, statements: &[&'static str]) {
    let path = site.data_dir().join("stacyvm.db");
    let mut connection =
        SqliteConnectOptions::new().filename(path).foreign_keys(false).connect().await.expect("it opens");
    for statement in statements {
        sqlx::query(*statement).execute(&mut connection).await.expect("it runs");
    }
    connection.close().await.expect("it closes");
}

async fn used_site() -> std::sync::Arc<Site> {
    let site = Site::new();
    let server = Server::start_with(&site, |serve| {
        serve.env("STACYVM_PROVIDERS_DEFAULT", "mock");
    })
    .await;
    create(&server.client(), &CreateRequest::default()).await;
    // Beside the running server, too.
    let rehearsed = rehearse(&site, &[]).await;
    let page: Value = rehearsed.json();
    assert_eq!(status(&page, "rehearsal.migrate"), "PASS");
    server.stop(Signal::TERM).await;
    site
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rehearsal_tries_a_copy_and_leaves_the_store_as_it_is() {
    let site = used_site().await;
    let before = files(&site);
    let kept = site.home().join("kept.db").display().to_string();
    let page: Value = rehearse(&site, &["--backup-output", &kept]).await.json();
    for name in ["database.source", "database.integrity", "rehearsal.migrate", "rehearsal.integrity", "rehearsal.rows"]
    {
        assert_eq!(status(&page, name), "PASS", "{page:#}");
    }
    assert_eq!(page["steps"].as_array().expect("steps").len(), 6);
    assert_eq!(files(&site), before);
    site.run(&["db", "check", "--database", &kept]).await.ok();
    // What is to be done is for the store that was looked at.
    let dir = site.data_dir().display().to_string();
    let page: Value = rehearse(&site, &["--data-dir", &dir]).await.json();
    let restore = format!("--yes --data-dir {dir}, start");
    let steps: Vec<&str> = page["steps"].as_array().expect("steps").iter().filter_map(Value::as_str).collect();
    assert!(steps[0].ends_with(&format!(".db --data-dir {dir}")) && steps[5].ends_with(&restore), "{steps:?}");
    let strict = rehearse(&site, &["--production"]).await;
    assert_eq!(
        (strict.status(), status(&crate::operator_upgrade::page(&strict), "auth.api_key")),
        (Some(1), "FAIL".to_owned())
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_would_fail_fails_on_the_copy_only() {
    let site = used_site().await;
    // Its tables are there already: making them again would fail, and they are
    // more than its version has.
    change_store(&site, &["DELETE FROM _sqlx_migrations"]).await;
    let before = files(&site);
    let ran = rehearse(&site, &[]).await;
    assert_eq!(ran.status(), Some(1), "{ran}");
    assert_eq!(status(&page(&ran), "database.schema"), "FAIL");
    assert_eq!(files(&site), before);

    let tomorrow = "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time) \
                    VALUES (9999, 'of tomorrow', 1, x'00', 0)";
    change_store(&site, &[tomorrow]).await;
    let ran = rehearse(&site, &[]).await;
    assert_eq!(ran.status(), Some(1), "{ran}");
    assert_eq!(status(&page(&ran), "database.version"), "FAIL");
    let text = site.run(&["upgrade", "rehearse"]).await;
    assert!(text.stdout().contains("a newer version of stacyvm wrote it (tables 9999)"), "{text}");
    assert!(text.stdout().contains("Do not upgrade"), "{text}");
}

#[tokio::test]
async fn a_first_start_needs_no_rehearsal() {
    let site = Site::new();
    let page: Value = rehearse(&site, &[]).await.json();
    assert_eq!(status(&page, "database.source"), "PASS");
    assert!(!site.data_dir().exists());
    // Somebody who names a directory or a store means one that is there.
    for (option, path, said) in
        [("--data-dir", "typo", "there is no directory"), ("--database", "typo.db", "no store at")]
    {
        site.run(&["upgrade", "rehearse", option, path]).await.failed(1).says(said);
    }
}
