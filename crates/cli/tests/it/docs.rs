//! The shell blocks of the pages that a newcomer reads run as they stand.
//!
//! Two things are different here, and said to bash as aliases of the text: the
//! address of the server, and the image that would come from a registry. Lines
//! that cannot run in a test are listed with the reason; one that is no longer
//! on a page fails. That `docs/cli.md` and `docs/configuration.md` say what the
//! program says is held beside the code that writes them, and `docs/api.md` runs
//! in `crates/server/tests/it/docs.rs`.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::PathBuf;
use std::sync::Arc;

use crate::docker;
use crate::docker::dockerd::Dockerd;
use crate::support::{IMAGE, Ran, Registry, Server, Site, in_repository, run};

/// Where the pages say that the server is.
const DOCUMENTED_SERVER: &str = "127.0.0.1:7423";
/// An image that these pages take from Docker Hub.
const DOCUMENTED_IMAGE: &str = "python:3.12";

/// Lines that are tested elsewhere, by their beginning.
const ELSEWHERE: [(&str, &str); 11] = [
    ("make ", "builds the release program; `.ci/run` and serve.rs"),
    ("install target/", "installs it"),
    ("stacyvm serve", "needs a terminal of its own; serve.rs"),
    ("STACYVM_PROVIDERS_DEFAULT=docker stacyvm serve", "the server of the test; docker/everyday.rs"),
    ("stacyvm shell", "needs a terminal; commands/terminal.rs"),
    ("stacyvm events", "follows until Ctrl-C; commands/sandboxes.rs"),
    ("export STACYVM_URL=http://vm.example.com", "a machine that does not exist"),
    ("stacyvm certify oci", "takes minutes; operator_certify.rs"),
    ("sudo apt-get install proot", "scripts/setup.sh installs it"),
    ("sudo stacyvm rootfs build", "takes minutes; operator_container.rs"),
    ("sudo STACYVM_PROVIDERS_DEFAULT=proot stacyvm serve", "the server of the block before"),
];

/// The section of the first page that needs a server of its own.
const FOR_OTHERS: &str = "A server for others";

/// `docker save`, on a machine that has the image; all else is docker's own.
const DOCKER: &str = "#!/bin/sh\n[ \"$1\" = save ] && exec cat alpine.tar\n\
                      PATH=/usr/local/bin:/usr/bin:/bin exec docker \"$@\"\n";

struct Page {
    name: &'static str,
    text: String,
}

impl Page {
    fn open(name: &'static str) -> Self {
        Self { name, text: fs::read_to_string(in_repository(name)).expect("the page") }
    }

    /// One section of it.
    fn section(self, title: &str) -> Self {
        let (_, rest) = self.text.split_once(&format!("\n## {title}\n")).expect("the section");
        Self { name: self.name, text: rest.split("\n## ").next().unwrap_or_default().to_owned() }
    }

    /// All but one section of it.
    fn without(self, title: &str) -> Self {
        let heading = format!("\n## {title}\n");
        let (before, rest) = self.text.split_once(&heading).expect("the section");
        let after = rest.split_once("\n## ").map(|(_, after)| after).unwrap_or_default();
        Self { name: self.name, text: format!("{before}\n## {after}") }
    }

    /// Its shell blocks as one script, without what is tested elsewhere.
    fn script(&self) -> String {
        let blocks = self.text.split("```sh\n").skip(1).filter_map(|rest| rest.split("```").next());
        let lines: Vec<&str> = blocks.flat_map(str::lines).collect();
        assert!(lines.len() > 1, "{} has no examples", self.name);
        let runs = |line: &&str| !ELSEWHERE.iter().any(|(beginning, _)| line.starts_with(beginning));
        lines.into_iter().filter(runs).flat_map(|line| [line, "\n"]).collect()
    }
}

/// Writes down what it is told. What the unit does is operator_packaging.rs.
const SYSTEMCTL: &str = "#!/bin/sh\necho systemctl \"$@\"\n";

/// Has `/etc` and `/usr/local` as they are, and whatever is changed there is
/// gone with the shell.
const OWN_ETC: &str = "mount -t tmpfs tmpfs /mnt\n\
    for dir in etc usr/local; do\n\
    mkdir -p /mnt/$dir/upper /mnt/$dir/work\n\
    mount -t overlay overlay -o lowerdir=/$dir,upperdir=/mnt/$dir/upper,workdir=/mnt/$dir/work /$dir\n\
    done\n";

/// Runs a script where `stacyvm`, `docker` and the files of the examples are.
async fn run_script(site: &Site, url: &str, script: &str) -> Ran {
    let here = tempfile::tempdir_in(site.home()).expect("a directory");
    let path = |name: &str| here.path().join(name);
    fs::create_dir_all(path("bin")).expect("made");
    fs::create_dir_all(path("project")).expect("made");
    symlink(env!("CARGO_BIN_EXE_stacyvm"), path("bin/stacyvm")).expect("a link");
    symlink(in_repository("deploy").canonicalize().expect("there"), path("deploy")).expect("a link");
    symlink(in_repository("scripts").canonicalize().expect("there"), path("scripts")).expect("a link");
    symlink(in_repository("examples").canonicalize().expect("there"), path("examples")).expect("a link");
    for (name, text) in [("bin/docker", DOCKER), ("bin/systemctl", SYSTEMCTL)] {
        fs::write(path(name), text).expect("written");
        fs::set_permissions(path(name), fs::Permissions::from_mode(0o755)).expect("its mode");
    }
    fs::copy(Site::archive(), path("alpine.tar")).expect("copied");
    fs::write(path("project/main.py"), "print('the project ran')\n").expect("written");
    fs::write(path("job.py"), "print('the job ran')\n").expect("written");
    // Mounts of a script are its own.
    let mut bash = site.command("unshare");
    bash.args(["--mount", "bash", "-c", &format!("set -euxo pipefail\n{script}")]).current_dir(here.path());
    let bin: PathBuf = path("bin");
    bash.env("PATH", format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", bin.display())).env("STACYVM_URL", url);
    run(bash.into(), b"").await.ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_readme_runs() {
    let server = Server::shared().await;
    let script = Page::open("README.md").section("Use it").script();
    let script = script.replace(DOCUMENTED_IMAGE, "host").replace("localhost:7423", &server.url);
    let ran = run_script(&server.site, &server.url, &script).await;
    let lines: Vec<&str> = ran.stdout().lines().collect();
    assert_eq!(lines[..2], ["42", "the project ran"], "{ran}");
    assert!(lines[3].contains("\"image\":\"host\"") && lines[3].contains("\"state\":\"running\""), "{ran}");
}

#[tokio::test(flavor = "multi_thread")]
async fn getting_started_runs() {
    let server = Server::start(&Site::with_image(), &["--destroy-on-exit"]).await;
    let page = Page::open("docs/getting-started.md").without(FOR_OTHERS);
    let script = page.script().replace(DOCUMENTED_IMAGE, "host");
    let ran = run_script(&server.site, &server.url, &script).await;
    assert!(ran.stdout().contains("hello from sb-") && ran.stdout().contains("Python 3."), "{ran}");
    assert_eq!(ran.stdout().matches("the job ran").count(), 2, "{ran}");
    assert!(ran.stdout().contains("docker.io/library/alpine:latest") && ran.stdout().contains("ready, "), "{ran}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_for_others_runs() {
    let site = Site::new();
    let script = Page::open("docs/getting-started.md").section(FOR_OTHERS).script();
    let (first, others) = script.split_once('\n').expect("lines");
    // The server is stopped while its first key is made.
    let first = first.replace("./data", site.data_dir().to_str().expect("text"));
    let made = run_script(&site, "http://127.0.0.1:1", &first).await;
    let key = made.stdout().trim_end();
    let server = Server::start(&site, &[]).await;
    let ran = run_script(&site, &server.url, &format!("export STACYVM_API_KEY={key}\n{others}")).await;
    assert!(ran.stdout().contains("alice@example.com") && ran.stdout().contains("revoked ci\n"), "{ran}");
    server.run(&["list"]).await.failed(1).says("a valid API key is required");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_about_images_runs() {
    let (site, registry) = (Site::new(), Registry::start());
    let script = Page::open("docs/images.md").script();
    // What Docker Hub has, the registry here has too.
    site.run(&["image", "import", Site::archive().to_str().expect("text")]).await.ok();
    let layout = site.home().join("layout.tar");
    site.run(&["image", "export", IMAGE, layout.to_str().expect("text")]).await.ok();
    let unpacked = site.home().join("layout");
    fs::create_dir(&unpacked).expect("made");
    let mut tar = site.command("tar");
    tar.arg("-xf").arg(&layout).arg("-C").arg(&unpacked);
    run(tar.into(), b"").await.ok();
    let name = registry.push(&unpacked, "library/python", "3.12").await;
    let ran = run_script(&site, "http://127.0.0.1:1", &script.replace(DOCUMENTED_IMAGE, &name)).await;
    assert!(ran.stdout().contains(&format!("removed {name}")), "{ran}");
    assert!(ran.stdout().contains(&format!("exported {name}")), "{ran}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_about_previews_runs() {
    let server = Server::shared().await;
    let (_, port) = server.url.rsplit_once(':').expect("a port");
    let script = Page::open("docs/preview.md").script().replace("7423", port);
    let ran = run_script(&server.site, &server.url, &script).await;
    assert!(
        ran.stdout().contains(&format!(".localhost:{port}/")) && ran.stdout().contains("Directory listing"),
        "{ran}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_about_the_contract_suite_runs() {
    // A provider is driven in a data directory that no server uses.
    let (server, other): (Arc<Server>, Arc<Site>) = (Server::shared().await, Site::with_image());
    let script = Page::open("docs/conformance.md").script();
    let script = script.replace(&format!("http://{DOCUMENTED_SERVER}"), &server.url);
    // The whole of it is what `.ci/run` runs.
    let briefly = |line: &str| match line.split_once(" > ") {
        Some((suite, file)) => format!("{suite} --only C0 > {file}\n"),
        None => format!("{line} --only C0\n"),
    };
    let is_suite = |line: &str| line.starts_with("stacyvm conformance");
    let script: String =
        script.lines().map(|line| if is_suite(line) { briefly(line) } else { format!("{line}\n") }).collect();
    let ran = run_script(&other, &server.url, &(script + "cat report.xml\n")).await;
    assert!(ran.stdout().matches("PASS C01").count() >= 3 && ran.stdout().contains("<testsuite"), "{ran}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_about_docker_runs() {
    let (site, other, daemon) = (Site::new(), Site::new(), Dockerd::shared());
    let server = docker::start(&site, daemon, &[]).await;
    let script = Page::open("docs/docker.md").script();
    // The whole of it is what the tests of the provider run.
    let script =
        script.replace("stacyvm conformance --provider docker", "stacyvm conformance --only C0 --provider docker");
    let script = format!("export DOCKER_HOST=unix://{}\n{script}", daemon.socket().display());
    let ran = run_script(&other, &server.url, &script).await;
    for part in ["docker.runtime", "\n42\n", "stacyvm-network true", "PASS C01"] {
        assert!(ran.stdout().contains(part), "{part}: {ran}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pages_for_operators_run() {
    let server = Server::shared().await;
    let operations = Page::open("docs/operations.md").without("Install").without("Backup and restore");
    for page in [operations, Page::open("docs/troubleshooting.md")] {
        let ran = run_script(&server.site, &server.url, &page.script()).await;
        assert!(ran.stdout().contains("works\n"), "{}: {ran}", page.name);
    }
}

/// From the archive that `make dist` makes to a configuration that passes.
#[tokio::test(flavor = "multi_thread")]
async fn an_installation_by_the_page_for_operators_is_whole() {
    let site = Site::new();
    let archives = site.home().join("dist");
    let mut dist = tokio::process::Command::new(in_repository("scripts/dist.sh"));
    dist.arg(&archives).arg(env!("CARGO_BIN_EXE_stacyvm"));
    run(dist, b"").await.ok();
    let script = Page::open("docs/operations.md").section("Install").script();
    let script = format!(
        "{OWN_ETC}unset ${{!STACYVM_@}}\ncp {}/* .\n{script}\
         /usr/local/bin/stacyvm --version\n\
         ls /usr/local/share/man/man1/stacyvm-serve.1 /etc/systemd/system/stacyvm.service\n\
         stat -c %a /etc/stacyvm/stacyvm.yaml /etc/stacyvm/api.key\n",
        archives.display()
    );
    let ran = run_script(&site, "http://127.0.0.1:1", &script).await;
    for part in ["systemctl enable --now stacyvm\n", "\nstacyvm ", "/man1/stacyvm-serve.1\n", "\n600\n600\n"] {
        assert!(ran.stdout().contains(part), "{part}: {ran}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn backup_and_restore_by_the_page_for_operators_work() {
    let site = Site::new();
    // There has to be a store, and nobody who holds it.
    let server = Server::start(&site, &[]).await;
    server.stop(rustix::process::Signal::TERM).await;
    let script = Page::open("docs/operations.md").section("Backup and restore").script();
    let ran = run_script(&site, "http://127.0.0.1:1", &script).await;
    assert!(ran.stdout().contains("systemctl stop stacyvm\n") && ran.stdout().contains("restored"), "{ran}");
}

/// What a page has run in a terminal of its own: begun by [`started`], ended
/// with the script.
const TERMINALS: &str = "trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT\n\
    answers() { timeout 60 bash -c \"until (: </dev/tcp/127.0.0.1/$1) 2>/dev/null; do sleep 0.05; done\"; }\n";

/// A script whose line with this command goes on beside the lines after it,
/// once the port answers.
fn started(script: &str, command: &str, options: &str, port: &str) -> String {
    let begun = format!("{command}{options} >terminal-{port}.log 2>&1 &\nanswers {port}");
    assert_eq!(script.matches(command).count(), 1, "{command} in {script}");
    script.replace(command, &begun)
}

fn free_port() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback is there");
    listener.local_addr().expect("bound").port().to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_about_proot_runs() {
    let (site, port) = (Site::with_image(), free_port());
    // What a registry would give has Python in it, and ours has not.
    let script = Page::open("docs/proot.md").text.replace("python:3.12-slim", IMAGE);
    let script = script.replace("python3 -c 'print(6*7)'", "sh -c 'echo $((6*7))'");
    let script = Page { name: "docs/proot.md", text: script }.script();
    let script = started(&script, "stacyvm serve", &format!(" --port {port} --destroy-on-exit"), &port);
    let ran = run_script(&site, &format!("http://127.0.0.1:{port}"), &format!("{TERMINALS}{script}")).await;
    assert!(ran.stdout().ends_with("42\n42\n"), "{ran}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_about_custom_backends_runs() {
    const TITLE: &str = "Another machine as a runtime, in one command";
    let (site, port, backend) = (Site::with_image(), free_port(), free_port());
    let script = Page::open("docs/custom-backend.md").section(TITLE);
    // Both machines are this one, with a directory for each.
    let text = script.text.replace("0.0.0.0:7425", &format!("127.0.0.1:{backend}"));
    let text = text.replace("10.0.0.2:7425", &format!("127.0.0.1:{backend}"));
    let text = text.replace("stacyvm serve\n", "env STACYVM_PROVIDERS_OCI_ENABLED=false stacyvm serve\n");
    let script = Page { name: script.name, text }.script();
    let script = started(&script, "--key-file backend.key", "", &backend);
    let options = format!(" --port {port} --data-dir api --destroy-on-exit");
    let script = started(&script, "stacyvm serve", &options, &port);
    let script = format!("{TERMINALS}{script}stacyvm run -- echo there\n");
    let ran = run_script(&site, &format!("http://127.0.0.1:{port}"), &script).await;
    assert!(ran.stdout().ends_with("there\n"), "{ran}");

    let (other, example) = (Site::new(), free_port());
    let script = Page::open("docs/custom-backend.md").section("An example").script().replace("7425", &example);
    // The whole of it is what the tests of the provider run.
    let script = script.replace(" &\n", &format!(" >example.log &\nanswers {example}\n"));
    let script = script.replace("--image any", "--image any --only C0");
    let script = format!("{TERMINALS}unset STACYVM_DEFAULTS_NETWORK\n{script}");
    let ran = run_script(&other, "http://127.0.0.1:1", &script).await;
    assert!(ran.stdout().contains("PASS C01"), "{ran}");
}

/// A report made for this is as good as one that took minutes.
#[tokio::test(flavor = "multi_thread")]
async fn the_page_about_certification_runs() {
    let site = Site::new();
    let brief = "stacyvm certify qemu --output certification/oci.md || echo 'not certified, as expected'\n";
    let ran =
        run_script(&site, "http://127.0.0.1:1", &(brief.to_owned() + &Page::open("docs/certification.md").script()))
            .await;
    assert!(ran.stdout().contains("certification/oci.md is as it was made"), "{ran}");
}

/// Every code of the API has an entry that says what to do, and no entry is of
/// a code that is no more.
#[test]
fn every_error_code_is_explained() {
    let document = fs::read_to_string(in_repository("docs/openapi.json")).expect("the document");
    let document: serde_json::Value = serde_json::from_str(&document).expect("JSON");
    let codes = document["components"]["schemas"]["ErrorCode"]["enum"].as_array().expect("the codes").iter();
    let codes: std::collections::BTreeSet<&str> = codes.map(|code| code.as_str().expect("text")).collect();
    assert!(codes.len() > 20 && codes.contains("INTERNAL_ERROR"), "{codes:?}");
    let page = Page::open("docs/troubleshooting.md").section("Error codes");
    let entries: Vec<(&str, &str)> =
        page.text.split("\n### ").skip(1).map(|entry| entry.split_once('\n').expect("a text")).collect();
    assert_eq!(entries.iter().map(|(code, _)| *code).collect::<std::collections::BTreeSet<_>>(), codes);
    for (code, text) in entries {
        let (status, advice) = text.split_once("**What to do:** ").unwrap_or_else(|| panic!("{code} says what to do"));
        let status = status.trim_start().split('.').next().and_then(|status| status.parse::<u16>().ok());
        assert!(status.is_some_and(|status| (400..600).contains(&status)) && advice.len() > 20, "{code}: {text}");
    }
}

#[test]
fn nothing_is_left_out_that_is_no_longer_there() {
    let pages = [
        "README.md",
        "docs/getting-started.md",
        "docs/images.md",
        "docs/conformance.md",
        "docs/docker.md",
        "docs/certification.md",
        "docs/proot.md",
    ]
    .map(Page::open);
    for (beginning, reason) in ELSEWHERE {
        let stands = pages.iter().any(|page| page.text.lines().any(|line| line.starts_with(beginning)));
        assert!(stands, "no page has `{beginning}` any more ({reason})");
    }
}
