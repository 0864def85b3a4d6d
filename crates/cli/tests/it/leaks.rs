//! Whatever clients do to a server, what it holds afterwards is what it held
//! before: processes, mounts, groups, namespaces, devices, directories, files.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use rustix::process::Signal;
use stacyvm_api::{CreateRequest, Disk, ErrorCode, ExecRequest, ListQuery, SandboxState};
use stacyvm_client::{EventsOptions, SandboxClient, TerminalSize, UploadOptions, WatchOptions};
use stacyvm_conformance::{Census, CensusScope};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::support::{PATIENCE, Server, Site, create, eventually, output, script, small};

/// Clients that leave before the answer, each a moment later than the last.
const HANG_UPS: usize = 40;

/// Looks in a row without a change that count as rest.
const STEADY_LOOKS: usize = 25;

/// A server that has made its first sandboxes, and what it then holds, without
/// connections of clients.
struct Watched {
    server: Server,
    scope: CensusScope,
    before: Census,
}

impl Watched {
    async fn start() -> Self {
        let server = Server::start(&Site::with_image(), &[]).await;
        let client = server.client();
        // What is made once, with the first sandbox of its kind, stays.
        for request in kinds() {
            let sandbox = create(&client, &request).await;
            use_it(&sandbox, "warm").await;
            sandbox.destroy().await.expect("destroyed");
        }
        drop(client);
        let scope = server.site.scope(server.pid());
        let before = settled(&scope).await;
        Self { server, scope, before }
    }

    /// Everything is as before, while the server runs and when it has ended.
    async fn ends_as_it_began(self) {
        let mut last = Vec::new();
        let returned = timeout(PATIENCE, async {
            loop {
                last = self.before.changes_to(&settled(&self.scope).await);
                if last.is_empty() {
                    return;
                }
            }
        });
        assert!(returned.await.is_ok(), "{last:?}; at first: {}", self.before);
        let site = Arc::clone(&self.server.site);
        assert!(self.server.stop(Signal::TERM).await.status.success());
        assert_eq!(site.remains(), Vec::<String>::new());
    }
}

/// What a server holds once it is at rest.
async fn settled(scope: &CensusScope) -> Census {
    let mut last = Census::take(scope).expect("a census");
    let mut same = 0;
    eventually("the server is at rest", async || {
        let now = Census::take(scope).expect("a census");
        same = if now == last { same + 1 } else { 0 };
        last = now;
        (same >= STEADY_LOOKS).then(|| last.clone())
    })
    .await
}

/// Sandboxes that are made in different ways.
fn kinds() -> [CreateRequest; 3] {
    let host = CreateRequest { image: Some("host".to_owned()), ..small() };
    let connected = CreateRequest { network_mode: Some("bridge".to_owned()), ..small() };
    let in_memory = CreateRequest { disk: Some(Disk::Memory), disk_size_mb: Some(16), ..small() };
    [host, connected, in_memory]
}

async fn use_it(sandbox: &SandboxClient, text: &str) {
    assert_eq!(output(sandbox, &format!("mkdir -p a/b/c; echo {text} > a/b/c/d; cat a/b/c/d")).await, text);
    let mut big = vec![7; 300_000];
    big.extend_from_slice(text.as_bytes());
    sandbox.upload("big", std::io::Cursor::new(big.clone()), &UploadOptions::default()).await.expect("written");
    assert!(sandbox.read_file("big").await.expect("read") == big);
    assert!(!sandbox.download_archive("a").await.expect("a tree").bytes().await.expect("its bytes").is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn sandboxes_leave_nothing_one_by_one_and_together() {
    let watched = Watched::start().await;
    let client = watched.server.client();
    for (number, request) in kinds().iter().cycle().take(9).enumerate() {
        let sandbox = create(&client, request).await;
        use_it(&sandbox, &number.to_string()).await;
        sandbox.destroy().await.expect("destroyed");
    }
    let kinds = kinds();
    let together = kinds.iter().cycle().take(24).enumerate().map(async |(number, request)| {
        let sandbox = create(&client, request).await;
        use_it(&sandbox, &number.to_string()).await;
        output(&sandbox, "sleep 1234 >/dev/null 2>&1 &").await;
        sandbox.destroy().await.expect("destroyed");
    });
    join_all(together).await;
    drop(client);
    watched.ends_as_it_began().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn creates_that_fail_or_that_nobody_waits_for_leave_nothing() {
    let watched = Watched::start().await;
    let client = watched.server.client();
    for (request, code) in [
        (CreateRequest { user: Some("nobody-of-this-name".to_owned()), ..small() }, ErrorCode::BadRequest),
        (
            CreateRequest { image: Some("127.0.0.1:1/nothing:here".to_owned()), ..small() },
            ErrorCode::RegistryUnavailable,
        ),
        (CreateRequest { image: Some("Not-Lower".to_owned()), ..small() }, ErrorCode::ImageNotFound),
        (CreateRequest { network_mode: Some("no-such-network".to_owned()), ..small() }, ErrorCode::BadRequest),
        (CreateRequest { template: Some("no-such-template".to_owned()), ..small() }, ErrorCode::NotFound),
    ] {
        let refused = client.create(&request).await.expect_err("a refusal");
        assert_eq!(refused.code(), Some(code), "{refused:?}");
    }
    // Clients that hang up at any time between the request and the answer.
    for millis in (0..).take(HANG_UPS) {
        let mut socket =
            TcpStream::connect(watched.server.url.trim_start_matches("http://")).await.expect("it listens");
        let body = r#"{"memory_mb":128,"network_mode":"bridge"}"#;
        let head = "POST /api/v1/sandboxes HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n";
        let request = format!("{head}Content-Length: {}\r\n\r\n{body}", body.len());
        socket.write_all(request.as_bytes()).await.expect("sent");
        let answered = timeout(Duration::from_millis(millis), socket.readable()).await;
        drop(socket);
        // One that was made in time has an owner: the test.
        if answered.is_ok() {
            watched.server.run(&["kill", "--all"]).await.ok();
        }
    }
    // One whose answer was on its way when its client left cannot be known as
    // abandoned; all others are undone.
    let stayed = eventually("what nobody waited for is undone", async || {
        let listed = client.list_all(&ListQuery::default()).await.expect("listed");
        listed.iter().all(|sandbox| sandbox.state == SandboxState::Running).then_some(listed.len())
    })
    .await;
    assert!(stayed < HANG_UPS / 2, "{stayed} of {HANG_UPS} stayed");
    watched.server.run(&["kill", "--all"]).await.ok();
    drop(client);
    watched.ends_as_it_began().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_that_are_dropped_leave_nothing() {
    let watched = Watched::start().await;
    let client = watched.server.client();
    let sandbox = create(&client, &small()).await;
    // A source that were dropped would have come to its end.
    let mut sources = Vec::new();
    for _ in 0..6 {
        // Each of these ends while there is more to come.
        let mut flood = sandbox.exec_stream(&script("yes")).await.expect("it starts");
        flood.next().await.expect("an event");
        let timeout = Some(Duration::from_secs(1).into());
        let waits = ExecRequest { timeout, ..script("sleep 1234") };
        let _gave_up = tokio::time::timeout(Duration::from_millis(50), sandbox.exec(&waits)).await;
        let size = Some(TerminalSize { cols: 80, rows: 24 });
        drop(sandbox.terminal(&script("cat"), size).await.expect("a terminal"));
        drop(sandbox.watch("/workspace", &WatchOptions { recursive: true }).await.expect("a watch"));
        drop(client.events(&EventsOptions::default()).await.expect("events"));
        output(&sandbox, "truncate -s 1G /workspace/large").await;
        let mut large = sandbox.download("/workspace/large", None).await.expect("it begins");
        large.chunk().await.expect("a piece");
        drop(large);
        let (mut writer, reader) = tokio::io::duplex(1024);
        let options = UploadOptions::default();
        let upload = sandbox.upload("/workspace/half", reader, &options);
        let half = async {
            writer.write_all(&vec![7; 100_000]).await.expect("it is read");
        };
        tokio::select! { _ = upload => panic!("an upload without an end"), () = half => {} }
        sources.push(writer);
    }
    assert!(sandbox.stat("/workspace/half").await.is_err(), "half a file");
    assert_eq!(output(&sandbox, "echo fine").await, "fine");
    sandbox.destroy().await.expect("destroyed");
    drop((sandbox, client));
    watched.ends_as_it_began().await;
}
