//! Certification, with the real program on this very host: a runtime that
//! works, and one thing broken at a time.

use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;

use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader, Lines};

use crate::backend::{self, BackendProcess};
use crate::docker::dockerd::Dockerd;
use crate::support::{Ran, Server, Site, control_groups, eventually, in_repository, run};

const KEY: &str = "key-of-the-test";

async fn certify(site: &Arc<Site>, arguments: &[&str], variables: &[(&str, &str)]) -> Ran {
    let mut command = site.program();
    // Nothing of the site's own: a server of the certification's is started.
    command.env_remove("STACYVM_DATA_DIR");
    command.arg("certify").args(arguments).envs(variables.iter().copied());
    let mut command = tokio::process::Command::from(command);
    command.stdin(Stdio::null()).kill_on_drop(true);
    run(command, b"").await
}

fn report(ran: &Ran) -> Value {
    serde_json::from_str(ran.stdout()).unwrap_or_else(|error| panic!("{error}: {ran}"))
}

/// Ids of the rows with a status.
fn with(report: &Value, status: &str) -> Vec<String> {
    let checks = report["checks"].as_array().expect("checks");
    let found = checks.iter().filter(|check| check["status"] == status);
    found.map(|check| check["name"].as_str().expect("an id").to_owned()).collect()
}

fn row<'a>(report: &'a Value, id: &str) -> &'a Value {
    let checks = report["checks"].as_array().expect("checks");
    checks.iter().find(|check| check["name"] == id).unwrap_or_else(|| panic!("{id} is not in {report:#}"))
}

/// The whole of it, for the runtime that this host has.
#[tokio::test(flavor = "multi_thread")]
async fn oci_is_certified_with_evidence_that_verifies() {
    let site = Site::new();
    let image = Site::archive().to_str().expect("text");
    let mut command = site.program();
    command.env_remove("STACYVM_DATA_DIR").args(["certify", "oci", "--image-archive", image]);
    command.args(["--output", "evidence/oci.json", "--samples", "3", "--slo-spawn-p95", "60s"]);
    command.args(["--slo-mem-overhead", "512"]);
    // The contract suite alone takes longer than `run` waits.
    let done = tokio::process::Command::from(command).output().await.expect("it starts");
    let said = format!("{}{}", String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    let text =
        fs::read_to_string(site.home().join("evidence/oci.json")).unwrap_or_else(|error| panic!("{error}: {said}"));
    let found: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!((with(&found, "FAIL"), with(&found, "UNAVAILABLE")), (vec![], vec![]), "{found:#}");
    assert_eq!((done.status.code(), &found["status"]), (Some(0), &"PASS".into()), "{said}");
    assert!(said.contains("certification report written: ") && said.contains("[PASS] OC-R13a: "), "{said}");
    // Nobody ran the test suite for this; all else passed outright.
    let ended = row(&found, "OC-R13b")["message"].as_str().expect("text");
    assert!(ended.contains("it ended by itself"), "{ended}");
    let warned: Vec<String> = with(&found, "WARN").into_iter().filter(|id| !id.starts_with("OC-H")).collect();
    assert_eq!(warned, ["B1"], "{found:#}");
    assert_eq!(row(&found, "B7")["title"], "the contract suite passes on this provider");
    assert!(found["measured"]["spawn_p95_ms"].as_u64().is_some_and(|time| time > 0), "{found:#}");
    assert!(found["measured"]["memory_overhead_kib"].as_u64().is_some_and(|kib| kib > 0), "{found:#}");

    let signoff = found["signoff"].as_object().expect("a sign-off");
    let empty: Vec<&str> = signoff.iter().filter(|(_, value)| *value == "").map(|(name, _)| name.as_str()).collect();
    assert_eq!((signoff.len(), empty), (15, vec!["date", "known_host_caveats", "owner_signoff"]), "{signoff:?}");
    for part in ["lifecycle_conformance", "exec_conformance", "file_conformance", "streaming_conformance"] {
        assert!(signoff[part].as_str().is_some_and(|word| word.starts_with("PASS (")), "{part}: {signoff:?}");
    }

    for name in
        ["conformance.json", "conformance.txt", "smoke.txt", "server.log"].map(|name| format!("oci.json-{name}"))
    {
        assert!(site.home().join("evidence").join(&name).is_file(), "{name} is not beside the report");
    }
    let verify = async || site.run(&["certify", "verify", "evidence/oci.json"]).await;
    verify().await.ok().says("as it was made");
    fs::write(site.home().join("evidence/oci.json-smoke.txt"), "all is well").expect("written");
    verify().await.failed(1).says("oci.json-smoke.txt was changed");
    fs::remove_file(site.home().join("evidence/oci.json-smoke.txt")).expect("removed");
    verify().await.failed(1).says("is missing");
    fs::write(site.home().join("evidence/oci.json"), text.replacen("WARN", "PASS", 1)).expect("written");
    verify().await.failed(1).says("it was changed");
}

/// A run with its contract suite under way.
struct UnderWay {
    site: Arc<Site>,
    scratch: PathBuf,
    process: tokio::process::Child,
    said: Lines<BufReader<tokio::process::ChildStderr>>,
}

impl UnderWay {
    async fn start() -> Self {
        let site = Site::new();
        let scratch = site.home().join("scratch");
        fs::create_dir(&scratch).expect("made");
        let mut command = site.program();
        command.env_remove("STACYVM_DATA_DIR").env("TMPDIR", &scratch);
        command.args(["certify", "oci", "--output", "evidence/oci.md", "--image-archive"]).arg(Site::archive());
        let mut command = tokio::process::Command::from(command);
        command.process_group(0).kill_on_drop(true).stdin(Stdio::null()).stderr(Stdio::piped());
        let mut process = command.spawn().expect("it starts");
        let mut said = BufReader::new(process.stderr.take().expect("piped")).lines();
        // The contract suite is next, with sandboxes.
        while let Some(line) = said.next_line().await.expect("text") {
            if line.contains("B6: ") {
                break;
            }
        }
        let run = Self { site, scratch, process, said };
        let [home] = &run.made()[..] else { panic!("one directory: {:?}", run.made()) };
        let sandboxes = home.join("data/oci/sandboxes");
        eventually("the suite has a sandbox", async || fs::read_dir(&sandboxes).ok()?.next()).await.expect("an entry");
        run
    }

    fn made(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.scratch).expect("readable");
        entries.map(|entry| entry.expect("an entry").path()).collect()
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.process.id().expect("it runs")).expect("an id")).expect("an id")
    }
}

/// Ctrl-C in a terminal, which every process of the group hears of.
#[tokio::test(flavor = "multi_thread")]
async fn what_an_interrupted_run_has_made_is_gone() {
    let mut run = UnderWay::start().await;
    kill_process_group(run.pid(), Signal::INT).expect("told");
    let mut rest = String::new();
    run.said.get_mut().read_to_string(&mut rest).await.expect("text");
    let status = run.process.wait().await.expect("it ends");
    assert_eq!(status.code(), Some(1), "{rest}");
    assert!(rest.contains("[FAIL] B7: ") && rest.contains("[PASS] B8: ") && rest.contains("interrupted"), "{rest}");
    assert_eq!(run.made(), Vec::<PathBuf>::new(), "{rest}");
    assert!(!run.site.home().join("evidence").exists(), "a part is no report");
}

/// Nobody is left to clean up but the server itself.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_run_has_made_is_gone() {
    let mut run = UnderWay::start().await;
    let groups = format!("stacyvm-certify-{}", run.pid().as_raw_nonzero());
    assert!(!control_groups(&groups).is_empty(), "its sandboxes have groups");
    run.process.kill().await.expect("killed");
    nothing_is_left_in(&run.scratch).await;
    assert_eq!(control_groups(&groups), Vec::<PathBuf>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_contract_suite_has_made_is_gone() {
    let site = Site::new();
    let scratch = site.home().join("scratch");
    fs::create_dir(&scratch).expect("made");
    let mut command = site.program();
    command.env_remove("STACYVM_DATA_DIR").env("TMPDIR", &scratch).stdin(Stdio::null()).stdout(Stdio::null());
    let mut run = command.args(["conformance", "--provider", "oci", "--image", "host"]).spawn().expect("it starts");
    let sandbox = async || {
        let home = fs::read_dir(&scratch).ok()?.flatten().next()?.path();
        fs::read_dir(home.join("oci/sandboxes")).ok()?.next()
    };
    eventually("it has a sandbox", sandbox).await.expect("an entry");
    run.kill().expect("killed");
    run.wait().expect("it ends");
    nothing_is_left_in(&scratch).await;
    assert_eq!(site.remains(), Vec::<String>::new());
}

/// No file, and no process that was told of the directory.
async fn nothing_is_left_in(scratch: &Path) {
    let path = scratch.as_os_str().as_bytes();
    let knows = |entry: &fs::DirEntry| {
        let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
        environment.windows(path.len()).any(|part| part == path)
    };
    let is_left = async || {
        let processes = fs::read_dir("/proc").expect("readable").flatten().filter(knows).count();
        let files = fs::read_dir(scratch).expect("readable").count();
        ((processes, files) == (0, 0)).then_some(())
    };
    eventually("nothing is left of what was killed", is_left).await;
}

/// What this version has no provider for: the host is looked at, the rest is
/// said to be unavailable, and nothing passes as a whole.
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_run_is_never_a_pass() {
    let site = Site::new();
    for target in ["firecracker", "qemu", "e2b"] {
        let ran = certify(&site, &[target, "--json"], &[]).await;
        let found = report(&ran);
        assert_eq!((ran.status(), &found["status"]), (Some(1), &"FAIL".into()), "{target}: {found:#}");
        let runtime = found["checks"].as_array().expect("checks").iter().filter(|check| {
            let name = check["name"].as_str().unwrap_or_default();
            name.starts_with('B') || name.contains("-R")
        });
        for check in runtime {
            assert_eq!(check["status"], "UNAVAILABLE", "{target}: {check}");
            assert!(check["message"].as_str().is_some_and(|it| it.contains("no provider")), "{check}");
        }
    }
}

/// Exactly the row that is about it changes, and says what to do.
#[tokio::test(flavor = "multi_thread")]
async fn one_thing_that_is_broken_fails_one_row() {
    let site = Site::new();
    // Of the host alone: a server with what is broken does not start either.
    let failed = async |target: &str, variables: &[(&str, &str)]| {
        let arguments = [target, "--json", "--stacyvm-url", "http://127.0.0.1:1"];
        let found = report(&certify(&site, &arguments, variables).await);
        let failed = with(&found, "FAIL");
        for id in &failed {
            assert!(row(&found, id)["fix"].as_str().is_some_and(|fix| !fix.is_empty()), "{id}: {found:#}");
        }
        failed
    };
    let home = site.home().to_owned();
    let path = |name: &str| home.join(name).display().to_string();
    fs::write(path("vmlinux"), "a kernel").expect("written");
    for directory in ["rootfs/usr/bin", "workspaces"] {
        fs::create_dir_all(path(directory)).expect("made");
    }
    for language in ["python3", "node", "bash"] {
        fs::write(Path::new(&path("rootfs/usr/bin")).join(language), "").expect("written");
    }
    let difference = |broken: Vec<String>, whole: &[String]| -> Vec<String> {
        broken.into_iter().filter(|id| !whole.contains(id)).collect()
    };

    let (kernel, none) = (path("vmlinux"), path("missing"));
    let whole = failed("firecracker", &[("STACYVM_FIRECRACKER_KERNEL", &kernel)]).await;
    assert!(!whole.iter().any(|id| id == "FC-H3"), "{whole:?}");
    let broken = failed("firecracker", &[("STACYVM_FIRECRACKER_KERNEL", &none)]).await;
    assert_eq!(difference(broken, &whole), ["FC-H3"]);

    let agent = ("STACYVM_PROVIDERS_FIRECRACKER_AGENT_PATH", none.as_str());
    let broken = failed("firecracker", &[("STACYVM_FIRECRACKER_KERNEL", &kernel), agent]).await;
    assert_eq!(difference(broken, &whole), ["FC-H5"]);

    let (rootfs, workspaces) = (path("rootfs"), path("workspaces"));
    let proot = async |rootfs: &str, workspaces: &str| {
        failed("proot", &[("STACYVM_PROOT_ROOTFS", rootfs), ("STACYVM_PROOT_WORKSPACE_BASE", workspaces)]).await
    };
    let whole = proot(&rootfs, &workspaces).await;
    // Not even root can write there.
    assert_eq!(difference(proot(&rootfs, "/proc").await, &whole), ["PR-H3"]);
    assert_eq!(difference(proot(&none, &workspaces).await, &whole), ["PR-H2", "PR-H4"]);
    fs::remove_file(Path::new(&rootfs).join("usr/bin/node")).expect("removed");
    assert_eq!(difference(proot(&rootfs, &workspaces).await, &whole), ["PR-H4"]);
}

/// Each row of the host is about one thing; without the backend no server
/// starts, and nothing behind it is ever a pass.
#[tokio::test(flavor = "multi_thread")]
async fn every_row_of_a_backend_that_cannot_be_used_is_known() {
    let site = Site::new();
    let open = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let open = format!("http://{}", open.local_addr().expect("its address"));
    let config = site.home().join("stacyvm.yaml");
    let key_in_file = "providers:\n  custom:\n    api_key: secret\n";
    let table = [
        ("a dead host", "http://127.0.0.1:1", None, ["FAIL", "PASS", "WARN"]),
        ("no address", "nonsense", None, ["FAIL", "PASS", "FAIL"]),
        ("a key in the file", open.as_str(), Some(key_in_file), ["PASS", "FAIL", "WARN"]),
    ];
    for (what, url, file, of_host) in table {
        let mut variables = vec![("STACYVM_PROVIDERS_CUSTOM_BASE_URL", url)];
        match file {
            Some(text) => fs::write(&config, text).expect("written"),
            None => variables.push(("STACYVM_PROVIDERS_CUSTOM_API_KEY", "secret")),
        }
        let found = report(&certify(&site, &["custom", "--json"], &variables).await);
        let rows: Vec<(&str, &str)> = found["checks"]
            .as_array()
            .expect("checks")
            .iter()
            .map(|check| (check["name"].as_str().expect("an id"), check["status"].as_str().expect("a status")))
            .collect();
        let behind =
            ["B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "EX-R1", "EX-R2", "EX-R3", "EX-R13a", "EX-R14", "M1"];
        let expected: Vec<(&str, &str)> = ["EX-H1", "EX-H2", "EX-H3"]
            .into_iter()
            .zip(of_host)
            .chain([("B0", "FAIL")])
            .chain(behind.map(|id| (id, "UNAVAILABLE")))
            .collect();
        assert_eq!(rows, expected, "{what}: {found:#}");
        assert_eq!(found["status"], "FAIL", "{what}");
        for (id, _) in rows.iter().filter(|(_, status)| *status == "FAIL") {
            assert!(row(&found, id)["fix"].as_str().is_some_and(|fix| !fix.is_empty()), "{what}, {id}: {found:#}");
        }
    }
}

/// A certification whose contract suite alone takes longer than `run` waits.
async fn certify_whole(site: &Arc<Site>, arguments: &[&str], variables: &[(&str, &str)]) -> (Value, Option<i32>) {
    let mut command = site.program();
    command.env_remove("STACYVM_DATA_DIR").arg("certify").args(arguments).arg("--json").envs(variables.iter().copied());
    let done = tokio::process::Command::from(command).output().await.expect("it starts");
    let found = serde_json::from_slice(&done.stdout);
    (found.unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&done.stderr))), done.status.code())
}

/// A backend that works is certified, with faults that are injected; the same
/// one with a key that is not its own fails where keys are spoken of.
#[tokio::test(flavor = "multi_thread")]
async fn a_backend_is_certified_with_injected_faults() {
    let backend_site = Site::with_image();
    let backend = BackendProcess::start(&backend_site, &[]).await;
    let site = Site::new();
    let with_key =
        |key| [("STACYVM_PROVIDERS_CUSTOM_BASE_URL", backend.url.as_str()), ("STACYVM_PROVIDERS_CUSTOM_API_KEY", key)];
    let (found, status) = certify_whole(&site, &["custom", "--samples", "1"], &with_key(backend::KEY)).await;
    assert_eq!((with(&found, "FAIL"), with(&found, "UNAVAILABLE"), status), (vec![], vec![], Some(0)), "{found:#}");
    // Plain HTTP, no result of the test suite, no limits to hold against.
    assert_eq!(with(&found, "WARN"), ["EX-H3", "B1", "M1"], "{found:#}");
    let evidence = |id: &str| row(&found, id)["evidence"].as_array().expect("evidence").clone();
    assert_eq!(evidence("EX-R1").len(), 2, "{found:#}");
    assert_eq!(evidence("EX-R3").len(), 30, "ten failures at three calls: {found:#}");
    let signoff = &found["signoff"];
    assert_eq!((&signoff["live_preview"], &signoff["restart_reconciliation"]), (&"PASS".into(), &"PASS".into()));

    let (found, status) = certify_whole(&site, &["custom", "--samples", "1"], &with_key("not-the-key")).await;
    assert_eq!((with(&found, "FAIL"), status), (vec!["B0".to_owned()], Some(1)), "{found:#}");
    let said = row(&found, "B0")["message"].as_str().expect("text");
    assert!(said.contains("refuses the key") && !found.to_string().contains("not-the-key"), "{found:#}");
    drop(backend);
    assert_eq!(backend_site.remains(), Vec::<String>::new());
}

/// PRoot in a root of its own, with the limits and the language that it has;
/// one that it has not fails the two rows that are about it.
#[tokio::test(flavor = "multi_thread")]
async fn proot_is_certified_in_its_own_root() {
    let site = Site::with_image();
    let rootfs = site.home().join("rootfs").display().to_string();
    site.run(&["rootfs", "build", "--image", "alpine:latest", &rootfs]).await.ok();
    // A language, as far as this row knows one.
    let program = Path::new(&rootfs).join("bin/lingua");
    fs::write(&program, "#!/bin/sh\necho lingua 1.0\n").expect("written");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("its mode");
    let base = site.home().join("workspaces");
    fs::create_dir(&base).expect("made");
    let with_language = |language| {
        [
            ("STACYVM_PROOT_ROOTFS", rootfs.as_str()),
            ("STACYVM_PROOT_WORKSPACE_BASE", base.to_str().expect("text")),
            ("STACYVM_PROVIDERS_PROOT_LANGUAGES", language),
        ]
    };
    let (found, status) = certify_whole(&site, &["proot", "--samples", "1"], &with_language("lingua")).await;
    assert_eq!((with(&found, "FAIL"), with(&found, "UNAVAILABLE"), status), (vec![], vec![], Some(0)), "{found:#}");
    let caps = row(&found, "PR-R3");
    assert!(caps["message"].as_str().is_some_and(|it| it.contains("operational controls")), "{caps:#}");
    assert_eq!(caps["evidence"].as_array().map(Vec::len), Some(2), "{caps:#}");
    assert_eq!(fs::read_dir(&base).expect("readable").count(), 0, "nothing of the run is left in the base");
}

/// A server that is not there, a wrong key, and a server without the runtime.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_refuses_is_told_from_one_that_is_not_there() {
    let site = Site::new();
    let server = Server::start_with(&site, |serve| {
        serve.env("STACYVM_PROVIDERS_DEFAULT", "mock").env("STACYVM_AUTH_API_KEY", KEY);
        serve.env("STACYVM_PROVIDERS_OCI_ENABLED", "false");
    })
    .await;
    let ask = async |url: &str, key: &str| {
        let arguments = ["oci", "--json", "--samples", "1", "--stacyvm-url", url, "--stacyvm-api-key", key];
        report(&certify(&site, &arguments, &[]).await)
    };
    let dead = ask("http://127.0.0.1:1", KEY).await;
    assert_eq!(with(&dead, "FAIL"), ["B0"], "{dead:#}");
    assert!(row(&dead, "OC-R2")["message"].as_str().is_some_and(|it| it.contains("no server")), "{dead:#}");

    let wrong = ask(&server.url, "wrong").await;
    assert_eq!((&row(&wrong, "B0")["status"], &row(&wrong, "B3")["status"]), (&"PASS".into(), &"FAIL".into()));
    assert!(
        row(&wrong, "B3")["fix"].as_str().is_some_and(|fix| fix.contains("it is wrong, or it was revoked")),
        "{wrong:#}"
    );

    // Ready with another provider proves nothing about this one.
    let without = ask(&server.url, KEY).await;
    for id in ["B3", "B4", "OC-R1", "OC-R2", "B6", "B7"] {
        assert_eq!(row(&without, id)["status"], "FAIL", "{id}: {without:#}");
    }
    assert_eq!(row(&without, "B2")["status"], "PASS", "the server itself is well");
    assert_eq!(row(&without, "OC-R13b")["status"], "UNAVAILABLE", "it is not ours to break");
    assert_eq!(without["status"], "FAIL");
    server.stop(Signal::TERM).await;
}

/// A daemon of which one thing at a time is taken away: exactly the rows that
/// are about it fail, and each says what to do. No server is asked (B0).
#[tokio::test(flavor = "multi_thread")]
async fn one_thing_that_a_daemon_lacks_fails_its_rows() {
    let (site, daemon) = (Site::new(), Dockerd::start());
    let address = format!("unix://{}", daemon.socket().display());
    let failed = async |target: &str, network: &str| {
        let variables = [("DOCKER_HOST", address.as_str()), ("STACYVM_PROVIDERS_DOCKER_NETWORK_MODE", network)];
        let found =
            report(&certify(&site, &[target, "--json", "--stacyvm-url", "http://127.0.0.1:1"], &variables).await);
        assert_eq!(found["status"], "FAIL");
        let failed = with(&found, "FAIL");
        for id in &failed {
            assert!(row(&found, id)["fix"].as_str().is_some_and(|fix| !fix.is_empty()), "{id}: {found:#}");
        }
        (failed.into_iter().filter(|id| id != "B0").collect::<Vec<_>>(), found)
    };
    let fix = |found: &Value, id: &str| row(found, id)["fix"].as_str().expect("a fix").to_owned();
    for target in ["docker", "gvisor"] {
        let (whole, found) = failed(target, "none").await;
        assert_eq!(whole, Vec::<String>::new(), "{target}: {found:#}");
    }
    let (lacks, found) = failed("docker", "no-such-network").await;
    assert_eq!(
        (&lacks[..], fix(&found, "DK-H3").as_str()),
        (&["DK-H3".to_owned()][..], "docker network create no-such-network")
    );

    let file = daemon.directory().join("daemon.json");
    let mut settings: Value = serde_json::from_slice(&fs::read(&file).expect("readable")).expect("JSON");
    let removed = settings["runtimes"].as_object_mut().expect("runtimes");
    removed.retain(|name, _| !name.contains("runsc") && !name.contains("gvisor"));
    fs::write(&file, settings.to_string()).expect("written");
    daemon.kill();
    daemon.restart();
    let (lacks, found) = failed("gvisor", "none").await;
    assert_eq!(lacks, ["GV-H1", "GV-H2", "GV-V1"], "{found:#}");
    assert!(fix(&found, "GV-H1").contains("runsc install"), "{found:#}");
    let (lacks, found) = failed("docker", "none").await;
    assert_eq!(lacks, Vec::<String>::new(), "runc is still there: {found:#}");

    daemon.kill();
    for (target, rows) in [
        ("docker", &["DK-H1", "DK-H2"][..]),
        ("gvisor", &["DK-H1", "DK-H2", "GV-H2", "GV-V1"]),
        ("kata", &["DK-H1", "DK-H2", "KT-H3", "KT-V1"]),
    ] {
        let (lacks, found) = failed(target, "none").await;
        assert_eq!(lacks, rows, "{target}: {found:#}");
        assert!(fix(&found, "DK-H2").contains("start the daemon"), "{found:#}");
    }
}

/// Before anything is looked at.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_not_there_is_a_wrong_argument() {
    let site = Site::new();
    for option in ["--image-archive", "--test-result", "--stacyvm-bin", "--config"] {
        let ran = certify(&site, &["oci", option, "missing"], &[]).await;
        assert_eq!(ran.status(), Some(2), "{ran}");
        ran.says(option).says("there is no file missing");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_script_takes_the_published_arguments() {
    let site = Site::new();
    let script = in_repository("scripts/certify-runtime.sh");
    let ask = async |arguments: &[&str]| {
        let mut command = site.command(script.to_str().expect("text"));
        command.env_remove("STACYVM_DATA_DIR").args(arguments);
        run(command.into(), b"").await
    };
    let bin = env!("CARGO_BIN_EXE_stacyvm");
    let help = ask(&["--help"]).await.ok();
    assert!(help.stdout().contains("--stacyvm-url URL"), "{help}");
    assert_eq!(ask(&["--stacyvm-bin", bin, "docker", "--format", "xml"]).await.status(), Some(2));
    assert_eq!(ask(&["--stacyvm-bin", bin, "--colour"]).await.status(), Some(2));
    assert_eq!(ask(&["vmware", "--stacyvm-bin", bin]).await.status(), Some(2));
    let ran = ask(&["proot", "--format", "markdown", "--output", "proot-certification.md", "--stacyvm-bin", bin]).await;
    assert_eq!(ran.status(), Some(1), "{ran}");
    assert!(ran.stdout().starts_with("certification report written: "), "{ran}");
    let text = fs::read_to_string(site.home().join("proot-certification.md")).expect("the report");
    for part in
        ["StacyVM Runtime Certification", "## Checks", "## Operator Signoff", "not of the grade of a virtual machine"]
    {
        assert!(text.contains(part), "{part} is not in {text}");
    }
}
