//! `stacyvm preview` where previews have names, paths, or neither.

use std::fs;

use stacyvm_api::{CreateRequest, PortAccess};
use stacyvm_client::SandboxClient;

use crate::support::{Server, Site};

/// The port that every sandbox of `mock` answers on.
const PORT: u16 = 7;

/// A server with this `server` section, and a sandbox of it.
async fn server(section: &str) -> (Server, SandboxClient) {
    let site = Site::new();
    fs::write(site.home().join("stacyvm.yaml"), format!("server: {{{section}}}\n")).expect("written");
    let server = Server::start_with(&site, |serve| {
        serve.env("STACYVM_PROVIDERS_DEFAULT", "mock").env_remove("STACYVM_DEFAULTS_NETWORK");
    })
    .await;
    let record = server.client().create(&CreateRequest::default()).await.expect("a sandbox");
    let sandbox = server.client().sandbox(record.id);
    (server, sandbox)
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_domain_the_address_is_a_path() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback is there");
    let paths = listener.local_addr().expect("bound").port();
    drop(listener);
    let (server, sandbox) = server(&format!("preview_domain: '', preview_port: {paths}")).await;
    let (id, port) = (sandbox.id().to_string(), PORT.to_string());
    let public = server.run(&["preview", &id, &port]).await.ok();
    let address = format!("http://127.0.0.1:{paths}/{id}/{PORT}/");
    assert_eq!(public.stdout(), format!("{address}\n"));
    let link = server.run(&["preview", &id, &port, "--access", "token"]).await.ok();
    assert!(link.stdout().starts_with(&format!("{address}?stacyvm_token={PORT}.")), "{link}");
    assert_eq!(sandbox.port(PORT).await.expect("the port").access, PortAccess::Token);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_has_changed_nothing() {
    let (server, sandbox) = server("preview_domain: ''").await;
    let (id, port) = (sandbox.id().to_string(), PORT.to_string());
    let access = async || sandbox.port(PORT).await.expect("the port").access;
    assert_eq!(access().await, PortAccess::Public);
    for command in ["preview", "forward"] {
        server.run(&[command, &id, "49983"]).await.failed(1).says("port 49983 is the agent's");
    }
    let refused = server.run(&["preview", &id, &port, "--access", "token"]).await.failed(1);
    refused.says("this server has no previews").says("server.preview_port");
    assert_eq!(access().await, PortAccess::Public);
    sandbox.set_port_access(PORT, PortAccess::Token).await.expect("set");
    for options in [&["--access", "public"][..], &["--access", "public", "--ttl", "1h"]] {
        server.run(&[&["preview", &id, &port], options].concat()).await.failed(1);
        assert_eq!(access().await, PortAccess::Token, "{options:?}");
    }
}
