//! What people do with it, and what they are told when it cannot be.

use rustix::process::Signal;
use serde_json::Value;
use stacyvm_api::{CreateRequest, ErrorCode, SandboxId};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::dockerd::Dockerd;
use super::{containers, only_docker, start};
use crate::support::{Server, Site, create, eventually, output, run, script, small};

#[tokio::test(flavor = "multi_thread")]
async fn sandboxes_are_containers_with_commands_files_and_previews() {
    let (site, daemon) = (Site::new(), Dockerd::shared());
    let server = start(&site, daemon, &[]).await;
    server.run(&["providers", "docker"]).await.ok().says("runc").says("docker.daemon");
    let ran = server.run(&["run", "--provider", "docker", "--", "sh", "-c", "echo $((6 * 7)); exit 3"]).await;
    assert_eq!((ran.stdout(), ran.status()), ("42\n", Some(3)), "{ran}");
    assert_eq!(containers(&site, daemon), Vec::<String>::new(), "what `run` made is gone");

    let id = server.run(&["spawn", "-q"]).await.ok().stdout().trim().to_owned();
    assert_eq!(containers(&site, daemon), [id.as_str()]);
    let labels: Value =
        serde_json::from_str(&daemon.docker(&["inspect", "--format", "{{json .Config.Labels}}", &id])).expect("JSON");
    let label = |name: &str| labels[name].as_str().unwrap_or_default().to_owned();
    assert_eq!((label("stacyvm"), label("stacyvm.sandbox")), ("true".to_owned(), id.clone()));
    assert_eq!(label("traefik.enable"), "", "only for those who have it");
    std::fs::write(site.home().join("page.html"), "a page out of a container\n").expect("written");
    server.run(&["cp", "page.html", &format!("{id}:/workspace/site/index.html")]).await.ok();
    assert_eq!(
        server.run(&["exec", &id, "--", "cat", "site/index.html"]).await.ok().stdout(),
        "a page out of a container\n"
    );

    // It has no network but its own loopback, and is shown all the same.
    let sandbox = server.client().sandbox(id.parse::<SandboxId>().expect("an id"));
    sandbox.exec_background(&script("exec httpd -f -p 127.0.0.1:8765 -h /workspace/site")).await.expect("it starts");
    let page = eventually("the page is shown", async || {
        let answer = preview(&server, &id, 8765).await;
        answer.starts_with("HTTP/1.1 200").then_some(answer)
    });
    assert!(page.await.ends_with("\r\n\r\na page out of a container\n"));
    server.run(&["kill", &id]).await.ok();
    assert_eq!(containers(&site, daemon), Vec::<String>::new());
    assert!(server.stop(Signal::TERM).await.status.success());
}

/// What a browser would get, headers and all.
async fn preview(server: &Server, id: &str, port: u16) -> String {
    let (_, server_port) = server.url.rsplit_once(':').expect("a port");
    let mut stream = TcpStream::connect(format!("127.0.0.1:{server_port}")).await.expect("it listens");
    let request = format!(
        "GET /index.html HTTP/1.1\r\nHost: {port}-{id}.localhost:{server_port}\r\nAccept: text/html\r\n\
         Connection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.expect("written");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.expect("read");
    String::from_utf8_lossy(&answer).into_owned()
}

/// On gVisor want of memory ends all of a sandbox, its commands' connections
/// first.
#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_ends_its_sandbox_for_want_of_memory_says_so() {
    let (site, daemon) = (Site::new(), Dockerd::shared());
    let server = start(&site, daemon, &[("STACYVM_PROVIDERS_DOCKER_RUNTIME", "runsc")]).await;
    let request = CreateRequest { allow_unenforced: Some(true), ..small() };
    let sandbox = create(&server.client(), &request).await;
    let error = sandbox.exec(&script("tail /dev/zero")).await.expect_err("its sandbox ends");
    assert_eq!(error.code(), Some(ErrorCode::SandboxOom), "{error:?}");
    let record = sandbox.get().await.expect("its record");
    assert_eq!(record.reason.as_deref(), Some("it used up its memory and ended"));
    sandbox.destroy().await.expect("destroyed");
    assert_eq!(containers(&site, daemon), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_is_configured_in_the_file_and_reached_over_tls() {
    let (site, daemon) = (Site::new(), Dockerd::shared());
    let yaml = format!(
        "providers:\n  default: docker\n  oci: {{enabled: false}}\n  docker:\n    socket: tcp://127.0.0.1:{}\n    \
         tls_dir: {}\n    memory: 96m\n    cpus: \"0.5\"\n    pids_limit: 77\n    user: user\n    \
         tmpfs: {{/cache: size=1m}}\nserver: {{preview_mode: traefik}}\n",
        daemon.port(),
        daemon.directory().join("tls").display()
    );
    std::fs::write(site.home().join("stacyvm.yaml"), yaml).expect("written");
    let server = Server::start(&site, &["--destroy-on-exit"]).await;
    let sandbox = create(&server.client(), &CreateRequest::default()).await;
    let record = sandbox.get().await.expect("its record");
    assert_eq!((record.memory_mb, record.vcpus), (96, 0.5));
    let seen = output(&sandbox, "id -un; grep -c ' /cache ' /proc/mounts").await;
    assert_eq!(seen, "user\n1");
    let id = sandbox.id().as_str();
    let host = daemon.docker(&["inspect", "--format", "{{.HostConfig.PidsLimit}} {{json .Config.Labels}}", id]);
    assert!(host.starts_with("77 ") && host.contains(&format!("Host(`3000-{id}.localhost`)")), "{host}");
    assert!(server.stop(Signal::TERM).await.stderr.contains("destroyed 1 sandbox"));
    assert_eq!(containers(&site, daemon), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_contract_suite_drives_it_without_a_server() {
    let (site, daemon) = (Site::new(), Dockerd::shared());
    let mut conformance = site.program();
    conformance.args(["conformance", "--provider", "docker", "--only", "C0"]);
    conformance.env("DOCKER_HOST", format!("unix://{}", daemon.socket().display()));
    run(conformance.into(), b"").await.ok().says("PASS C01");
    assert_eq!(containers(&site, daemon), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_missing_or_unsafe_is_said_with_a_way_out() {
    let site = Site::new();
    let refused = async |settings: &[(&str, &str)]| {
        let mut serve = site.program();
        only_docker(serve.args(["serve", "--port", "0"])).envs(settings.iter().copied());
        run(serve.into(), b"").await
    };
    let host = refused(&[("STACYVM_PROVIDERS_DOCKER_NETWORK_MODE", "host")]).await;
    assert_eq!(host.status(), Some(1), "{host}");
    host.says("share this machine's network").says("auth.api_key");
    let unknown = refused(&[("STACYVM_PROVIDERS_DOCKER_DROPPED_CAPS", "NET_ROW")]).await;
    assert_eq!(unknown.status(), Some(1), "{unknown}");
    unknown.says("providers.docker.dropped_caps: `NET_ROW`").says("NET_RAW");
    refused(&[("DOCKER_HOST", "ssh://me@box")]).await.failed(1).says("forward the socket");
    refused(&[("DOCKER_CONTEXT", "gone")]).await.failed(1).says("no docker context `gone`");

    // A daemon may come later, so the server starts; who asks it is told.
    let server = Server::start_with(&site, |serve| {
        only_docker(serve).env("DOCKER_HOST", "unix:///nonexistent/docker.sock");
    })
    .await;
    let error = server.client().create(&small()).await.expect_err("there is no daemon");
    assert_eq!(error.code(), Some(ErrorCode::Unavailable), "{error:?}");
    server.run(&["run", "--", "true"]).await.failed(125).says("daemon does not answer").says("start the daemon");
    server.run(&["providers", "docker"]).await.says("/nonexistent/docker.sock does not exist");
    assert!(server.log().contains("docker cannot make sandboxes"), "{}", server.log());
}
