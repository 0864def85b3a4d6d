//! Buffered commands, the exec log, and acting on a command by its id.

use serde_json::{Value, json};
use stacyvm_providers::mock::Exhausted;

use crate::support::{Answer, Fixture, eventually};

async fn exec(fixture: &Fixture, id: &str, body: Value) -> Answer {
    fixture.post(&format!("/sandboxes/{id}/exec"), &body).await
}

#[tokio::test]
async fn a_command_gives_its_output_and_exit_code() {
    let fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    let result = exec(&fixture, &id, json!({ "command": "echo out; echo err >&2; exit 42" })).await.expect(200);
    assert_eq!(result["exit_code"], 42);
    assert_eq!(result["stdout"], "out\n");
    assert_eq!(result["stderr"], "err\n");
    assert!(result["duration"].as_str().unwrap().ends_with('s'), "{result}");
    assert!(result["exec_id"].as_str().unwrap().starts_with("ex-"));
    assert!(result.get("truncated").is_none() && result.get("error").is_none(), "{result}");
}

#[tokio::test]
async fn arguments_environment_workdir_and_stdin_reach_the_command() {
    let fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    let run = |body: Value| exec(&fixture, &id, body);
    let shell = run(json!({ "command": "echo", "args": ["a b", "$HOME"] })).await.expect(200);
    assert_eq!(shell["stdout"], "a b $HOME\n");
    let argv = run(json!({ "command": "echo", "args": ["a;b"], "mode": " argv " })).await.expect(200);
    assert_eq!(argv["stdout"], "a;b\n");
    let env = run(json!({ "command": "echo $X; pwd", "env": { "X": "1" }, "workdir": "/tmp" })).await.expect(200);
    assert_eq!(env["stdout"], "1\n/tmp\n");
    assert_eq!(run(json!({ "command": "cat", "stdin": "typed" })).await.expect(200)["stdout"], "typed");
    assert_eq!(run(json!({ "command": "" })).await.expect(200)["exit_code"], 0);
    for bad in
        [json!({ "mode": "argv" }), json!({ "command": " ", "mode": "argv" }), json!({ "command": "x", "mode": "y" })]
    {
        assert_eq!(run(bad.clone()).await.failure(), (400, "BAD_REQUEST".to_owned()), "{bad}");
    }
}

#[tokio::test]
async fn null_is_no_command() {
    let fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    for path in ["exec", "files"] {
        let request = fixture.api("POST", &format!("/sandboxes/{id}/{path}"));
        let answer = request.header("Content-Type", "application/json").body(" null ").send().await;
        assert_eq!(answer.failure(), (400, "BAD_REQUEST".to_owned()), "{path}");
        assert!(answer.text().contains("must be a JSON object"), "{path}: {}", answer.text());
    }
}

#[tokio::test]
async fn a_deadline_is_408_with_what_was_written() {
    let fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    let answer = exec(&fixture, &id, json!({ "command": "echo begun; sleep 100", "timeout": "200ms" })).await;
    assert_eq!(answer.failure(), (408, "TIMEOUT".to_owned()));
    let body = answer.json();
    assert_eq!(body["stdout"], "begun\n");
    assert!(body["exec_id"].as_str().unwrap().starts_with("ex-"));
    for bad in ["soon", "5", "-5s"] {
        let answer = exec(&fixture, &id, json!({ "command": "true", "timeout": bad })).await;
        assert_eq!(answer.failure().0, 400, "{bad}");
        assert!(answer.text().contains("timeout"), "{}", answer.text());
    }
    let above = exec(&fixture, &id, json!({ "command": "true", "timeout": "11m" })).await;
    assert_eq!(above.failure(), (429, "RESOURCE_LIMIT".to_owned()));
}

#[tokio::test]
async fn used_up_limits_of_a_sandbox_have_their_own_codes() {
    let fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    let oom = exec(&fixture, &id, json!({ "command": "mock-oom" })).await.expect(200);
    assert_eq!((&oom["exit_code"], &oom["error"]), (&json!(137), &json!("SANDBOX_OOM")));
    let sandbox = id.parse().unwrap();
    fixture.mock.exhaust_pids(&sandbox, Exhausted::Yes);
    let refused = exec(&fixture, &id, json!({ "command": "true" })).await;
    assert_eq!(refused.failure(), (429, "SANDBOX_PIDS_EXHAUSTED".to_owned()));
    assert_eq!(fixture.delete(&format!("/sandboxes/{id}")).await.status, 200, "destroy always works");
}

#[tokio::test]
async fn long_output_is_cut_and_says_so() {
    let fixture = Fixture::with_engine(|options| options.limits.max_output_bytes = 1000).await;
    let id = fixture.sandbox().await;
    let result = exec(&fixture, &id, json!({ "command": "seq 1 10000" })).await.expect(200);
    assert_eq!((&result["exit_code"], &result["truncated"]), (&json!(0), &json!(true)));
    assert!(result["stdout"].as_str().unwrap().len() <= 1000);
}

#[tokio::test]
async fn commands_are_logged_newest_first() {
    let fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    for code in [1, 2, 3] {
        exec(&fixture, &id, json!({ "command": format!("exit {code}") })).await.expect(200);
    }
    let path = format!("/sandboxes/{id}/exec");
    let log = eventually("the log", || async {
        let log = fixture.get(&path).await.expect(200);
        let ended = log.as_array().unwrap().iter().filter(|entry| entry["exit_code"].is_i64()).count();
        (ended == 3).then_some(log)
    })
    .await;
    let codes: Vec<&Value> = log.as_array().unwrap().iter().map(|entry| &entry["exit_code"]).collect();
    assert_eq!(codes, [&json!(3), &json!(2), &json!(1)]);
    assert_eq!(log[0]["status"], "exited");
    let newest = log[0]["exec_id"].as_str().unwrap();
    assert_eq!(fixture.get(&format!("{path}/{newest}")).await.expect(200), log[0]);
    let page = fixture.get(&format!("{path}?limit=2")).await;
    assert_eq!(page.expect(200).as_array().unwrap().len(), 2);
    let cursor = page.header("x-next-cursor").expect("there is another page");
    let rest = fixture.get(&format!("{path}?limit=2&cursor={cursor}")).await.expect(200);
    assert_eq!(rest, json!([log[2]]));
    let unknown = fixture.get(&format!("{path}/ex-00000000000000000000")).await;
    assert_eq!(unknown.failure(), (404, "NOT_FOUND".to_owned()));
    assert_eq!(fixture.get(&format!("{path}/nonsense")).await.failure(), (404, "NOT_FOUND".to_owned()));
}

#[tokio::test]
async fn a_background_command_takes_input_and_signals_by_its_id() {
    let fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    let started = exec(&fixture, &id, json!({ "command": "cat", "background": true, "keep_stdin_open": true })).await;
    let started = started.expect(202);
    assert_eq!((&started["exit_code"], &started["stdout"]), (&json!(0), &json!("")), "clients read these keys");
    let exec_id = started["exec_id"].as_str().unwrap();
    let act = |what: &str, body: Value| {
        fixture.api("POST", &format!("/sandboxes/{id}/exec/{exec_id}/{what}")).json(&body).send()
    };
    act("stdin", json!({ "data": "one\n" })).await.expect(200);
    act("stdin", json!({ "data_b64": "dHdvCg==", "close": true })).await.expect(200);
    assert_eq!(act("stdin", json!({ "data_b64": "!" })).await.failure().0, 400);
    let mut output = fixture.api("GET", &format!("/sandboxes/{id}/exec/{exec_id}/attach")).open().await;
    let text = String::from_utf8(crate::support::within(output.rest()).await).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let said: String = lines.iter().map(|line| line["data"].as_str().unwrap()).collect();
    assert_eq!(said, "one\ntwo\n");
    assert_eq!(lines.last().unwrap()["stream"], "exit");
    assert_eq!(lines.last().unwrap()["exit_code"], 0);

    let started = exec(&fixture, &id, json!({ "command": "sleep 100", "background": true })).await.expect(202);
    let exec_id = started["exec_id"].as_str().unwrap();
    let path = format!("/sandboxes/{id}/exec/{exec_id}");
    let signal =
        |signal: &str| fixture.api("POST", &format!("{path}/signal")).json(&json!({ "signal": signal })).send();
    assert_eq!(signal("NONSENSE").await.failure().0, 400);
    signal("SIGTERM").await.expect(200);
    let ended = eventually("the end", || async {
        let entry = fixture.get(&path).await.expect(200);
        (entry["status"] == "exited").then_some(entry)
    })
    .await;
    assert_eq!(ended["exit_code"], 143);
    let zero = fixture.api("POST", &format!("{path}/resize")).json(&json!({ "cols": 0, "rows": 5 })).send().await;
    assert_eq!(zero.failure().0, 400);
}

#[tokio::test]
async fn a_destroyed_sandbox_is_not_found_on_every_call() {
    let fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    fixture.delete(&format!("/sandboxes/{id}")).await.expect(200);
    let not_found = (404, "NOT_FOUND".to_owned());
    for path in ["", "/stats", "/logs", "/ports", "/exec", "/files?path=/x", "/files/list", "/files/stat?path=/x"] {
        assert_eq!(fixture.get(&format!("/sandboxes/{id}{path}")).await.failure(), not_found, "{path}");
    }
    assert_eq!(exec(&fixture, &id, json!({ "command": "true" })).await.failure(), not_found);
    assert_eq!(exec(&fixture, &id, json!({ "command": "true", "stream": true })).await.failure(), not_found);
    assert_eq!(exec(&fixture, "NOT-AN-ID", json!({ "command": "true" })).await.failure(), not_found);
}
