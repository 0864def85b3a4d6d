//! The doctor on this very host, and what `init` makes of it.

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use rustix::process::Signal;
use serde_json::Value;

use crate::backend::{self, BackendProcess};
use crate::support::{Ran, Server, Site, run};

/// The doctor looks at a port of this test's own.
fn free_port() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("an address").port().to_string()
}

async fn doctor(site: &Site, arguments: &[&str], change: impl FnOnce(&mut Command)) -> Ran {
    let mut command = site.program();
    command.arg("doctor").args(arguments).env("STACYVM_SERVER_PORT", free_port());
    change(&mut command);
    run(command.into(), b"").await
}

fn check<'a>(page: &'a Value, name: &str) -> &'a Value {
    let checks = page["checks"].as_array().expect("a list");
    checks.iter().find(|check| check["name"] == name).unwrap_or_else(|| panic!("no {name} in {page:#}"))
}

fn runtime<'a>(page: &'a Value, name: &str) -> &'a Value {
    let runtimes = page["runtimes"].as_array().expect("a list");
    runtimes.iter().find(|runtime| runtime["name"] == name).unwrap_or_else(|| panic!("no {name} in {page:#}"))
}

#[tokio::test]
async fn the_doctor_says_what_runs_here_and_changes_nothing() {
    let site = Site::new();
    let page: Value = doctor(&site, &["--json"], |_| {}).await.json();
    assert_eq!((&runtime(&page, "oci")["usable"], &runtime(&page, "oci")["enabled"]), (&true.into(), &true.into()));
    assert_eq!(check(&page, "oci.namespaces")["status"], "PASS");
    assert_eq!(check(&page, "server.port")["status"], "PASS");
    assert!(page["suggestion"]["settings"].is_array(), "{page:#}");
    for found in page["runtimes"].as_array().expect("a list") {
        let absent = found["in_this_version"] == false;
        assert!(!absent || found["usable"] == false, "{found}");
        assert!(!absent || check(&page, found["name"].as_str().expect("a name"))["status"] == "WARN", "{found}");
    }
    for found in page["checks"].as_array().expect("a list") {
        assert_eq!(found["fix"].is_string(), found["status"] != "PASS", "{found}");
    }
    assert!(!site.data_dir().exists(), "looking makes no directory");
    assert_eq!(site.remains(), Vec::<String>::new());

    let text = doctor(&site, &[], |_| {}).await.ok();
    assert!(text.stdout().contains("\nRuntimes, strongest isolation first:\n"), "{text}");
    let absent = page["runtimes"].as_array().expect("a list").iter().filter(|found| found["in_this_version"] == false);
    for name in absent.map(|found| found["name"].as_str().expect("a name")) {
        assert!(!text.stdout().contains(name), "{name} cannot be had: {text}");
    }
    assert!(!text.stdout().contains("[PASS]") && text.stdout().contains("--verbose shows every check"), "{text}");
    let full = doctor(&site, &["--verbose"], |_| {}).await.ok();
    for found in page["checks"].as_array().expect("a list") {
        let line = format!("[{}] {}: ", found["status"].as_str().expect("text"), found["name"].as_str().expect("text"));
        assert!(full.stdout().contains(&line), "{line} is not in {full}");
    }
    let strict = doctor(&site, &["--production"], |_| {}).await;
    assert_eq!(strict.status(), Some(1), "{strict}");
    assert!(strict.stdout().contains("[FAIL] auth.api_key: "), "{strict}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_that_is_taken_is_fine_only_for_our_own_server() {
    let site = Site::new();
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("an address").port().to_string();
    let sick = doctor(&site, &["--json"], |doctor| {
        doctor.env("STACYVM_SERVER_PORT", &port);
    });
    let sick = sick.await;
    assert_eq!(sick.status(), Some(1), "{sick}");
    let page: Value = serde_json::from_str(sick.stdout()).expect("JSON");
    let found = check(&page, "server.port");
    assert_eq!(found["status"], "FAIL");
    assert!(found["message"].as_str().expect("text").contains(&format!("process {}", std::process::id())), "{found}");

    let server = Server::start(&site, &["--destroy-on-exit"]).await;
    let port = server.url.rsplit(':').next().expect("a port").to_owned();
    let url = server.url.clone();
    let page: Value = doctor(&site, &["--json"], |doctor| {
        doctor.env("STACYVM_SERVER_PORT", &port).env("STACYVM_URL", &url);
    })
    .await
    .json();
    assert_eq!(check(&page, "server.port")["status"], "PASS");
    assert_eq!(check(&page, "server.ready")["status"], "PASS");
    let held = format!("process {}", server.pid());
    assert!(check(&page, "data_dir")["message"].as_str().expect("text").contains(&held), "{page:#}");
    server.stop(Signal::TERM).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_of_tls_is_asked_over_tls_and_says_so_to_others() {
    let site = Site::new();
    for (name, is_ca) in [("cert.pem", "FALSE"), ("other.pem", "FALSE"), ("ca.pem", "TRUE")] {
        let made = site
            .command("openssl")
            .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"])
            .args(["-subj", &format!("/CN={name}"), "-addext", "subjectAltName=DNS:localhost"])
            .args([
                "-addext",
                &format!("basicConstraints=critical,CA:{is_ca}"),
                "-keyout",
                &format!("{name}.key"),
                "-out",
                name,
            ])
            .output()
            .expect("openssl starts");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    }
    let file = |name: &str| site.home().join(name);
    let tls = |command: &mut Command| {
        command.env("STACYVM_SERVER_TLS_CERT_FILE", file("cert.pem"));
        command.env("STACYVM_SERVER_TLS_KEY_FILE", file("cert.pem.key"));
    };
    let server = Server::start_with(&site, |serve| {
        serve.arg("--destroy-on-exit");
        tls(serve);
    })
    .await;
    let port = server.url.rsplit(':').next().expect("a port").to_owned();
    let page: Value = doctor(&site, &["--json"], |doctor| {
        doctor.env("STACYVM_SERVER_PORT", &port);
        tls(doctor);
    })
    .await
    .json();
    assert_eq!(check(&page, "server.ready")["status"], "PASS", "{}", check(&page, "server.ready"));
    let soon = check(&page, "server.tls_cert_file");
    assert!(soon["status"] == "WARN" && soon["message"].as_str().unwrap().ends_with("ends in 1 days"), "{soon}");

    let list = async |server: &str, trusted: &str| {
        let address = format!("{server}:{port}");
        site.run_with(&["list", "--server", &address], |list| {
            list.env("SSL_CERT_FILE", file(trusted));
        })
        .await
    };
    list("https://localhost", "cert.pem").await.ok();
    for (server, trusted, message, hint) in [
        ("https://localhost", "other.pem", "no secure connection to https://", "SSL_CERT_FILE"),
        ("https://127.0.0.1", "cert.pem", "not valid for name", "by a name that its certificate has"),
        ("http://localhost", "cert.pem", "this server speaks https", "write https://"),
    ] {
        let refused = list(server, trusted).await.failed(1);
        let told = refused.stderr();
        assert!(told.contains(message) && told.contains(hint) && !told.contains("stacyvm serve"), "{refused}");
    }
    // The server keeps the one that it has, and no other would start.
    let sound = std::fs::read(file("cert.pem")).expect("the certificate");
    let garbage = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    std::fs::write(file("cert.pem"), garbage).expect("written");
    let sick = doctor(&site, &["--json"], |doctor| {
        doctor.env("STACYVM_SERVER_PORT", &port);
        tls(doctor);
    })
    .await;
    assert_eq!(sick.status(), Some(1), "{sick}");
    let page: Value = serde_json::from_str(sick.stdout()).expect("JSON");
    let said = check(&page, "config");
    assert!(said["status"] == "FAIL" && said["place"] == "server.tls_cert_file", "{said}");
    std::fs::write(file("cert.pem"), sound).expect("written");

    let plain = Server::start(&Site::new(), &[]).await;
    let refused = site.run(&["list", "--server", &plain.url.replace("http:", "https:")]).await.failed(1);
    assert!(refused.stderr().contains("write http://"), "{refused}");
    plain.stop(Signal::TERM).await;
    server.stop(Signal::TERM).await;
    // Trusted, but a CA's.
    let server = Server::start_with(&site, |serve| {
        serve.env("STACYVM_SERVER_TLS_CERT_FILE", file("ca.pem"));
        serve.env("STACYVM_SERVER_TLS_KEY_FILE", file("ca.pem.key"));
    })
    .await;
    let port = server.url.rsplit(':').next().expect("a port");
    let address = format!("https://localhost:{port}");
    let refused = site
        .run_with(&["list", "--server", &address], |list| {
            list.env("SSL_CERT_FILE", file("ca.pem"));
        })
        .await
        .failed(1);
    assert!(refused.stderr().contains("basicConstraints=critical,CA:FALSE"), "{refused}");
    server.stop(Signal::TERM).await;
}

#[tokio::test]
async fn one_thing_that_is_broken_fails_and_says_how_to_mend_it() {
    let site = Site::new();
    let failures = async |change: &dyn Fn(&mut Command)| -> Vec<(String, String)> {
        let sick = doctor(&site, &["--json"], |doctor| change(doctor)).await;
        assert_eq!(sick.status(), Some(1), "{sick}");
        let page: Value = serde_json::from_str(sick.stdout()).expect("JSON");
        let checks = page["checks"].as_array().expect("a list").iter().filter(|check| check["status"] == "FAIL");
        let text = |value: &Value| value.as_str().expect("text").to_owned();
        checks.map(|check| (text(&check["name"]), text(&check["fix"]))).collect()
    };
    let only = |found: Vec<(String, String)>, name: &str, fix: &str| {
        assert!(found.len() == 1 && found[0].0 == name && found[0].1.contains(fix), "{name}: {found:?}");
    };
    only(
        failures(&|doctor| {
            doctor.env("STACYVM_PROVIDERS_DEFAULT", "dokcer");
        })
        .await,
        "providers.default",
        "auto",
    );
    only(
        failures(&|doctor| {
            doctor.env("STACYVM_SERVER_HOST", "203.0.113.9");
        })
        .await,
        "server.port",
        "--port",
    );
    only(
        failures(&|doctor| {
            doctor.env("STACYVM_DATA_DIR", "/dev/null/data");
        })
        .await,
        "data_dir",
        "--data-dir",
    );
    only(
        failures(&|doctor| {
            doctor.env("STACYVM_SERVER_PORT", "http");
        })
        .await,
        "config",
        "schema",
    );
    // A host without programs: nothing to make networks with, and none to try.
    let page = doctor(&site, &["--json"], |doctor| {
        doctor.env("PATH", "/nowhere");
    })
    .await;
    let page: Value = serde_json::from_str(page.stdout()).expect("JSON");
    assert_eq!(check(&page, "docker.daemon")["status"], "WARN");
}

/// Names of the checks of one runtime that are as bad as this.
fn of_runtime(page: &Value, runtime: &str, status: &str) -> Vec<String> {
    let checks = page["checks"].as_array().expect("a list").iter().filter(|check| check["status"] == status);
    let names = checks.map(|check| check["name"].as_str().expect("a name").to_owned());
    names.filter(|name| name.starts_with(&format!("{runtime}."))).collect()
}

/// With the same settings, and without one.
#[tokio::test(flavor = "multi_thread")]
async fn the_doctor_says_of_proot_what_a_server_says() {
    const SHARED: [(&str, &str); 2] =
        [("STACYVM_PROVIDERS_DEFAULT", "proot"), ("STACYVM_PROVIDERS_PROOT_NAMESPACES", "false")];
    const KEY: (&str, &str) = ("STACYVM_AUTH_API_KEY", "0123456789abcdef0123456789abcdef");
    let site = Site::new();
    let look = async |settings: &[(&str, &str)]| -> Value {
        let ran = doctor(&site, &["--json"], |doctor| {
            doctor.envs(settings.iter().copied());
        })
        .await;
        serde_json::from_str(ran.stdout()).unwrap_or_else(|error| panic!("{error}: {ran}"))
    };
    // Commands would reach what this host reaches, and nobody is asked for a key;
    // other users could not get to their files.
    let open = look(&SHARED).await;
    assert_eq!(of_runtime(&open, "proot", "FAIL"), ["proot.namespaces", "proot.workspace"], "{open:#}");
    let fix = |page: &Value, name: &str| check(page, name)["fix"].as_str().expect("a fix").to_owned();
    assert!(fix(&open, "proot.namespaces").contains("stacyvm key create"), "{open:#}");
    assert!(fix(&open, "proot.workspace").contains("workspace_base"), "{open:#}");
    assert!(runtime(&open, "proot")["missing"].as_str().is_some_and(|why| why.starts_with("proot.namespaces")));
    let closed = look(&[SHARED[0], SHARED[1], KEY]).await;
    assert_eq!(of_runtime(&closed, "proot", "FAIL"), ["proot.workspace"], "{closed:#}");
    assert!(!site.data_dir().exists(), "looking makes no directory");
    assert_eq!(site.remains(), Vec::<String>::new());

    // A key in the store counts as one in the configuration does.
    site.run(&["key", "create", "me", "--scope", "admin", "--data-dir", site.data_dir().to_str().expect("text")])
        .await
        .ok();
    assert_eq!(of_runtime(&look(&SHARED).await, "proot", "FAIL"), ["proot.workspace"]);

    let base = tempfile::tempdir().expect("a directory");
    std::fs::set_permissions(base.path(), std::fs::Permissions::from_mode(0o755)).expect("open to all");
    let base = base.path().join("base").display().to_string();
    let whole = [SHARED[0], SHARED[1], KEY, ("STACYVM_PROVIDERS_PROOT_WORKSPACE_BASE", base.as_str())];
    let doctors = look(&whole).await;
    assert_eq!(of_runtime(&doctors, "proot", "FAIL"), Vec::<String>::new(), "{doctors:#}");
    assert_eq!(runtime(&doctors, "proot")["usable"], true);
    let server = Server::start_with(&site, |serve| {
        serve.arg("--destroy-on-exit").env_remove("STACYVM_DEFAULTS_NETWORK").envs(whole.iter().copied());
    })
    .await;
    let mut shown = server.program(&["providers", "proot", "--json"]);
    shown.env("STACYVM_API_KEY", KEY.1);
    let servers: Value = run(shown, b"").await.json();
    let findings = servers["health"]["findings"].as_array().expect("a list");
    for finding in findings {
        let name = finding["name"].as_str().expect("a name");
        let status = match finding["level"].as_str() {
            Some("ok") => "PASS",
            Some("warning") => "WARN",
            _ => "FAIL",
        };
        assert_eq!(check(&doctors, name)["status"], status, "{finding} and {doctors:#}");
    }
    let names: Vec<&Value> = findings.iter().map(|finding| &finding["name"]).collect();
    for name in ["proot.binary", "proot.rootfs", "proot.namespaces", "proot.landlock", "proot.workspace"] {
        assert!(names.iter().any(|it| *it == name), "{name}: {servers:#}");
    }
    server.stop(Signal::TERM).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_doctor_looks_at_the_backend_that_is_configured() {
    let (site, backend_site) = (Site::new(), Site::new());
    let backend = BackendProcess::start(&backend_site, &["--provider", "mock"]).await;
    let look = async |url: &str, key: &str| -> Value {
        let ran = doctor(&site, &["--json"], |doctor| {
            doctor.env("STACYVM_PROVIDERS_DEFAULT", "custom").env("STACYVM_PROVIDERS_CUSTOM_BASE_URL", url);
            doctor.env("STACYVM_PROVIDERS_CUSTOM_API_KEY", key);
        })
        .await;
        assert!(!ran.stdout().contains(key), "the key is told on: {ran}");
        serde_json::from_str(ran.stdout()).unwrap_or_else(|error| panic!("{error}: {ran}"))
    };
    let well = look(&backend.url, backend::KEY).await;
    assert_eq!(of_runtime(&well, "custom", "FAIL"), Vec::<String>::new(), "{well:#}");
    assert_eq!(runtime(&well, "custom")["usable"], true, "{well:#}");
    let fails_alone = |page: &Value, name: &str, fix: &str| {
        assert_eq!(of_runtime(page, "custom", "FAIL"), [name], "{page:#}");
        assert!(check(page, name)["fix"].as_str().is_some_and(|it| it.contains(fix)), "{page:#}");
    };
    fails_alone(&look(&backend.url, "not-the-key-of-it").await, "custom.backend_health", "api_key_file");
    fails_alone(&look("http://127.0.0.1:1", backend::KEY).await, "custom.backend_connection", "start the backend");
    fails_alone(&look("nonsense", backend::KEY).await, "custom.base_url", "https://");

    let none: Value = doctor(&site, &["--json"], |_| {}).await.json();
    assert_eq!(of_runtime(&none, "custom", "WARN"), ["custom.base_url"], "nobody asked for it: {none:#}");
    assert_eq!(site.remains(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_init_writes_passes_the_lint_and_runs_a_server() {
    let site = Site::new();
    site.run(&["init"]).await.ok().says("stacyvm config lint");
    let file = site.home().join("stacyvm.yaml");
    assert_eq!(file.metadata().expect("written").permissions().mode() & 0o777, 0o600);
    let first = std::fs::read_to_string(&file).expect("readable");
    assert!(first.contains("\n  default: oci\n") && first.contains("max_sandboxes: "), "{first}");
    site.run(&["init"]).await.failed(1).says("exists already").says("--force");
    site.run(&["init", "--force"]).await.ok();
    let printed = site.run(&["init", "--output", "-"]).await.ok();
    assert!(printed.stdout().starts_with("# "), "{printed}");
    let judged = site.run(&["config", "lint"]).await.ok();
    assert!(judged.stdout().contains(" 0 failed"), "{judged}");
    assert!(!site.data_dir().exists(), "nothing but the file is made");

    let server = Server::start(&site, &["--destroy-on-exit"]).await;
    server.run(&["health"]).await.ok().says("provider oci (default): healthy");
    server.stop(Signal::TERM).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_init_writes_for_production_passes_as_it_stands() {
    let site = Site::new();
    let made = site.run(&["init", "--production"]).await.ok().says("stacyvm key create admin");
    let mut lint = site.program();
    // The tests' own is below /tmp, which is no place for production.
    lint.env_remove("STACYVM_DATA_DIR").args(["config", "lint", "--production"]);
    let judged = run(lint.into(), b"").await.ok();
    assert!(judged.stdout().contains(" 0 failed"), "{judged}");
    let keyless = site.run(&["serve", "--port", "0"]).await.says("no key is valid").says("stacyvm key create");
    assert_eq!(keyless.status(), Some(1), "{keyless}");
    // What it says to do next is enough.
    let next = made.stdout().lines().find_map(|line| line.strip_prefix("next: ")).expect("what to do");
    let (create, _) = next.split_once(" && ").expect("two steps");
    let mut shell = site.command("bash");
    shell.args(["-c", &create.replacen("stacyvm", env!("CARGO_BIN_EXE_stacyvm"), 1)]);
    let key = run(shell.into(), b"").await.ok();
    let server = Server::start(&site, &["--destroy-on-exit"]).await;
    server.run(&["list"]).await.failed(1).says("a valid API key is required");
    server.run(&["list", "--api-key", key.stdout().trim()]).await.ok();
    server.stop(Signal::TERM).await;
}
