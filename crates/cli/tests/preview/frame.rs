//! Ports that want a token, in a frame of another site's page and by themselves.

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

use crate::browser::Browser;
use crate::server::{PORT, Server, get, site};

/// A page of another site that frames an address and keeps what it is told.
async fn embedding(address: &str) -> u16 {
    let page = format!(
        "<!doctype html><title>Outside</title><script>window.told = {{}};\
         onmessage = message => {{ window.told = message.data; }};</script>\
         <iframe src=\"{address}\" width=\"700\" height=\"600\"></iframe>"
    );
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut head = vec![0; 8192];
            let _request = stream.read(&mut head).await;
            let head = "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\n";
            let answer = format!("{head}Content-Length: {}\r\n\r\n{page}", page.len());
            let _sent = stream.write_all(answer.as_bytes()).await;
        }
    });
    port
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_opens_a_port_in_a_frame_of_another_site() {
    let server = Server::start(Some("the-key")).await;
    let sandbox = server.sandbox().await;
    site(&sandbox, PORT).await;
    let host = server.host(&sandbox, PORT);
    assert!(get(server.port, &host, "/").await.starts_with("HTTP/1.1 401"), "strangers stay outside");

    let link = sandbox.port_link(PORT, None).await.unwrap();
    let browser = Browser::start();
    let outside = browser.open(&format!("http://127.0.0.1:{}/", embedding(&link.url).await)).await;
    // Every asset, the WebSocket and the events come with the cookie alone.
    outside.until("window.told.socket", &json!("echo: hello")).await;
    outside.until("window.told.ticks", &json!("5")).await;
    outside.until("window.told.upload", &json!("5242880 bytes")).await;
    outside.until("window.told.color", &json!("rgb(0, 102, 51)")).await;
    let told = outside.evaluate("window.told").await.unwrap();
    assert_eq!(told["search"], "", "the token is gone from the address");
    let shown = told.to_string();
    assert!(!shown.contains(&link.token) && !shown.contains("stacyvm-preview"), "the page sees no secret: {shown}");
    outside.screenshot("preview-frame.png").await;

    // The session is of that site's pages: by itself the preview is closed.
    let page = browser.open(&format!("http://{host}/")).await;
    page.until("document.querySelector('h1').textContent.includes('is not public')", &json!(true)).await;
    page.screenshot("preview-closed.png").await;
    page.go(&link.url).await;
    page.until("document.title", &json!("Inside")).await;
    assert_eq!(page.evaluate("location.href").await, Ok(json!(format!("http://{host}/"))));
    page.go(&format!("http://{host}/?again")).await;
    page.until("location.search", &json!("?again")).await;
    page.until("document.title", &json!("Inside")).await;
    browser.close().await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_of_another_sandbox_cannot_use_a_session() {
    let server = Server::start(Some("the-key")).await;
    let (victim, attacker) = (server.sandbox().await, server.sandbox().await);
    site(&victim, PORT).await;
    site(&attacker, PORT).await;
    let browser = Browser::start();
    // The same person has both open.
    let page = browser.open(&victim.port_link(PORT, None).await.unwrap().url).await;
    page.until("document.title", &json!("Inside")).await;
    page.go(&attacker.port_link(PORT, None).await.unwrap().url).await;
    let host = server.host(&attacker, PORT);
    page.until("document.title + location.host", &json!(format!("Inside{host}"))).await;

    let target = server.host(&victim, PORT);
    let socket = format!(
        "new Promise(done => {{ const socket = new WebSocket('ws://{target}/echo');\
         socket.onopen = () => done('open'); socket.onerror = () => done('refused'); }})"
    );
    assert_eq!(page.evaluate(&socket).await, Ok(json!("refused")));
    let image = format!(
        "new Promise(done => {{ const image = new Image(); image.onload = () => done('loaded');\
         image.onerror = () => done('refused'); image.src = 'http://{target}/image.svg'; }})"
    );
    assert_eq!(page.evaluate(&image).await, Ok(json!("refused")));
    let read = format!("fetch('http://{target}/headers', {{ credentials: 'include' }}).then(answer => answer.text())");
    let read: Result<Value, String> = page.evaluate(&read).await;
    assert!(read.is_err(), "{read:?}");
    // The same things are no trouble on its own host.
    assert_eq!(page.evaluate(&image.replace(&target, &host)).await, Ok(json!("loaded")));
    browser.close().await;
    server.stop().await;
}
