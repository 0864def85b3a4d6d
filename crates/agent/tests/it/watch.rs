//! Watching directories.

use futures_util::StreamExt as _;
use stacyvm_api::WatchEventKind;
use stacyvm_sandbox::{Session as _, SessionError, WatchStream};

use crate::envd::Client;
use crate::harness::{Agent, PATIENCE, eventually};

/// Reads until a change shows up.
async fn until(changes: &mut WatchStream, name: &str, kind: WatchEventKind) {
    let found = async {
        loop {
            let change = changes.next().await.expect("not the end").expect("no failure");
            if change.name == name && change.kind == kind {
                return;
            }
        }
    };
    tokio::time::timeout(PATIENCE, found).await.unwrap_or_else(|_| panic!("no {kind:?} of {name}"));
}

#[tokio::test]
async fn changes_below_a_directory_are_told() {
    let agent = Agent::start();
    let dir = agent.dir.clone();
    let mut changes = agent.session.watch(&agent.path("."), true).await.expect("a directory");
    std::fs::write(dir.join("file"), b"x").expect("writable");
    until(&mut changes, "file", WatchEventKind::Create).await;
    until(&mut changes, "file", WatchEventKind::Write).await;
    std::fs::create_dir_all(dir.join("a/b/c")).expect("new directories");
    until(&mut changes, "a/b/c", WatchEventKind::Create).await;
    std::fs::write(dir.join("a/b/c/deep"), b"x").expect("writable");
    until(&mut changes, "a/b/c/deep", WatchEventKind::Create).await;
    std::fs::rename(dir.join("a/b"), dir.join("moved")).expect("a new name");
    until(&mut changes, "a/b", WatchEventKind::Rename).await;
    until(&mut changes, "moved", WatchEventKind::Create).await;
    std::fs::write(dir.join("moved/c/again"), b"x").expect("writable");
    until(&mut changes, "moved/c/again", WatchEventKind::Create).await;
    std::fs::remove_file(dir.join("file")).expect("there");
    until(&mut changes, "file", WatchEventKind::Remove).await;
}

#[tokio::test]
async fn a_watch_is_not_recursive_unless_asked_and_ends_with_its_directory() {
    let agent = Agent::start();
    let dir = agent.dir.join("watched");
    std::fs::create_dir_all(dir.join("below")).expect("new directories");
    let mut changes = agent.session.watch(&agent.path("watched"), false).await.expect("a directory");
    std::fs::write(dir.join("below/unseen"), b"x").expect("writable");
    std::fs::write(dir.join("seen"), b"x").expect("writable");
    let first = changes.next().await.expect("a change").expect("no failure");
    assert_eq!((first.name.as_str(), first.kind), ("seen", WatchEventKind::Create));
    std::fs::remove_dir_all(&dir).expect("there");
    let end = tokio::time::timeout(PATIENCE, async { while let Some(Ok(_)) = changes.next().await {} }).await;
    end.expect("the stream ends");

    let missing = agent.session.watch(&agent.path("none"), false).await;
    assert!(matches!(missing.err(), Some(SessionError::FileNotFound(_))));
    std::fs::write(agent.dir.join("file"), b"x").expect("writable");
    let file = agent.session.watch(&agent.path("file"), false).await;
    assert!(matches!(file.err(), Some(SessionError::InvalidArgument(_))));
}

#[tokio::test]
async fn a_polled_watcher_keeps_changes_until_they_are_fetched() {
    let agent = Agent::start();
    let client = Client::new(&agent);
    let path = agent.path(".");
    let created = client.call("filesystem.Filesystem/CreateWatcher", &format!(r#"{{"path":"{path}"}}"#)).await;
    assert_eq!(created.status, 200, "{created:?}");
    let id = created.json()["watcherId"].as_str().expect("an id").to_owned();
    let watcher = format!(r#"{{"watcherId":"{id}"}}"#);
    std::fs::write(agent.dir.join("file"), b"x").expect("writable");
    let mut seen = String::new();
    eventually("the change is there", async || {
        let events = client.call("filesystem.Filesystem/GetWatcherEvents", &watcher).await;
        seen.push_str(&events.text());
        seen.contains("EVENT_TYPE_CREATE") && seen.contains("EVENT_TYPE_WRITE")
    })
    .await;
    assert!(seen.contains(r#""name":"file""#), "{seen}");
    assert_eq!(client.call("filesystem.Filesystem/RemoveWatcher", &watcher).await.status, 200);
    assert_eq!(client.call("filesystem.Filesystem/GetWatcherEvents", &watcher).await.status, 404);
}

#[tokio::test]
async fn dropped_watches_give_their_place_back() {
    let agent = Agent::start();
    for _ in 0..3 {
        let mut open = Vec::new();
        eventually("there is room again", async || match agent.session.watch(&agent.path("."), false).await {
            Ok(watch) => {
                open.push(watch);
                open.len() == 60
            }
            Err(SessionError::InvalidArgument(_)) => false,
            Err(error) => panic!("{error}"),
        })
        .await;
    }
}
