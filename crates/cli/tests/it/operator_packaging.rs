//! What a release ships: the service unit, the container, the archive.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use stacyvm_api::ProcessStatus;
use stacyvm_conformance::census_processes;

use crate::support::{Server, Site, create, eventually, in_repository, output, run, script, small};

/// Directives of the unit's service section.
fn unit() -> BTreeMap<String, String> {
    let text = fs::read_to_string(in_repository("deploy/systemd/stacyvm.service")).expect("the unit");
    let (_, service) = text.split_once("[Service]\n").expect("a service section");
    let lines = service.split("\n[").next().unwrap_or_default().lines();
    let pairs = lines.filter(|line| !line.starts_with('#')).filter_map(|line| line.split_once('='));
    pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

#[test]
fn the_unit_leaves_sandboxes_alone_and_has_no_mount_namespace() {
    let unit = unit();
    let value = |name: &str| unit.get(name).map(String::as_str);
    assert_eq!(value("KillMode"), Some("process"));
    assert_eq!(value("Delegate"), Some("yes"));
    assert_eq!(value("OOMPolicy"), Some("continue"));
    assert_eq!(value("RuntimeDirectoryPreserve"), Some("yes"), "uids and addresses are claimed there");
    // Each start would have another one, without what the last one mounted.
    for name in unit.keys() {
        let makes_one = ["Protect", "Private", "ReadOnly", "ReadWrite", "Inaccessible", "Bind", "Mount", "Root"];
        assert!(
            !makes_one.iter().any(|beginning| name.starts_with(beginning)),
            "{name} gives the unit a mount namespace"
        );
    }
    for (name, harm) in [
        ("RestrictNamespaces", "sandboxes are namespaces"),
        ("RestrictSUIDSGID", "images hold such files"),
        ("MemoryDenyWriteExecute", "guests compile"),
    ] {
        assert_eq!(value(name), None, "{harm}");
    }
}

/// systemd itself reads it, and finds nothing unknown or wrong.
#[tokio::test(flavor = "multi_thread")]
async fn systemd_accepts_the_unit() {
    let here = tempfile::tempdir().expect("a directory");
    let text = fs::read_to_string(in_repository("deploy/systemd/stacyvm.service")).expect("the unit");
    let text = text.replace("/usr/local/bin/stacyvm", env!("CARGO_BIN_EXE_stacyvm"));
    let path = here.path().join("stacyvm.service");
    fs::write(&path, text).expect("written");
    let mut analyze = Command::new("systemd-analyze");
    analyze.args(["verify", "--man=no", "--recursive-errors=no"]).arg(&path);
    let ran = run(analyze.into(), b"").await;
    let about_it: Vec<&str> = ran.stderr().lines().filter(|line| line.contains("stacyvm")).collect();
    assert!(about_it.is_empty() && ran.status() == Some(0), "install systemd for this test, or mend the unit: {ran}");
}

/// A control group of the kind that systemd gives a unit.
struct UnitGroup(PathBuf);

impl UnitGroup {
    fn make() -> Self {
        let named = Path::new("/sys/fs/cgroup/systemd");
        let hierarchy = if named.is_dir() { named } else { Path::new("/sys/fs/cgroup") };
        let group = hierarchy.join(format!("stacyvm-unit-{}.service", std::process::id()));
        fs::create_dir(&group).expect("a control group: run these tests as root");
        Self(group)
    }

    fn take(&self, pid: u32) {
        match fs::write(self.0.join("cgroup.procs"), pid.to_string()) {
            // A helper that has done its work meanwhile.
            Err(error) if error.raw_os_error() == Some(Errno::SRCH.raw_os_error()) => {}
            moved => moved.expect("moved"),
        }
    }

    fn members(&self) -> Vec<u32> {
        let text = fs::read_to_string(self.0.join("cgroup.procs")).expect("readable");
        text.lines().filter_map(|line| line.parse().ok()).collect()
    }
}

impl Drop for UnitGroup {
    fn drop(&mut self) {
        for pid in self.members() {
            let parent = self.0.parent().expect("a hierarchy").join("cgroup.procs");
            let _ = fs::write(parent, pid.to_string());
        }
        let _ = fs::remove_dir(&self.0);
    }
}

/// What `systemctl restart` does with this unit, on a host without systemd: the
/// server runs in a group of its own, is ended as `KillMode` says, and started
/// again in the same group.
#[tokio::test(flavor = "multi_thread")]
async fn a_restart_of_the_unit_leaves_sandboxes_and_their_commands_running() {
    let site = Site::with_image();
    let group = UnitGroup::make();
    let start = async || {
        let server = Server::start(&site, &[]).await;
        for pid in census_processes(&site.scope(server.pid())).expect("processes") {
            group.take(pid);
        }
        server
    };
    let server = start().await;
    let made = create(&server.client(), &small()).await;
    let command = made.exec_background(&script("sleep 1234")).await.expect("it starts").exec_id.expect("an id");
    let main = server.pid();
    let others: Vec<u32> = group.members().into_iter().filter(|pid| *pid != main).collect();
    assert!(!others.is_empty(), "the server's helpers and sandboxes are in its group");

    let unit = unit();
    let kill = |pid: u32, signal| {
        let pid = Pid::from_raw(i32::try_from(pid).expect("a pid")).expect("a pid");
        let _ = kill_process(pid, signal);
    };
    match unit["KillMode"].as_str() {
        "process" => {}
        // The default, and `mixed`: what else is in the group goes too.
        _ => others.iter().for_each(|pid| kill(*pid, Signal::KILL)),
    }
    let ended = server.stop(Signal::TERM).await;
    assert!(ended.status.success(), "{ended:?}");

    let server = start().await;
    let sandbox = server.client().sandbox(made.id().clone());
    assert_eq!(output(&sandbox, "echo here").await, "here");
    let log = sandbox.exec_log().await.expect("its log");
    let status = log.iter().find(|row| row.exec_id == command).map(|row| row.status);
    assert_eq!(status, Some(ProcessStatus::Running), "{log:?}");
    sandbox.destroy().await.expect("destroyed");
    eventually("nothing is left", async || site.sandboxes_on_host().is_empty().then_some(())).await;
    assert!(server.stop(Signal::TERM).await.status.success());
}

/// The variables of the compose file are settings, and make a server that may
/// be reached from outside its container.
#[tokio::test(flavor = "multi_thread")]
async fn the_container_is_configured_with_settings_that_exist() {
    let site = Site::new();
    let key = site.home().join("api.key");
    fs::write(&key, "0123456789abcdef0123456789abcdef").expect("a key");
    let compose = fs::read_to_string(in_repository("deploy/docker/compose.yaml")).expect("the compose file");
    let dockerfile = fs::read_to_string(in_repository("deploy/docker/Dockerfile")).expect("the Dockerfile");
    let trimmed = |text: &str| text.trim().trim_matches('"').to_owned();
    let of_compose = compose.lines().filter_map(|line| line.trim().split_once(": "));
    let of_compose = of_compose.filter(|(name, _)| name.starts_with("STACYVM_"));
    let environment = dockerfile.lines().find_map(|line| line.strip_prefix("ENV ")).expect("an environment");
    let of_image = environment.split(' ').filter_map(|pair| pair.split_once('='));
    let mut variables: BTreeMap<String, String> =
        of_image.chain(of_compose).map(|(name, value)| (name.to_owned(), trimmed(value))).collect();
    assert!(variables.len() >= 5, "{variables:?}");
    assert_eq!(variables["STACYVM_SERVER_HOST"], "0.0.0.0");
    variables.insert("STACYVM_AUTH_API_KEY_FILE".to_owned(), key.display().to_string());
    let mut lint = site.program();
    lint.args(["config", "lint", "--json"]).envs(&variables);
    let page: Value = run(lint.into(), b"").await.json();
    let checks = page["checks"].as_array().expect("a list");
    let of = |name: &str| checks.iter().find(|check| check["name"] == name).map(|check| check["status"].clone());
    assert_eq!(of("config"), Some("PASS".into()), "no variable is unknown: {page:#}");
    assert_eq!(of("auth.api_key"), Some("PASS".into()), "{page:#}");
}

/// The compose tool itself reads the file, and finds in it what is meant.
#[tokio::test(flavor = "multi_thread")]
async fn a_compose_tool_accepts_the_compose_file() {
    let here = tempfile::tempdir().expect("a directory");
    let compose = |arguments: &[&str]| {
        let mut compose = Command::new("docker-compose");
        compose.args(arguments);
        run(compose.into(), b"")
    };
    let version = compose(&["version", "--short"]).await.ok();
    let text = fs::read_to_string(in_repository("deploy/docker/compose.yaml")).expect("the compose file");
    // Debian 12 has a version that does not know this key yet.
    let is_old = version.stdout().trim_start_matches('v').starts_with("1.");
    let text = if is_old { text.replace("    cgroup: private\n", "") } else { text };
    let directory = here.path().join("deploy/docker");
    fs::create_dir_all(&directory).expect("made");
    let file = directory.join("compose.yaml");
    fs::write(&file, text).expect("written");
    fs::write(here.path().join("api.key"), "key").expect("written");
    let shown = compose(&["--file", file.to_str().expect("text"), "config"]).await.ok();
    let root = here.path().display();
    for part in [
        format!("context: {root}"),
        format!("file: {root}/api.key"),
        "dockerfile: deploy/docker/Dockerfile".to_owned(),
        "privileged: true".to_owned(),
        "STACYVM_AUTH_API_KEY_FILE: /run/secrets/api_key".to_owned(),
    ] {
        assert!(shown.stdout().lines().any(|line| line.trim() == part), "{part}: {shown}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_release_archive_is_whole_and_says_what_is_in_it() {
    let out = tempfile::tempdir().expect("a directory");
    let mut dist = tokio::process::Command::new(in_repository("scripts/dist.sh"));
    dist.arg(out.path()).arg(env!("CARGO_BIN_EXE_stacyvm"));
    let ran = run(dist, b"").await.ok();
    let archive = PathBuf::from(ran.stdout().trim());
    assert!(archive.is_file(), "{ran}");
    let mut sums = tokio::process::Command::new("sha256sum");
    sums.args(["--check", "--strict", "SHA256SUMS"]).current_dir(out.path());
    run(sums, b"").await.ok();

    let mut list = tokio::process::Command::new("tar");
    list.arg("-tzf").arg(&archive);
    let listed = run(list, b"").await.ok();
    let name = archive.file_name().expect("a name").to_str().expect("text").trim_end_matches(".tar.gz");
    for file in [
        "stacyvm",
        "LICENSE",
        "sbom.cdx.json",
        "man/stacyvm.1",
        "man/stacyvm-certify.1",
        "man/stacyvm-db-backup.1",
        "completions/stacyvm.bash",
        "completions/_stacyvm",
        "completions/stacyvm.fish",
        "deploy/production.yaml",
        "deploy/systemd/stacyvm.service",
        "docs/operations.md",
        "scripts/smoke-deployment.sh",
        "scripts/certify-runtime.sh",
    ] {
        assert!(listed.stdout().lines().any(|line| line == format!("{name}/{file}")), "{file} is not in {listed}");
    }

    let sbom = fs::read(out.path().join(format!("{name}.cdx.json"))).expect("the SBOM");
    let sbom: Value = serde_json::from_slice(&sbom).expect("JSON");
    let components = sbom["components"].as_array().expect("components");
    let component = |name: &str| components.iter().find(|it| it["name"] == name);
    let serde = component("serde").expect("what the program is built from");
    assert!(serde["purl"].as_str().is_some_and(|purl| purl.starts_with("pkg:cargo/serde@1.")), "{serde}");
    assert!(serde["hashes"][0]["content"].as_str().is_some_and(|hash| hash.len() == 64), "{serde}");
    assert!(component("stacyvm-agent").is_some(), "the agent inside is part of the program");
    assert!(component("boon").is_none(), "tests are not");
}
