//! Starting and ending the server, and what it refuses to start with.

use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Stdio;

use rustix::process::{Signal, kill_process};
use serde_json::Value;
use stacyvm_api::{CreateRequest, ErrorCode, SandboxState};
use stacyvm_client::{Client, ClientOptions};

use crate::support::{Ran, Server, Site, create, eventually, in_repository, output, pid_of, run, small};

#[tokio::test(flavor = "multi_thread")]
async fn ending_the_server_leaves_sandboxes_running() {
    let site = Site::with_image();
    let mut server = Server::start(&site, &[]).await;
    let sandbox = create(&server.client(), &small()).await;
    let id = sandbox.id().clone();
    output(&sandbox, "echo kept > file").await;
    for signal in [Signal::TERM, Signal::INT] {
        let ended = server.stop(signal).await;
        assert!(ended.status.success(), "{ended:?}");
        assert!(ended.stderr.contains("1 sandbox keeps running"), "{ended:?}");
        server = Server::start(&site, &[]).await;
        let sandbox = server.client().sandbox(id.clone());
        assert_eq!(sandbox.get().await.expect("it is known").state, SandboxState::Running);
        assert_eq!(output(&sandbox, "cat file").await, "kept");
    }
    server.run(&["kill", id.as_str()]).await.ok();
    assert!(!server.stop(Signal::TERM).await.stderr.contains("keep running"));
    assert_eq!(site.remains(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn without_its_ca_the_server_starts_and_says_so() {
    let site = Site::new();
    let with_acme = |command: &mut std::process::Command| {
        command.envs([
            ("STACYVM_SERVER_ACME_ENABLED", "true"),
            // Nobody listens there.
            ("STACYVM_SERVER_ACME_DIRECTORY_URL", "https://127.0.0.1:1/directory"),
            ("STACYVM_SERVER_ACME_EMAIL", "ops@example.com"),
            ("STACYVM_SERVER_ACME_AGREE_TERMS", "true"),
            ("STACYVM_SERVER_ALLOWED_HOSTS", "vm.example.com"),
        ]);
    };
    let server = Server::start_with(&site, with_acme).await;
    assert!(server.url.starts_with("https://"), "{}", server.url);
    let said = "no certificate was issued; a self-signed one is shown meanwhile";
    eventually("the log says so", async || server.log().contains(said).then_some(())).await;
    let mut doctor = server.program(&["doctor", "--json"]);
    with_acme(doctor.as_std_mut());
    let page: Value = run(doctor, b"").await.json();
    let of_acme = |check: &&Value| check["name"] == "server.acme";
    let check = page["checks"].as_array().expect("a list").iter().find(of_acme).expect("it is looked at");
    assert_eq!(check["message"], "there is no certificate for vm.example.com yet");
    let kept = site.data_dir().join("acme").metadata().expect("a directory");
    assert_eq!(kept.permissions().mode() & 0o777, 0o700);
    assert!(server.stop(Signal::TERM).await.status.success());

    let mut serve = site.program();
    with_acme(&mut serve);
    serve.args(["serve", "--port", "0"]).env("STACYVM_SERVER_ACME_DNS_HOOK", "/no/hook");
    let refused = run(serve.into(), b"").await;
    assert!(refused.stderr().contains("server.acme.dns_hook: /no/hook cannot be run"), "{refused}");
    assert_eq!(refused.status(), Some(1), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn with_destroy_on_exit_nothing_is_left() {
    for signal in [Signal::TERM, Signal::INT] {
        let site = Site::with_image();
        let server = Server::start(&site, &["--destroy-on-exit"]).await;
        for _ in 0..3 {
            let sandbox = create(&server.client(), &small()).await;
            output(&sandbox, "sleep 600 >/dev/null 2>&1 &").await;
        }
        let ended = server.stop(signal).await;
        assert!(ended.status.success() && ended.stderr.contains("destroyed 3 sandboxes"), "{ended:?}");
        assert!(!ended.stderr.contains("not touched"), "{ended:?}");
        assert_eq!(site.remains(), Vec::<String>::new());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_line_says_where_and_for_whom_it_listens() {
    let site = Site::new();
    let server = Server::start(&site, &[]).await;
    let url = server.url.clone();
    let said = server.stop(Signal::TERM).await.stdout;
    let version = env!("CARGO_PKG_VERSION");
    let expected = format!(
        "StacyVM {version} listens on {url}, provider oci (built in, needs no daemon), \
         no key needed, only this machine may call\n"
    );
    assert_eq!(said, expected);

    let with_key = |serve: &mut std::process::Command| {
        serve.args(["--json", "--host", "0.0.0.0"]).env("STACYVM_AUTH_API_KEY", "key-of-the-test");
    };
    let server = Server::start_with(&site, with_key).await;
    let port = server.url.rsplit(':').next().expect("a port").to_owned();
    let client = |api_key: Option<&str>| {
        let options = ClientOptions::new(format!("127.0.0.1:{port}"));
        Client::new(&ClientOptions { api_key: api_key.map(str::to_owned), ..options }).expect("an address")
    };
    for wrong in [None, Some("wrong")] {
        assert_eq!(client(wrong).providers().await.unwrap_err().code(), Some(ErrorCode::Unauthorized));
    }
    assert_eq!(client(Some("key-of-the-test")).providers().await.expect("let in").len(), 1);
    let ended = server.stop(Signal::TERM).await;
    let said: Value = serde_json::from_str(&ended.stdout).expect("one JSON object");
    assert_eq!((&said["auth"], &said["provider"]), (&Value::from(true), &Value::from("oci")));
    assert!(!(ended.stdout + &ended.stderr).contains("key-of-the-test"), "a key is in the log");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_outlives_whoever_read_its_log() {
    let site = Site::new();
    let mut serve = site.program();
    serve.args(["serve", "--port", "0", "--destroy-on-exit"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut server = serve.spawn().expect("the program starts");
    let mut line = String::new();
    BufReader::new(server.stdout.take().expect("piped")).read_line(&mut line).expect("readable");
    drop(server.stderr.take());

    let url = line.split([' ', ',']).find(|word| word.starts_with("http://")).expect("an address").to_owned();
    let client = Client::new(&ClientOptions::new(url)).expect("an address");
    let request = CreateRequest { image: Some("host".to_owned()), ..CreateRequest::default() };
    assert_eq!(output(&create(&client, &request).await, "echo fine").await, "fine");
    kill_process(pid_of(&server), Signal::TERM).expect("it can be told");
    assert!(server.wait().expect("it ends").success());
    assert_eq!(site.remains(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_server_stays_away_from_the_data_directory_and_the_port() {
    let site = Site::with_image();
    let server = Server::start(&site, &["--destroy-on-exit"]).await;
    let sandbox = create(&server.client(), &small()).await;
    let holder = format!("process {}", server.pid());
    site.run(&["serve", "--port", "0"]).await.failed(1).says(&holder).says("--data-dir");
    site.run(&["conformance", "--provider", "oci"]).await.failed(1).says(&holder);

    let other = Site::new();
    let port = server.url.rsplit(':').next().expect("a port");
    let refused = other.run(&["serve", "--port", port]).await.failed(1).says(&holder).says("--port");
    assert!(refused.stderr().contains(&format!("port {port} on 127.0.0.1 is taken")), "{refused}");
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("an address").port().to_string();
    let ours = format!("process {}", std::process::id());
    other.run(&["serve", "--port", &port]).await.failed(1).says(&ours);
    let preview = other.run_with(&["serve", "--port", "0"], |serve| {
        serve.env("STACYVM_SERVER_PREVIEW_PORT", &port);
    });
    preview.await.failed(1).says(&ours).says("set another server.preview_port");
    assert_eq!(other.remains(), Vec::<String>::new());

    assert_eq!(output(&sandbox, "echo undisturbed").await, "undisturbed");
}

#[tokio::test(flavor = "multi_thread")]
async fn beyond_loopback_a_key_is_demanded() {
    let site = Site::new();
    for host in ["0.0.0.0", "::", "[::]"] {
        let refused = site.run(&["serve", "--port", "0", "--host", host]).await.says("STACYVM_AUTH_API_KEY");
        assert_eq!(refused.status(), Some(1), "{refused}");
        assert!(refused.stderr().contains(&format!("refusing to listen on {host} without a key")), "{refused}");
    }
    assert_eq!(site.remains(), Vec::<String>::new(), "a server that was refused leaves nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_configuration_that_is_wrong_stops_the_server_and_says_where() {
    let site = Site::new();
    let refused = async |yaml: &str, expected: &[&str]| {
        std::fs::write(site.home().join("stacyvm.yaml"), yaml).expect("a file");
        let mut ran: Ran = site.run(&["serve", "--port", "0"]).await;
        assert_eq!(ran.status(), Some(1), "{ran}");
        for text in expected {
            ran = ran.says(text);
        }
    };
    refused("server:\n  prot: 1\n", &["stacyvm.yaml:2: unknown key `server.prot`", "did you mean `server.port`?"])
        .await;
    refused("defaults:\n  ttl: 30\n", &["stacyvm.yaml:2: `defaults.ttl` must be a duration"]).await;
    refused("server: [1]\ndefaults:\n  vcpus: two\n", &["stacyvm.yaml:1", "stacyvm.yaml:3: `defaults.vcpus`"]).await;
    refused("providers:\n  default: dokcer\n", &["no provider `dokcer`", "auto, oci"]).await;
    refused("logging:\n  level: loud\n", &["logging.level: `loud` is not a log level", "(use error, warn"]).await;
    std::fs::remove_file(site.home().join("stacyvm.yaml")).expect("removed");

    let missing = site.run(&["serve", "--config", "missing.yaml"]).await.says("missing.yaml");
    assert_eq!(missing.status(), Some(1), "{missing}");
    let mut wrong = site.program();
    wrong.args(["serve", "--port", "0"]).env("STACYVM_SERVER_PORT", "http");
    let ran = run(wrong.into(), b"").await;
    assert_eq!(ran.status(), Some(1), "{ran}");
    ran.says("STACYVM_SERVER_PORT: `server.port` must be a whole number, not `http`");
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_come_from_the_file_the_environment_and_the_options_in_this_order() {
    let site = Site::new();
    let yaml = "defaults: {memory_mb: 100, vcpus: 2, ttl: 7m, image: host}\nlogging: {level: debug}\n";
    std::fs::write(site.home().join("stacyvm.yaml"), yaml).expect("a file");
    let server = Server::start_with(&site, |serve| {
        serve.args(["--log-level", "info", "--destroy-on-exit"]);
        serve.env("STACYVM_DEFAULTS_VCPUS", "0.5").env("STACYVM_DEFAULTS_MEMROY_MB", "1");
    })
    .await;
    let sandbox = create(&server.client(), &CreateRequest::default()).await.get().await.expect("a record");
    assert_eq!((sandbox.image.as_str(), sandbox.memory_mb, sandbox.vcpus), ("host", 100, 0.5));
    assert_eq!(sandbox.expires_at.since(sandbox.created_at).as_secs(), 7 * 60);
    let log = server.log();
    assert!(log.contains("did you mean STACYVM_DEFAULTS_MEMORY_MB?"), "{log}");
    assert!(log.contains("configuration read") && !log.contains("DEBUG"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn readiness_is_told_to_people_and_to_deployments() {
    let server = Server::shared().await;
    server.run(&["health"]).await.ok().says("ready").says("provider oci (default): healthy");
    let ready: Value = server.run(&["health", "--json"]).await.json();
    assert_eq!((&ready["status"], &ready["store"]), (&Value::from("ready"), &Value::from("ok")));
    let smoke = in_repository("scripts/smoke-deployment.sh");
    let smoke = smoke.to_str().expect("text");
    let mut asked = server.site.command(smoke);
    asked.arg(&server.url);
    run(asked.into(), b"").await.ok().says("smoke checks passed");

    let nobody = "http://127.0.0.1:1";
    server.run(&["health", "--server", nobody]).await.failed(1).says("no server answers").says("stacyvm serve");
    let mut asked = server.site.command(smoke);
    asked.arg(nobody);
    assert_eq!(run(asked.into(), b"").await.status(), Some(1));
}

/// What `make run` does once the program is built.
#[tokio::test(flavor = "multi_thread")]
async fn the_demonstration_computes_something_and_leaves_nothing() {
    let site = Site::new();
    let free = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address");
    let mut demo = site.command("bash");
    demo.arg(in_repository("scripts/demo.sh")).arg(env!("CARGO_BIN_EXE_stacyvm"));
    // As on a machine of one's own: with whatever network there is.
    demo.env("ONCE", "1").env("PORT", free.port().to_string()).env_remove("STACYVM_DEFAULTS_NETWORK");
    let ran = run(demo.into(), b"").await.ok();
    assert!(ran.stdout().contains("pi = 3.14159265358979323846264338327950288419716939937510"), "{ran}");
    assert!(ran.stdout().contains(&format!("listens on http://{free}")), "{ran}");
    assert!(ran.stdout().contains("The sandbox was ready after "), "{ran}");
    assert_eq!(site.remains(), Vec::<String>::new());
}
