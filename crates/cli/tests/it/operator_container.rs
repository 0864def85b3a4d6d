//! The container of `deploy/docker`: built as the Dockerfile says, started as
//! the compose file says, and a sandbox in it; and the unit of `deploy/systemd`
//! under the real systemd, which runs in a container here.
//!
//! Two things are different, as no registry is reached: the base images are
//! made here (Debian by debootstrap), and the compiler in the one that builds is
//! a script that hands out the program under test.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Stdio;

use serde_json::Value;
use tokio::sync::OnceCell;

use crate::docker::dockerd::Dockerd;
use crate::support::{Site, eventually, in_repository, run};

const KEY: &str = "0123456789abcdef0123456789abcdef";
const IMAGE: &str = "stacyvm-of-the-test";
const CONTAINER: &str = "stacyvm-of-the-test";

/// What the Dockerfile installs, so that it has nothing to fetch but lists, and
/// what a machine with units has.
const PACKAGES: &str = "ca-certificates,curl,e2fsprogs,iproute2,iptables,nftables,procps,systemd,systemd-sysv";

/// Made once for all tests.
static BASES: OnceCell<Bases> = OnceCell::const_new();

/// Base images, by the names of the Dockerfile.
struct Bases {
    build: String,
    run: String,
}

impl Bases {
    async fn shared(daemon: &Dockerd) -> &'static Self {
        BASES
            .get_or_init(async || {
                let dockerfile = fs::read_to_string(in_repository("deploy/docker/Dockerfile")).expect("the Dockerfile");
                let names = dockerfile.lines().filter_map(|line| line.strip_prefix("FROM ")?.split(' ').next());
                let names: Vec<String> = names.map(str::to_owned).collect();
                let [build, run] = <[String; 2]>::try_from(names).expect("two stages");
                let bases = Self { build, run };
                bases.make(&Site::new(), daemon).await;
                bases
            })
            .await
    }

    async fn make(&self, site: &Site, daemon: &Dockerd) {
        let root = site.home().join("debian");
        let path = root.to_str().expect("text");
        let mut build = tokio::process::Command::from(site.program());
        // A whole distribution: minutes on a loaded machine.
        let made = build.args(["rootfs", "build", "--include", PACKAGES, path]).output().await.expect("it runs");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let import = async |name: &str| {
            let archive = site.home().join("base.tar");
            let mut tar = site.command("tar");
            tar.arg("-cf").arg(&archive).arg("-C").arg(&root).arg(".");
            run(tar.into(), b"").await.ok();
            daemon.import(&archive, name, &[]);
        };
        import(&self.run).await;
        for (file, text) in [("usr/local/bin/rustc", RUSTC), ("usr/local/bin/cargo", CARGO)] {
            fs::write(root.join(file), text).expect("written");
            fs::set_permissions(root.join(file), fs::Permissions::from_mode(0o755)).expect("its mode");
        }
        fs::copy(env!("CARGO_BIN_EXE_stacyvm"), root.join("opt/stacyvm")).expect("copied");
        import(&self.build).await;
    }
}

const RUSTC: &str = "#!/bin/sh\necho host: test-unknown-linux-gnu\n";
const CARGO: &str = "#!/bin/sh\nmkdir -p target/test-unknown-linux-gnu/release\n\
                     cp /opt/stacyvm target/test-unknown-linux-gnu/release/\n";

/// `docker build`, of this repository without what was done in it.
async fn build(site: &Site, daemon: &Dockerd) {
    let mut tar = site.command("tar");
    tar.args(["--exclude=./target", "--exclude=./.git", "--exclude=node_modules", "-C"]);
    tar.arg(in_repository("")).args(["-c", "."]).stdout(Stdio::piped());
    let mut tar = tar.spawn().expect("tar starts");
    let mut build = tokio::process::Command::new("docker");
    // Lists of packages come by this host's network: the daemon has none.
    build.args(["build", "--network", "host", "--tag", IMAGE, "--file", "deploy/docker/Dockerfile", "-"]);
    build.env("DOCKER_HOST", format!("unix://{}", daemon.socket().display()));
    build.env("DOCKER_BUILDKIT", "0").env("DOCKER_CONFIG", daemon.directory().join("client"));
    build.stdin(tar.stdout.take().expect("a pipe"));
    let done = build.output().await.expect("docker starts");
    tar.wait().expect("tar ends");
    let said = format!("{}{}", String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success(), "{said}");
}

/// What a privileged container has, without the one capability that some hosts
/// of tests have not, and that a privileged one cannot be started without.
const NEARLY_PRIVILEGED: [&str; 8] = [
    "--cap-add=ALL",
    "--cap-drop=SYS_RESOURCE",
    "--security-opt=seccomp=unconfined",
    "--security-opt=apparmor=unconfined",
    "--security-opt=systempaths=unconfined",
    "--device-cgroup-rule=a *:* rwm",
    "--device=/dev/net/tun",
    "--device=/dev/fuse",
];

/// `CAP_SYS_RESOURCE` of capability.h.
const SYS_RESOURCE: u64 = 1 << 24;

/// Flags of a container that may do what this host may.
fn rights() -> &'static [&'static str] {
    let status = fs::read_to_string("/proc/self/status").expect("readable");
    let bounds = status.lines().find_map(|line| line.strip_prefix("CapBnd:")).expect("capabilities");
    let bounds = u64::from_str_radix(bounds.trim(), 16).expect("a number");
    if bounds & SYS_RESOURCE == 0 { &NEARLY_PRIVILEGED } else { &["--privileged"] }
}

/// What `docker run` has to be told to do the same as the compose file.
fn flags_of(compose: &str, key: &Path) -> Vec<String> {
    let value = |name: &str| {
        let line = compose.lines().find_map(|line| line.trim().strip_prefix(name)?.strip_prefix(": "));
        line.unwrap_or_else(|| panic!("{name} is not in the compose file")).trim_matches('"').to_owned()
    };
    assert_eq!(value("privileged"), "true");
    let mut flags: Vec<String> = rights().iter().map(|flag| (*flag).to_owned()).collect();
    flags.push(format!("--cgroupns={}", value("cgroup")));
    let secret = value("STACYVM_AUTH_API_KEY_FILE");
    flags.push(format!("--volume={}:{secret}:ro", key.display()));
    let settings = compose.lines().filter_map(|line| line.trim().split_once(": "));
    for (name, value) in settings.filter(|(name, _)| name.starts_with("STACYVM_")) {
        flags.push(format!("--env={name}={}", value.trim_matches('"')));
    }
    flags
}

#[tokio::test(flavor = "multi_thread")]
async fn the_container_is_built_answers_and_runs_a_sandbox() {
    let (site, daemon) = (Site::new(), Dockerd::shared());
    let compose = fs::read_to_string(in_repository("deploy/docker/compose.yaml")).expect("the compose file");
    Bases::shared(daemon).await;
    build(&site, daemon).await;
    let key = site.home().join("api.key");
    fs::write(&key, KEY).expect("written");
    let flags = flags_of(&compose, &key);
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    daemon.docker(&[&["run", "--detach", "--name", CONTAINER][..], &flags, &[IMAGE]].concat());
    let logs = || {
        let ran = daemon.client(&["logs", CONTAINER]);
        format!("{}{}", String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr))
    };
    // By the check that the image has.
    eventually("the container is healthy", async || {
        let state = daemon.docker(&["inspect", "--format", "{{json .State}}", CONTAINER]);
        let state: Value = serde_json::from_str(&state).expect("JSON");
        assert_eq!(state["Running"], true, "{}", logs());
        (state["Health"]["Status"] == "healthy").then_some(())
    })
    .await;
    let inside = |arguments: &[&str]| {
        let variable = format!("STACYVM_API_KEY={KEY}");
        daemon.docker(&[&["exec", "--env", &variable, CONTAINER][..], arguments].concat())
    };
    let health = inside(&["curl", "-fsS", "http://localhost:7423/api/v1/health"]);
    assert!(health.contains(r#""status":"ok""#), "{health}");
    let refused = daemon.client(&["exec", CONTAINER, "stacyvm", "list"]);
    assert!(!refused.status.success(), "a key is needed");
    let said = inside(&["stacyvm", "run", "--image", "host", "--", "sh", "-c", "echo $((6 * 7)); id -u"]);
    assert_eq!(said, "42\n0", "{}", logs());
    daemon.docker(&["stop", "--time", "60", CONTAINER]);
    let ended = daemon.docker(&["inspect", "--format", "{{.State.ExitCode}}", CONTAINER]);
    assert_eq!(ended, "0", "it ends in order: {}", logs());
    daemon.docker(&["rm", "--volumes", CONTAINER]);
}

/// What an operator does with the unit, each step on what it left.
const UNIT: &str = r#"set -eu
answers() { timeout 60 sh -c 'until stacyvm health >/dev/null 2>&1; do sleep 0.1; done'; }
main() { systemctl show --property MainPID --value stacyvm; }
systemctl daemon-reload
systemctl enable --now stacyvm 2>/dev/null
answers
id=$(stacyvm spawn --image host 2>/dev/null)
stacyvm exec "$id" --shell -- 'sleep 4321 >/dev/null 2>&1 &'
before=$(main)
systemctl restart stacyvm
answers
[ "$before" != "$(main)" ] && echo restarted
stacyvm exec "$id" -- echo after the restart
systemctl stop stacyvm
systemctl is-active stacyvm || true
pgrep --full --count '^sleep 4321'
systemctl start stacyvm
answers
kill -KILL "$(main)"
timeout 60 sh -c 'until [ "$(systemctl show --property NRestarts --value stacyvm)" = 1 ]; do sleep 0.1; done'
answers
stacyvm exec "$id" -- echo after the crash
pgrep --full --count '^sleep 4321'
stacyvm kill "$id" >/dev/null
systemctl stop stacyvm
pgrep --full --count '^sleep 4321' || true
systemctl show --property Result --value stacyvm
"#;

/// Flags for all control groups of the host. Where they are several, the place
/// they are in is the container's own: systemd makes it read-only, for everybody
/// who shares it.
fn hierarchies() -> Vec<String> {
    const PLACE: &str = "/sys/fs/cgroup";
    if Path::new(PLACE).join("cgroup.controllers").exists() {
        return vec![format!("--volume={PLACE}:{PLACE}")];
    }
    let entries = fs::read_dir(PLACE).expect("control groups").map(|entry| entry.expect("an entry"));
    let directories = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    let volumes = directories.map(|entry| entry.path()).map(|path| format!("--volume={0}:{0}", path.display()));
    std::iter::once(format!("--tmpfs={PLACE}")).chain(volumes).collect()
}

/// Restarts, stops and crashes end the server alone.
#[tokio::test(flavor = "multi_thread")]
async fn the_unit_does_under_systemd_what_it_promises() {
    const MACHINE: &str = "machine-of-the-test";
    let (site, daemon) = (Site::new(), Dockerd::shared());
    let bases = Bases::shared(daemon).await;
    let machine = ["--cgroupns=host", "--volume=/var/lib/stacyvm", "--tmpfs=/run", "--tmpfs=/run/lock"];
    // systemd makes the groups of its units itself.
    let hierarchies = hierarchies();
    let hierarchies: Vec<&str> = hierarchies.iter().map(String::as_str).collect();
    let machine = [&machine[..], &hierarchies, &["--env=container=docker"]].concat();
    daemon.docker(
        &[&["run", "--detach", "--name", MACHINE][..], rights(), &machine, &[&bases.run, "/sbin/init"]].concat(),
    );
    let config = site.home().join("stacyvm.yaml");
    fs::write(&config, "data_dir: /var/lib/stacyvm\nproviders:\n  default: oci\n").expect("written");
    fs::set_permissions(&config, fs::Permissions::from_mode(0o600)).expect("its mode");
    let unit = in_repository("deploy/systemd/stacyvm.service");
    eventually("systemd runs", async || {
        let state = daemon.client(&["exec", MACHINE, "systemctl", "is-system-running"]);
        matches!(state.stdout.trim_ascii(), b"running" | b"degraded").then_some(())
    })
    .await;
    daemon.docker(&["exec", MACHINE, "mkdir", "-p", "/etc/stacyvm"]);
    for (file, place) in [
        (Path::new(env!("CARGO_BIN_EXE_stacyvm")), "/usr/local/bin/stacyvm"),
        (&unit, "/etc/systemd/system/stacyvm.service"),
        (&config, "/etc/stacyvm/stacyvm.yaml"),
    ] {
        daemon.docker(&["cp", file.to_str().expect("text"), &format!("{MACHINE}:{place}")]);
    }
    let ran = daemon.client(&["exec", MACHINE, "bash", "-c", UNIT]);
    let journal =
        || daemon.docker(&["exec", MACHINE, "journalctl", "--no-pager", "--lines", "50", "--unit", "stacyvm"]);
    let said = String::from_utf8_lossy(&ran.stdout);
    let expected = "restarted\nafter the restart\ninactive\n1\nafter the crash\n1\n0\nsuccess\n";
    assert_eq!(said, expected, "{}\n{}", String::from_utf8_lossy(&ran.stderr), journal());
    daemon.docker(&["rm", "--force", "--volumes", MACHINE]);
}
