//! Commands as lines of JSON, byte by byte.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

use crate::support::{Fixture, Live, Request, eventually, within};

fn stream(fixture: &Fixture, id: &str, body: &Value) -> Request {
    let mut body = body.clone();
    body["stream"] = json!(true);
    fixture.api("POST", &format!("/sandboxes/{id}/exec")).json(&body)
}

async fn lines(mut live: Live) -> Vec<Value> {
    let text = String::from_utf8(within(live.rest()).await).unwrap();
    text.lines().filter(|line| !line.is_empty()).map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[tokio::test]
async fn lines_have_exactly_the_two_published_keys() {
    let fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    let mut live = stream(&fixture, &id, &json!({ "command": "echo hello; sleep 0.05; echo warn >&2" })).open().await;
    assert_eq!(live.status, 200);
    assert_eq!(live.header("content-type"), Some("application/x-ndjson"));
    assert_eq!(live.header("cache-control"), Some("no-cache"));
    assert!(live.header("x-exec-id").unwrap().starts_with("ex-"));
    let body = String::from_utf8(within(live.rest()).await).unwrap();
    assert_eq!(body, "{\"stream\":\"stdout\",\"data\":\"hello\\n\"}\n{\"stream\":\"stderr\",\"data\":\"warn\\n\"}\n");
}

#[tokio::test]
async fn the_exit_code_travels_in_a_trailer_for_those_who_ask() {
    let fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    let request = || stream(&fixture, &id, &json!({ "command": "exit 3" }));
    let asked = request().header("TE", "trailers").header("Connection", "TE").send().await;
    assert_eq!(asked.header("trailer"), Some("X-Exit-Code"));
    assert_eq!(asked.trailer("x-exit-code"), Some("3"), "{asked:?}");
    assert_eq!(asked.body, b"");
    assert_eq!(request().send().await.trailer("x-exit-code"), None);
}

#[tokio::test]
async fn the_head_and_each_line_arrive_while_the_command_runs() {
    let fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    let body = json!({ "command": "cat", "keep_stdin_open": true });
    let mut live = stream(&fixture, &id, &body).open().await;
    // The head is here, and the command has not written anything.
    let exec_id = live.header("x-exec-id").unwrap().to_owned();
    for text in ["first\n", "second\n"] {
        let path = format!("/sandboxes/{id}/exec/{exec_id}/stdin");
        fixture.post(&path, &json!({ "data": text })).await.expect(200);
        let chunk: Value = serde_json::from_str(&live.line().await.unwrap()).unwrap();
        assert_eq!(chunk, json!({ "stream": "stdout", "data": text }));
    }
}

#[tokio::test]
async fn more_keys_come_only_when_asked_for() {
    let fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    let by_field = stream(&fixture, &id, &json!({ "command": "printf abc; exit 7", "stream_exit": true }));
    let by_header = stream(&fixture, &id, &json!({ "command": "printf abc; exit 7" }))
        .header("Accept", "application/x-ndjson; exit=1");
    for request in [by_field, by_header] {
        let lines = lines(request.open().await).await;
        assert_eq!(lines[0], json!({ "stream": "stdout", "data": "abc", "offset": 3 }));
        let exit = &lines[1];
        assert_eq!((&exit["stream"], &exit["data"], &exit["exit_code"]), (&json!("exit"), &json!(""), &json!(7)));
        assert!(exit["duration"].as_str().unwrap().ends_with('s'));
        assert_eq!(lines.len(), 2);
    }
}

#[tokio::test]
async fn characters_stay_whole_and_bytes_stay_exact() {
    let fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    let cut = "printf '\\342\\202'; sleep 0.05; printf '\\254!'";
    let text = lines(stream(&fixture, &id, &json!({ "command": cut })).open().await).await;
    assert_eq!(text, [json!({ "stream": "stdout", "data": "\u{20ac}!" })], "a cut character waits for its rest");
    let unfinished = "printf 'a\\342\\202'";
    let text = lines(stream(&fixture, &id, &json!({ "command": unfinished })).open().await).await;
    let joined: String = text.iter().map(|line| line["data"].as_str().unwrap()).collect();
    assert_eq!(joined, "a\u{fffd}", "a character that never ends is marked at the end");
    let body = json!({ "command": "printf '\\000\\377\\342'", "encoding": "base64" });
    let exact = lines(stream(&fixture, &id, &body).open().await).await;
    let bytes: Vec<u8> =
        exact.iter().flat_map(|line| BASE64.decode(line["data_b64"].as_str().unwrap()).unwrap()).collect();
    assert_eq!(bytes, b"\x00\xff\xe2");
    assert_eq!(exact[0]["data"], "");
}

#[tokio::test]
async fn a_deadline_ends_the_stream_with_the_published_line() {
    let fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    let body = json!({ "command": "echo begun; sleep 100", "timeout": "200ms" });
    let text = lines(stream(&fixture, &id, &body).open().await).await;
    let expected = [
        json!({ "stream": "stdout", "data": "begun\n" }),
        json!({ "stream": "stderr", "data": format!("exec timeout: {id}") }),
    ];
    assert_eq!(text, expected);
    let mut body = body;
    body["stream_exit"] = json!(true);
    let text = lines(stream(&fixture, &id, &body).open().await).await;
    assert_eq!(text.last().unwrap()["error"], "TIMEOUT");
}

#[tokio::test]
async fn what_is_wrong_before_the_start_is_an_envelope() {
    let fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    let refused = stream(&fixture, &id, &json!({ "command": "true", "timeout": "11m" })).send().await;
    assert_eq!(refused.failure(), (429, "RESOURCE_LIMIT".to_owned()));
    let refused = stream(&fixture, &id, &json!({ "command": "true", "mode": "odd" })).send().await;
    assert_eq!(refused.failure(), (400, "BAD_REQUEST".to_owned()));
}

#[tokio::test]
async fn a_client_that_goes_away_leaves_the_command_running_for_others() {
    let fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    let body = json!({ "command": "echo one; cat; echo three", "keep_stdin_open": true });
    let mut live = stream(&fixture, &id, &body).open().await;
    let exec_id = live.header("x-exec-id").unwrap().to_owned();
    live.line().await.unwrap();
    drop(live);
    let path = format!("/sandboxes/{id}/exec/{exec_id}");
    assert_eq!(fixture.get(&path).await.expect(200)["status"], "running");
    let attached = fixture.api("GET", &format!("{path}/attach?offset=4&encoding=base64")).open().await;
    assert_eq!(attached.status, 200);
    fixture.post(&format!("{path}/stdin"), &json!({ "data": "two\n", "close": true })).await.expect(200);
    let lines = lines(attached).await;
    let (exit, output) = lines.split_last().unwrap();
    let bytes: Vec<u8> =
        output.iter().flat_map(|line| BASE64.decode(line["data_b64"].as_str().unwrap()).unwrap()).collect();
    assert_eq!(bytes, b"two\nthree\n", "output goes on behind the offset");
    assert_eq!((&exit["stream"], &exit["exit_code"], &exit["offset"]), (&json!("exit"), &json!(0), &json!(14)));
    // Its end stays readable.
    let again = fixture.api("GET", &format!("{path}/attach?offset=8")).open().await;
    let said: String = self::lines(again).await.iter().map(|line| line["data"].as_str().unwrap().to_owned()).collect();
    assert_eq!(said, "three\n");
}

#[tokio::test]
async fn every_byte_of_a_flood_arrives_or_is_accounted_for() {
    let fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    let body = json!({ "command": "head -c 20000000 /dev/zero", "stream_exit": true, "encoding": "base64" });
    let mut live = stream(&fixture, &id, &body).open().await;
    let (mut read, mut lost) = (0u64, 0u64);
    let mut pending = Vec::new();
    let exit = loop {
        pending.extend(live.chunk().await.expect("there is an exit line"));
        let Some(end) = pending.iter().rposition(|byte| *byte == b'\n') else { continue };
        let whole: Vec<u8> = pending.drain(..=end).collect();
        let mut exit = None;
        for line in whole.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            let chunk: Value = serde_json::from_slice(line).unwrap();
            lost += chunk["dropped"].as_u64().unwrap_or(0);
            if chunk["stream"] == "exit" {
                exit = Some(chunk);
            } else {
                read += BASE64.decode(chunk["data_b64"].as_str().unwrap()).unwrap().len() as u64;
            }
        }
        if let Some(exit) = exit {
            break exit;
        }
    };
    assert_eq!(read + lost, 20_000_000, "every byte is here or accounted for");
    assert_eq!(exit["exit_code"], 0);
}

#[tokio::test]
async fn parallel_streams_do_not_hold_each_other_up() {
    let fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    let quiet = stream(&fixture, &id, &json!({ "command": "sleep 100" })).open().await;
    let exec_id = quiet.header("x-exec-id").unwrap().to_owned();
    let others = (0..8).map(|n| {
        let request = stream(&fixture, &id, &json!({ "command": format!("echo {n}") }));
        async move { lines(request.open().await).await[0]["data"].as_str().unwrap().trim().parse::<i32>().unwrap() }
    });
    let answers = within(futures_util::future::join_all(others)).await;
    assert_eq!(answers, (0..8).collect::<Vec<_>>());
    let path = format!("/sandboxes/{id}/exec/{exec_id}/signal");
    fixture.post(&path, &json!({ "signal": "KILL" })).await.expect(200);
    assert!(lines(quiet).await.is_empty());
    eventually("the end", || async {
        let entry = fixture.get(&format!("/sandboxes/{id}/exec/{exec_id}")).await.expect(200);
        (entry["exit_code"] == 137).then_some(())
    })
    .await;
}
