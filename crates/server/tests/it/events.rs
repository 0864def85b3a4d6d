//! Events as server-sent events, byte by byte, and going on after a break.

use serde_json::{Value, json};

use crate::support::{Fixture, Live, within};

async fn follow(fixture: &Fixture, query: &str, last_id: &str) -> Live {
    fixture.api("GET", &format!("/events{query}")).header("Last-Event-ID", last_id).open().await
}

/// The next event block: its id and its data.
async fn event(live: &mut Live) -> (String, Value) {
    loop {
        let block = String::from_utf8(live.chunk().await.expect("the stream goes on")).unwrap();
        if block == ": heartbeat\n\n" {
            continue;
        }
        let lines: Vec<&str> = block.split('\n').collect();
        let [id, data, "", ""] = lines[..] else { panic!("not an id line, a data line and a blank one: {block:?}") };
        let data: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
        let id = id.strip_prefix("id: ").unwrap().to_owned();
        assert_eq!(data["id"], *id, "the id line names the event");
        return (id, data);
    }
}

async fn until(live: &mut Live, kind: &str) -> Vec<(String, Value)> {
    let mut seen = Vec::new();
    loop {
        let next = event(live).await;
        let found = next.1["type"] == kind;
        seen.push(next);
        if found {
            return seen;
        }
    }
}

#[tokio::test]
async fn events_are_unnamed_blocks_with_ids() {
    let fixture = Fixture::open().await;
    let mut live = follow(&fixture, "", "").await;
    assert_eq!(live.status, 200);
    assert_eq!(live.header("content-type"), Some("text/event-stream"));
    assert_eq!(live.header("cache-control"), Some("no-cache"));
    let id = fixture.sandbox().await;
    let seen = until(&mut live, "sandbox.running").await;
    let kinds: Vec<&Value> = seen.iter().map(|(_, event)| &event["type"]).collect();
    assert_eq!(kinds, [&json!("sandbox.created"), &json!("sandbox.running")]);
    for (event_id, event) in &seen {
        assert_eq!(event["sandbox_id"], *id);
        assert!(event_id.strip_prefix("evt-").unwrap().parse::<u64>().is_ok());
        assert!(event["timestamp"].as_str().unwrap().ends_with('Z'));
    }
    fixture.post(&format!("/sandboxes/{id}/exec"), &json!({ "command": "true" })).await.expect(200);
    let kinds: Vec<Value> =
        until(&mut live, "exec.completed").await.into_iter().map(|(_, event)| event["type"].clone()).collect();
    assert_eq!(kinds, ["exec.started", "exec.completed"]);
}

#[tokio::test]
async fn a_client_goes_on_after_the_last_event_it_saw() {
    let fixture = Fixture::open().await;
    let mut live = follow(&fixture, "", "").await;
    let id = fixture.sandbox().await;
    let seen = until(&mut live, "sandbox.running").await;
    let first = seen[0].0.clone();
    drop(live);
    fixture.delete(&format!("/sandboxes/{id}")).await.expect(200);
    for (query, header) in
        [("", first.as_str()), (&format!("?after={first}"), ""), ("?after=evt-999999", first.as_str())]
    {
        let mut live = follow(&fixture, query, header).await;
        let seen = until(&mut live, "sandbox.destroyed").await;
        let kinds: Vec<&Value> = seen.iter().map(|(_, event)| &event["type"]).collect();
        assert_eq!(kinds, [&json!("sandbox.running"), &json!("sandbox.destroyed")], "after {query}{header}");
    }
    let refused = fixture.api("GET", "/events").header("Last-Event-ID", "nonsense").send().await;
    assert_eq!(refused.failure().0, 400);
}

#[tokio::test]
async fn followers_see_the_same_events_and_end_with_the_server() {
    let mut fixture = Fixture::open().await;
    let mut followers = Vec::new();
    for _ in 0..3 {
        followers.push(follow(&fixture, "", "").await);
    }
    fixture.sandbox().await;
    let mut seen = Vec::new();
    for live in &mut followers {
        seen.push(until(live, "sandbox.running").await);
    }
    assert_eq!(seen[0], seen[1]);
    assert_eq!(seen[1], seen[2]);
    fixture.begin_stop();
    for mut live in followers {
        within(live.rest()).await;
    }
    fixture.ended().await;
}
