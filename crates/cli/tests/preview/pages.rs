//! A page with assets, a WebSocket and server-sent events, as people see it.

use serde_json::{Value, json};
use stacyvm_client::SandboxClient;

use crate::browser::Browser;
use crate::server::{PORT, Server, site, start_site};

#[tokio::test(flavor = "multi_thread")]
async fn a_browser_shows_what_a_sandbox_without_a_network_serves() {
    let server = Server::start(None).await;
    let sandbox = server.sandbox().await;
    look_at_a_site(&server, &sandbox, "preview").await;
    server.stop().await;
}

/// From before the site listens; `name` begins the names of the pictures.
pub(crate) async fn look_at_a_site(server: &Server, sandbox: &SandboxClient, name: &str) {
    let browser = Browser::start();
    let host = server.host(sandbox, PORT);
    let page = browser.open(&format!("http://{host}/")).await;

    // Nothing listens yet: the page says so, and looks again by itself.
    page.until("document.querySelector('h1').textContent.includes('nothing listens on port')", &json!(true)).await;
    page.screenshot(&format!("{name}-waiting.png")).await;
    start_site(sandbox, PORT).await;
    page.until("document.title", &json!("Inside")).await;

    page.until("document.getElementById('socket').textContent", &json!("echo: hello")).await;
    page.until("document.getElementById('ticks').textContent", &json!("5")).await;
    page.until("document.getElementById('upload').textContent", &json!("5242880 bytes")).await;
    page.until("getComputedStyle(document.querySelector('h1')).color", &json!("rgb(0, 102, 51)")).await;
    page.until("document.getElementById('image').naturalWidth", &json!(48)).await;
    page.until("document.getElementById('headers').textContent.length > 10", &json!(true)).await;
    let headers = page.evaluate("JSON.parse(document.getElementById('headers').textContent)").await.unwrap();
    let header = |name: &str| {
        let found = headers.as_object().unwrap().iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str().unwrap_or_default().to_owned())
    };
    assert_eq!(header("host"), Some(host.clone()), "{headers}");
    assert_eq!((header("x-forwarded-host"), header("x-forwarded-proto")), (Some(host), Some("http".to_owned())));
    // The cookie that the site set for the whole domain is its own host's.
    assert_eq!(page.evaluate("document.cookie").await.unwrap(), json!("site=1"));
    page.screenshot(&format!("{name}-page.png")).await;

    site(sandbox, PORT + 1).await;
    let other = browser.open(&format!("http://{}/image.svg", server.host(sandbox, PORT + 1))).await;
    let seen =
        "fetch('/headers').then(answer => answer.json()).then(headers => headers.Cookie || headers.cookie || null)";
    other.until("location.pathname", &json!("/image.svg")).await;
    let cookies = other.evaluate(seen).await.unwrap();
    assert_eq!(cookies, json!("site=1"), "its own, and only once");
    browser.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_by_path_opens_a_page_with_what_it_links_to() {
    let server = Server::start_without_domain(Some("the-key")).await;
    let sandbox = server.sandbox().await;
    site(&sandbox, PORT).await;
    let link = sandbox.port_link(PORT, None).await.expect("a link");
    let begin = format!("http://127.0.0.1:{}/{}/{PORT}/?", server.path_port, sandbox.id());
    assert!(link.url.starts_with(&begin), "{}", link.url);
    let browser = Browser::start();
    let page = browser.open(&link.url.replace("/?", "/relative?")).await;
    page.until("document.title", &json!("Inside")).await;
    page.until("getComputedStyle(document.querySelector('h1')).color", &json!("rgb(0, 102, 51)")).await;
    page.until("document.getElementById('image').naturalWidth", &json!(48)).await;
    assert_eq!(page.evaluate("self.origin").await, Ok(json!("null")));
    browser.close().await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_by_path_has_an_origin_of_its_own() {
    let server = Server::start(None).await;
    let sandbox = server.sandbox().await;
    site(&sandbox, PORT).await;
    let browser = Browser::start();
    let page = browser.open(&format!("http://localhost:{}/{}/{PORT}/", server.path_port, sandbox.id())).await;
    page.until("document.title", &json!("Inside")).await;
    assert_eq!(page.evaluate("self.origin").await, Ok(json!("null")));
    for denied in ["document.cookie", "localStorage.length"] {
        let error = page.evaluate(denied).await.unwrap_err();
        assert!(error.contains("SecurityError"), "{denied}: {error}");
    }
    // It is no page of the API's host, although they have a name in common.
    let api = format!("fetch('http://localhost:{}/api/v1/sandboxes').then(answer => answer.status)", server.port);
    let refused: Result<Value, String> = page.evaluate(&api).await;
    assert!(refused.is_err(), "{refused:?}");
    browser.close().await;
    server.stop().await;
}
