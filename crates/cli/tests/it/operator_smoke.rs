//! Smoke tests of a deployment: what works passes, what does not fails, and
//! nothing stays.

use rustix::process::Signal;
use serde_json::Value;
use stacyvm_api::ListQuery;
use tokio::io::{AsyncBufReadExt as _, BufReader};

use crate::support::{IMAGE, Server, Site, eventually, in_repository, run, within};

async fn left_of(server: &Server) -> Vec<String> {
    let listed = server.client().list_all(&ListQuery::default()).await.expect("a list");
    listed.into_iter().map(|sandbox| sandbox.id.to_string()).collect()
}

fn statuses(page: &Value) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    let checks = page["checks"].as_array().expect("a list");
    checks.iter().map(|check| (text(&check["name"]), text(&check["status"]))).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_works_passes_and_keeps_nothing() {
    let server = Server::shared().await;
    let page: Value = server.run(&["smoke", "--json", "--image", IMAGE]).await.json();
    let found = statuses(&page);
    assert!(found.iter().all(|(_, status)| status == "PASS"), "{page:#}");
    for name in [
        "smoke.live",
        "smoke.spawn",
        "smoke.stream",
        "smoke.files.bytes",
        "smoke.ports",
        "smoke.preview",
        "smoke.destroy",
        "smoke.clean",
    ] {
        assert!(found.iter().any(|(found, _)| found == name), "{name} in {page:#}");
    }
    let spoken = server.run(&["smoke", "--image", IMAGE]).await.ok();
    assert!(spoken.stdout().contains("[PASS] smoke.spawn: sb-"), "{spoken}");
    assert!(spoken.stdout().ends_with("works\n"), "{spoken}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_fake_passes_what_it_imitates_and_no_more() {
    let site = Site::new();
    let server = Server::start_with(&site, |serve| {
        serve.env("STACYVM_PROVIDERS_DEFAULT", "mock").env("STACYVM_AUTH_API_KEY", "key-of-the-test");
    })
    .await;
    let smoke = async |key: &str| {
        let mut command = server.program(&["smoke", "--json"]);
        command.env("STACYVM_API_KEY", key);
        run(command, b"").await
    };
    let page: Value = smoke("key-of-the-test").await.json();
    let warned: Vec<_> = statuses(&page).into_iter().filter(|(_, status)| status != "PASS").collect();
    let skipped = ["smoke.ports", "smoke.preview"].map(|name| (name.to_owned(), "SKIP".to_owned()));
    assert_eq!(warned, skipped, "{page:#}");

    let refused = smoke("wrong").await;
    assert_eq!(refused.status(), Some(1), "{refused}");
    let page: Value = serde_json::from_str(refused.stdout()).expect("JSON");
    let failed: Vec<_> = statuses(&page).into_iter().filter(|(_, status)| status == "FAIL").collect();
    assert_eq!(failed, [("smoke.provider".to_owned(), "FAIL".to_owned())], "{page:#}");
    server.stop(Signal::TERM).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_work_fails_and_says_where_to_look() {
    // Others' runs would show on a server that is shared.
    let server = Server::start(&Site::with_image(), &["--destroy-on-exit"]).await;
    let nobody = server.run(&["smoke", "--url", "http://127.0.0.1:1"]).await;
    assert_eq!(nobody.status(), Some(1), "{nobody}");
    assert!(nobody.stdout().contains("[FAIL] smoke.live: no server answers"), "{nobody}");
    let before = left_of(&server).await;
    let missing = server.run(&["smoke", "--image", "127.0.0.1:1/missing:1"]).await;
    assert_eq!(missing.status(), Some(1), "{missing}");
    assert!(missing.stdout().contains("[FAIL] smoke.spawn: "), "{missing}");
    let unknown = server.run(&["smoke", "--provider", "dokcer"]).await;
    assert!(unknown.stdout().contains("[FAIL] smoke.provider: it is none of oci"), "{unknown}");
    assert_eq!(left_of(&server).await, before);
}

/// Programs of this host: a busybox could serve, whatever it is called.
const MAKE_TINY: &str = r#"
    mkdir -p tiny/bin && cd tiny || exit
    for program in sh cat echo; do
        cp -L /bin/$program bin/ || exit
        for library in $(ldd /bin/$program | grep -o '/[^ ]*'); do
            mkdir -p ".${library%/*}" && cp -L "$library" ".$library" || exit
        done
    done
    printf '#!/bin/sh\necho No module named http.server >&2; exit 1\n' > bin/python3
    chmod 755 bin/python3 && tar -cf ../tiny.tar ."#;

#[tokio::test(flavor = "multi_thread")]
async fn what_a_page_lacks_is_told_apart() {
    let site = Site::with_image();
    let mut make = site.command("sh");
    make.args(["-c", MAKE_TINY]).current_dir(site.home());
    run(make.into(), b"").await.ok();
    site.run(&["image", "import", "tiny.tar", "--name", "tiny:1"]).await.ok();
    let server = Server::start_with(&site, |serve| {
        serve.arg("--destroy-on-exit").env("STACYVM_SERVER_PREVIEW_DOMAIN", "previews.invalid");
    })
    .await;
    let failed = async |image: &str| {
        let ran = server.run(&["smoke", "--json", "--image", image]).await;
        let page: Value = serde_json::from_str(ran.stdout()).expect("JSON");
        let checks = page["checks"].as_array().expect("a list").iter().filter(|check| check["status"] == "FAIL");
        checks.map(|check| (check["name"].clone(), check["message"].clone(), check["fix"].clone())).collect::<Vec<_>>()
    };
    // The server is found, and the names of its previews are not.
    let found = failed(IMAGE).await;
    let [(name, message, fix)] = &found[..] else { panic!("one failure: {found:?}") };
    assert_eq!(name, "smoke.preview");
    assert!(message.as_str().is_some_and(|it| it.contains(".previews.invalid is not found")), "{message}");
    assert!(fix.as_str().is_some_and(|it| it.contains("DNS record *.previews.invalid")), "{fix}");

    let found = failed("tiny:1").await;
    let (_, message, fix) =
        found.iter().find(|(name, ..)| name == "smoke.ports").unwrap_or_else(|| panic!("{found:?}"));
    let said = "the image has /bin/python3, which said: No module named http.server";
    assert!(message.as_str().is_some_and(|it| it.contains(said)), "{message}");
    assert!(fix.as_str().is_some_and(|it| it.contains("python3-minimal")), "{fix}");
    server.stop(Signal::TERM).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_run_leaves_no_sandbox() {
    let site = Site::with_image();
    let server = Server::start(&site, &["--destroy-on-exit"]).await;
    let mut command = server.program(&["smoke", "--image", IMAGE]);
    command.stdout(std::process::Stdio::piped()).kill_on_drop(true);
    let mut smoke = command.spawn().expect("it starts");
    let mut lines = BufReader::new(smoke.stdout.take().expect("a pipe")).lines();
    within("a sandbox is made", async {
        while let Some(line) = lines.next_line().await.expect("readable") {
            if line.starts_with("[PASS] smoke.spawn") {
                return;
            }
        }
        panic!("it ended early");
    })
    .await;
    let pid = i32::try_from(smoke.id().expect("it runs")).ok().and_then(rustix::process::Pid::from_raw);
    rustix::process::kill_process(pid.expect("a process"), Signal::INT).expect("told");
    let rest = within("it says what it did", async {
        let mut rest = String::new();
        while let Some(line) = lines.next_line().await.expect("readable") {
            rest.push_str(&line);
            rest.push('\n');
        }
        rest
    })
    .await;
    let status = within("it ends", smoke.wait()).await.expect("a status");
    assert_eq!(status.code(), Some(1), "{rest}");
    assert!(rest.contains("[FAIL] smoke.run: was interrupted") && rest.contains("[PASS] smoke.clean"), "{rest}");
    eventually("nothing is left", async || left_of(&server).await.is_empty().then_some(())).await;
    server.stop(Signal::TERM).await;
}

/// The script that deployments without this program use.
#[tokio::test(flavor = "multi_thread")]
async fn the_script_asks_four_questions_with_the_variables_first() {
    let site = Site::new();
    let server = Server::start_with(&site, |serve| {
        serve.env("STACYVM_PROVIDERS_DEFAULT", "mock").env("STACYVM_AUTH_API_KEY", "key-of-the-test");
    })
    .await;
    let script = in_repository("scripts/smoke-deployment.sh");
    let smoke = async |arguments: &[&str], variables: &[(&str, &str)]| {
        let mut command = site.command(script.to_str().expect("text"));
        command.args(arguments).envs(variables.iter().copied());
        run(command.into(), b"").await
    };
    let with_slash = format!("{}/", server.url);
    let well = smoke(&[&with_slash, "key-of-the-test"], &[]).await.ok();
    let url = &server.url;
    let expected = format!(
        "Checking {url}/api/v1/live ... ok\nChecking {url}/api/v1/health ... ok\nChecking {url}/api/v1/ready ... ok\n\
         Checking {url}/api/v1/metrics/prometheus ... ok\nStacyVM deployment smoke checks passed for {url}\n"
    );
    assert_eq!(well.stdout(), expected);
    let variables = [("STACYVM_SMOKE_URL", url.as_str()), ("STACYVM_API_KEY", "key-of-the-test")];
    smoke(&["http://127.0.0.1:1", "wrong"], &variables).await.ok();
    let refused = smoke(&[url, "wrong"], &[]).await;
    assert_eq!(refused.status(), Some(1), "{refused}");
    assert!(refused.stdout().ends_with("/api/v1/metrics/prometheus ... failed\n"), "{refused}");
    assert!(
        refused.stderr().contains("stacyvm_uptime_seconds") && refused.stderr().contains("UNAUTHORIZED"),
        "{refused}"
    );
    let nobody = smoke(&["http://127.0.0.1:1"], &[("STACYVM_SMOKE_TIMEOUT", "1")]).await;
    assert!(nobody.status() != Some(0) && nobody.stdout().ends_with("/api/v1/live ... failed\n"), "{nobody}");
    server.stop(Signal::TERM).await;
}
