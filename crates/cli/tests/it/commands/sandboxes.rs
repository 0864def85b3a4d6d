//! Making, showing and ending sandboxes, and what the server says of itself.

use std::process::Stdio;

use serde_json::{Value, json};
use stacyvm_api::{Disk, Event, EventKind, Limit, ProviderDetail, ProviderHealth, Sandbox, SandboxState, Template};
use tokio::io::{AsyncBufReadExt as _, BufReader};

use super::Fixture;
use crate::support::{Ran, Server, eventually, output, run, within};

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_is_made_shown_extended_and_destroyed() {
    let server = Server::shared().await;
    let job = format!("job={}", std::process::id());
    let options = ["--memory", "100", "--vcpus", "0.5", "--pids-limit", "50", "--ttl", "5m", "--owner", "alice"];
    let made = server.run(&[&["spawn", "--metadata", &job][..], &options].concat()).await.ok();
    let id = made.stdout().strip_suffix('\n').expect("a line").to_owned();
    assert!(id.starts_with("sb-") && id.len() == 23, "the id and nothing beside it: {made}");
    assert!(
        made.stderr().contains("alpine:latest on oci, ready in ") && made.stderr().contains("expires in 5m"),
        "{made}"
    );
    let second: Sandbox = server.run(&["spawn", "--json", "--metadata", &job, "--memory", "64"]).await.json();
    let third = server.run(&["spawn", "-q", "--metadata", &job, "--memory", "64", "--image", "host"]).await.ok();
    assert_eq!(third.stderr(), "");
    let third = third.stdout().trim().to_owned();

    let listed = server.run(&["list", "--metadata", &job]).await.ok();
    let lines: Vec<&str> = listed.stdout().lines().collect();
    assert!(lines.len() == 4 && lines[0].starts_with("ID "), "{listed}");
    assert!(lines[1].starts_with(&third) && lines[3].starts_with(&id), "newest first: {listed}");
    assert!(lines[3].contains("running") && lines[3].contains("alice"), "{listed}");
    let rows: Vec<Sandbox> = server.run(&["ls", "--json", "--metadata", &job, "--owner", "alice"]).await.json();
    assert_eq!(rows.iter().map(|row| row.id.as_str()).collect::<Vec<_>>(), [&*id]);
    let quiet = server.run(&["list", "-q", "--metadata", &job, "--state", "running", "--provider", "oci"]).await.ok();
    assert_eq!(quiet.stdout(), format!("{third}\n{}\n{id}\n", second.id));
    assert_eq!(server.run(&["list", "--metadata", "no=such"]).await.ok().stdout(), "no sandboxes\n");
    server.run(&["list", "--state", "sleeping"]).await.says("creating, running");

    let page = server.run(&["inspect", &id]).await.ok();
    for text in ["running", "alpine:latest", "100 MiB", "0.5", "memory, swap, cpu, pids", "alice", &job] {
        assert!(page.stdout().contains(text), "{text} is not in {page}");
    }
    let before: Sandbox = server.run(&["get", "--json", &id]).await.json();
    assert_eq!((before.memory_mb, before.vcpus, before.state), (100, 0.5, SandboxState::Running));
    server.run(&["extend", &id, "2h"]).await.ok().says("expires in 2h");
    let after: Sandbox = server.run(&["extend", "--json", &id, "3h"]).await.json();
    assert!(after.expires_at > before.expires_at);
    server.run(&["extend", &id, "48h"]).await.says("maximum");
    server.run(&["extend", &id, "soon"]).await.says("soon");

    let stats = server.run(&["stats", &id]).await.ok();
    assert!(stats.stdout().contains(" / 100 MiB") && stats.stdout().contains(" / 50"), "{stats}");
    let readings: Vec<Value> = server.run(&["stats", "--json", &id, &third]).await.json();
    assert_eq!((readings.len(), &readings[0]["id"]), (2, &Value::from(&*id)));
    assert!(readings[0]["mem_bytes"].as_u64().is_some_and(|bytes| bytes > 0), "{readings:?}");
    let missing = "sb-00000000000000000000";
    let refused = server.run(&["stats", &id, missing]).await;
    assert_eq!(refused.status(), Some(1), "{refused}");
    refused.says(&format!("sandbox {missing} does not exist"));

    let killed = server.run(&["kill", &id, &third]).await.ok();
    assert_eq!(killed.stdout(), format!("{id}\n{third}\n"));
    let killed: Value = server.run(&["rm", "--json", second.id.as_str()]).await.json();
    assert_eq!(killed["destroyed"][0], second.id.as_str());
    let gone = server.run(&["inspect", &id]).await;
    assert_eq!(gone.status(), Some(1), "{gone}");
    gone.says(&format!("sandbox {id} does not exist"));
    let pruned: Value = server.run(&["kill", "--expired", "--json"]).await.json();
    assert!(pruned["pruned"].is_u64());
    assert_eq!(server.run(&["kill", "--all", "--expired"]).await.status(), Some(2), "one of them");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_cannot_be_killed_unless_that_is_fine() {
    let fixture = Fixture::start().await;
    let (server, id, gone) = (&fixture.server, fixture.id.as_str(), "sb-00000000000000000000");
    let refused = server.run(&["kill", gone]).await.failed(1).says(&format!("no such sandbox: {gone}"));
    assert_eq!(refused.stdout(), "");
    refused.says("--ignore-missing");
    assert_eq!(server.run(&["kill", "--ignore-missing", gone]).await.ok().stdout(), format!("{gone}\n"));
    // The others go all the same.
    let mixed = server.run(&["kill", gone, id]).await.failed(1).says("not every sandbox was destroyed");
    assert_eq!(mixed.stdout(), format!("{id}\n"));
    assert!(mixed.stderr().contains(&format!("error: {gone}: no such sandbox\n")), "{mixed}");
    let again = server.run(&["kill", "--json", id]).await;
    let told: Value = serde_json::from_str(again.stdout()).expect("JSON");
    assert_eq!((again.status(), &told["destroyed"], &told["failed"][0]["id"]), (Some(1), &json!([]), &id.into()));
    // At the end of a pipe that brought nothing.
    let nothing = server.run(&["kill"]).await.ok();
    assert!(nothing.stdout().is_empty() && nothing.stderr().contains("nothing to destroy"), "{nothing}");
    let piped = format!("'{0}' list -q --metadata no=such | xargs '{0}' kill", env!("CARGO_BIN_EXE_stacyvm"));
    let mut shell = server.site.command("bash");
    shell.args(["-c", &piped]).env("STACYVM_URL", &server.url);
    run(shell.into(), b"").await.ok();
}

#[tokio::test(flavor = "multi_thread")]
async fn ports_that_listen_inside_are_shown() {
    let fixture = Fixture::start().await;
    assert_eq!(fixture.server.run(&["ports", &fixture.id]).await.ok().stdout(), "nothing listens\n");
    output(&fixture.sandbox, "busybox nc -ll -p 8123 -e cat >/dev/null 2>&1 &").await;
    let shown: Vec<Value> = eventually("the port is listed", async || {
        let ports: Vec<Value> = fixture.server.run(&["ports", "--json", &fixture.id]).await.json();
        (!ports.is_empty()).then_some(ports)
    })
    .await;
    let (_, port) = fixture.server.url.rsplit_once(':').expect("a port");
    let url = format!("http://8123-{}.localhost:{port}/", fixture.id);
    assert_eq!((&shown[0]["port"], &shown[0]["url"]), (&Value::from(8123), &Value::from(&*url)));
    fixture.server.run(&["ports", &fixture.id]).await.ok().says(&url);
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_followed_as_they_happen() {
    let fixture = Fixture::start().await;
    let follow = |arguments: &[&str]| {
        let mut command = fixture.server.program(&[&["events", "--sandbox", &fixture.id][..], arguments].concat());
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true).spawn();
        let mut child = child.expect("it starts");
        let lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
        (child, lines)
    };
    // From the first event on, so that it does not matter which came first.
    let (_all, mut lines) = follow(&["--after", "evt-0", "--json"]);
    let mut next = async || loop {
        let line = within("an event", lines.next_line()).await.expect("readable").expect("a line");
        let event = serde_json::from_str::<Event>(&line).expect("an event");
        // How far an image is depends on who needed it first.
        if event.kind != EventKind::ImageProgress {
            return event;
        }
    };
    let kind = |event: &Event| serde_json::to_value(event.kind).expect("a name");
    let first = next().await;
    assert_eq!((kind(&first), first.sandbox_id.as_ref()), ("sandbox.created".into(), Some(fixture.sandbox.id())));
    assert_eq!(kind(&next().await), "sandbox.running");
    output(&fixture.sandbox, "echo hi").await;
    assert_eq!(kind(&next().await), "exec.started");
    let completed = next().await;
    assert_eq!(kind(&completed), "exec.completed");
    let (_later, mut lines) = follow(&["--after", &first.id]);
    let line = within("a line", lines.next_line()).await.expect("readable").expect("a line");
    assert!(line.contains(" sandbox.") && line.contains(&fixture.id), "{line}");
    fixture.server.run(&["events", "--after", "yesterday"]).await.says("evt-123");
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn templates_keep_every_field_and_apply_it() {
    let server = Server::shared().await;
    let save = ["template", "save", "e2e-data", "--image", "alpine:latest", "--memory", "80", "--vcpus", "0.5"];
    let more =
        ["--ttl", "7m", "-e", "GREETING=hello", "--metadata", "kind=e2e", "--setup", "echo ready > /workspace/up"];
    let last = ["--network", "none", "--description", "for tests"];
    let ours = ["--pids-limit", "77", "--user", "1000", "--disk", "16", "--disk-in-memory", "--allow-unenforced"];
    server.run(&[&save[..], &more, &last, &ours].concat()).await.ok().says("saved e2e-data, version 1");
    let kept: Template = server.run(&["template", "get", "e2e-data", "--json"]).await.json();
    let fields = (kept.memory_mb, kept.vcpus, kept.description.as_deref(), kept.setup.as_deref());
    let setup = ["echo ready > /workspace/up".to_owned()];
    assert_eq!(fields, (Some(80), Some(0.5), Some("for tests"), Some(&setup[..])));
    let fields = (kept.pids_limit, kept.user.as_deref(), kept.disk, kept.allow_unenforced);
    assert_eq!(fields, (Some(77), Some("1000"), Some(Disk::Memory), Some(true)));
    server.run(&["template", "list"]).await.ok().says("e2e-data").says("80 MiB").says(" 7m ");
    let again = serde_json::to_string(&kept).expect("JSON");
    let copied = ["template", "save", "e2e-copy", "--file", "-"];
    server.run_with_input(&copied, again.as_bytes()).await.ok().says("saved e2e-copy, version 1");
    server.run_with_input(&copied, again.as_bytes()).await.ok().says("version 2");

    for spawn in [&["template", "spawn", "e2e-copy", "--json"][..], &["spawn", "--template", "e2e-data", "--json"]] {
        let made: Sandbox = server.run(spawn).await.json();
        assert_eq!((made.memory_mb, made.vcpus, made.metadata["kind"].as_str()), (80, 0.5, "e2e"));
        assert_eq!(made.expires_at.since(made.created_at).as_secs(), 7 * 60);
        let id = made.id.as_str();
        let seen = server.run(&["exec", id, "--shell", "--", "echo $GREETING; cat up; id -u"]).await.ok();
        assert_eq!(seen.stdout(), "hello\nready\n1000\n");
        let limits = made.limits.expect("what is enforced");
        assert!(limits.enforced.contains(&Limit::Pids), "{limits:?}");
        assert_eq!(limits.disk_backend.as_deref(), Some("memory"));
        server.run(&["kill", id]).await.ok();
    }
    let quiet = server.run(&["template", "spawn", "e2e-copy", "--quiet"]).await.ok();
    assert!(quiet.stdout().starts_with("sb-") && quiet.stderr().is_empty(), "{quiet}");
    server.run(&["kill", quiet.stdout().trim()]).await.ok();
    let loud = server.run(&["template", "spawn", "e2e-copy"]).await.ok();
    assert!(loud.stdout().trim().len() == 23 && loud.stderr().contains("expires in 7m"), "{loud}");
    server.run(&["kill", loud.stdout().trim()]).await.ok();
    let ran = server.run(&["run", "--template", "e2e-data", "--shell", "--", "echo $GREETING"]).await.ok();
    assert_eq!(ran.stdout(), "hello\n");
    for name in ["e2e-data", "e2e-copy"] {
        server.run(&["template", "rm", name]).await.ok().says(name);
    }
    assert_eq!(server.run(&["template", "get", "e2e-data"]).await.says("e2e-data").status(), Some(1));
    server.run(&["template", "save", "e2e-data"]).await.failed(1).says("--image");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_and_this_program_are_described() {
    let server = Server::shared().await;
    let version = env!("CARGO_PKG_VERSION");
    let told = server.run(&["version"]).await.ok();
    assert!(
        told.stdout().starts_with(&format!("stacyvm {version} (")) && told.stdout().contains("\nserver  "),
        "{told}"
    );
    let told: Value = server.run(&["version", "--json"]).await.json();
    assert_eq!((&told["client"]["version"], &told["server"]["version"]), (&version.into(), &version.into()));
    let alone = server.run(&["version", "--server", "http://127.0.0.1:1"]).await.ok();
    assert!(!alone.stdout().contains("server"), "{alone}");
    server.run(&["--version"]).await.ok().says(&format!("stacyvm {version}"));

    server.run(&["providers"]).await.ok().says("oci").says("healthy");
    let all: Vec<ProviderHealth> = server.run(&["providers", "--check", "--json"]).await.json();
    assert!(all.len() == 1 && all[0].default && all[0].healthy, "{all:?}");
    server.run(&["providers", "oci"]).await.ok().says("the default").says("  ok   ");
    let one: ProviderDetail = server.run(&["providers", "oci", "--json"]).await.json();
    assert!(!one.health.findings.is_empty());
    server.run(&["providers", "docker"]).await.failed(1).says("not enabled").says("providers.docker.enabled: true");
    server.run(&["providers", "dokcer"]).await.failed(1).says("`dokcer` does not exist");

    let checked = server.run(&["conformance", "--url", &server.url, "--only", "C0", "--json"]).await.ok();
    let report: Value = serde_json::from_str(checked.stdout()).expect("JSON");
    assert_eq!(report["summary"]["failed"], 0, "{report}");
    server.run(&["conformance"]).await.says("--provider");
}

#[tokio::test(flavor = "multi_thread")]
async fn shells_can_complete_the_command_line() {
    let server = Server::shared().await;
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = server.run(&["completion", shell]).await.ok();
        assert!(script.stdout().contains("stacyvm") && script.stdout().contains("conformance"), "{script}");
    }
    // The script is one that the shell takes, and it knows the commands.
    let script = server.run(&["completion", "bash"]).await.ok();
    let ask = "\nCOMP_WORDS=(stacyvm ev); COMP_CWORD=1; _stacyvm stacyvm ev stacyvm; echo ${COMPREPLY[@]}";
    let bash = |text: String| {
        let mut command = server.site.command("bash");
        command.args(["--norc", "-c", &text]);
        run(command.into(), b"")
    };
    let completed: Ran = bash(script.stdout().to_owned() + ask).await.ok();
    assert_eq!(completed.stdout().trim(), "events");
}

#[tokio::test(flavor = "multi_thread")]
async fn slips_of_the_fingers_are_answered_with_what_was_meant() {
    let server = Server::shared().await;
    let slip = server.run(&["swapn"]).await;
    assert_eq!(slip.status(), Some(2), "{slip}");
    slip.says("spawn");
    server.run(&["spawn", "--memroy", "5"]).await.says("--memory");
    server.run(&["list", "--server", "ftp://example.org"]).await.says("not an http or https address");
    server.run(&["inspect", "../../etc"]).await.says("../../etc");
    for command in [&["list"][..], &["stats"], &["events"], &["template", "list"], &["providers"], &["kill", "--all"]] {
        let nobody = [command, &["--server", "http://127.0.0.1:1"]].concat();
        server.run(&nobody).await.failed(1).says("no server answers at http://127.0.0.1:1");
    }
    // A variable that is set to nothing is not set.
    let mut blank = server.program(&["version", "--json"]);
    blank.env("STACYVM_URL", "").env("STACYVM_API_KEY", "");
    assert!(run(blank, b"").await.json::<Value>()["client"].is_object());
}
