//! `stacyvm ports`, `preview` and `forward` with a real server inside.

use std::process::Stdio;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, BufReader};

use crate::server::{PORT, Server, get, site, within};

async fn output(server: &Server, arguments: &[&str]) -> Value {
    let mut arguments = arguments.to_vec();
    arguments.insert(0, "--json");
    let done = within("a command", server.command(&arguments).output()).await.unwrap();
    assert!(done.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
    serde_json::from_slice(&done.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn ports_are_shown_opened_and_forwarded() {
    let server = Server::start(Some("the-key")).await;
    let sandbox = server.sandbox().await;
    site(&sandbox, PORT).await;
    let (id, port) = (sandbox.id().to_string(), PORT.to_string());
    let host = server.host(&sandbox, PORT);
    let entry = json!({ "port": PORT, "listening": true, "access": "token", "url": format!("http://{host}/") });
    assert_eq!(output(&server, &["ports", &id]).await, json!([entry]));

    let link = output(&server, &["preview", &id, &port, "--ttl", "10m"]).await;
    let path = link["url"].as_str().unwrap().strip_prefix(&format!("http://{host}")).unwrap();
    assert!(path.starts_with("/?stacyvm_token=") && link["expires_at"].is_string(), "{link}");
    assert!(get(server.port, &host, path).await.contains("Inside a sandbox"), "the link opens it");
    let public = output(&server, &["preview", &id, &port, "--access", "public"]).await;
    assert_eq!((&public["url"], &public["access"]), (&json!(format!("http://{host}/")), &json!("public")));
    assert!(get(server.port, &host, "/").await.contains("Inside a sandbox"), "and now anybody");

    let mut tunnel = server.command(&["--json", "forward", &id, &port, "--local-port", "0"]);
    let mut tunnel = tunnel.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut announcement = String::new();
    within("it listens", BufReader::new(tunnel.stdout.take().unwrap()).read_line(&mut announcement)).await.unwrap();
    let announced: Value = serde_json::from_str(&announcement).unwrap();
    let local: std::net::SocketAddr = announced["listening"].as_str().unwrap().parse().unwrap();
    assert!(local.ip().is_loopback() && announced["port"] == PORT, "{announcement}");
    for _ in 0..3 {
        let answer = get(local.port(), "anything", "/").await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("Inside a sandbox"), "{answer}");
    }
    tunnel.kill().await.unwrap();

    let closed = server.command(&["forward", "sb-00000000000000000000", "80", "--local-port", "0"]).output();
    let closed = within("a refusal", closed).await.unwrap();
    assert!(
        !closed.status.success() && String::from_utf8_lossy(&closed.stderr).contains("does not exist"),
        "{closed:?}"
    );
    server.stop().await;
}
