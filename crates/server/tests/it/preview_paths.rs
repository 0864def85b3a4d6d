//! Previews by path, on a listener of their own.

use std::fmt::Write as _;

use serde_json::json;
use stacyvm_server::{PreviewOptions, Secret, ServerOptions};

use crate::guest::{Guest, PORT, Preview, field, previews};
use crate::support::{Answer, Fixture, Request};

const POLICY: &str = "sandbox allow-scripts allow-forms allow-popups allow-downloads";

fn with_paths() -> ServerOptions {
    let preview = PreviewOptions { path_port: Some(0), ..previews().preview };
    ServerOptions { preview, ..ServerOptions::default() }
}

impl Preview {
    /// A request on the listener for paths.
    fn by_path(&self, method: &str, path: &str) -> Request {
        let address = self.fixture.preview_address.unwrap();
        self.fixture.request(method, path).to(address).header("Host", &format!("localhost:{}", address.port()))
    }

    fn path(&self, rest: &str) -> String {
        format!("/{}/{PORT}{rest}", self.id)
    }
}

/// Whatever it is, its page is of no origin that matters.
fn is_confined(answer: &Answer) {
    let policies = answer.headers.iter().filter(|(name, _)| name == "content-security-policy");
    assert!(policies.clone().any(|(_, value)| value == POLICY), "{answer:?}");
}

#[tokio::test]
async fn a_path_names_a_port_and_the_guest_sees_the_rest_of_it() {
    let preview = Preview::with_options(&Guest::echoing().await, with_paths()).await;
    let answer = preview.by_path("GET", &preview.path("/a/b?c=1")).header("Cookie", "shared=1").send().await;
    let head = answer.text();
    assert!(answer.status == 200 && head.starts_with("GET /a/b?c=1 HTTP/1.1\r\n"), "{head}");
    assert_eq!(field(head, "x-forwarded-prefix"), Some(preview.path("").as_str()));
    assert_eq!(field(head, "cookie"), None, "all guests share the host's cookies");
    is_confined(&answer);

    let bare = preview.by_path("GET", &preview.path("?x=1")).send().await;
    assert_eq!((bare.status, bare.header("location")), (303, Some(preview.path("/?x=1").as_str())));
    is_confined(&bare);
}

#[tokio::test]
async fn what_a_guest_answers_stays_below_its_path() {
    let answer = "HTTP/1.1 302 Found\r\nLocation: /login\r\nContent-Length: 0\r\nSet-Cookie: a=1\r\n\
                  Content-Security-Policy: default-src 'self'\r\n\r\n";
    let preview = Preview::with_options(&Guest::answering(answer).await, with_paths()).await;
    let answer = preview.by_path("GET", &preview.path("/")).send().await;
    assert_eq!((answer.status, answer.header("location")), (302, Some(preview.path("/login").as_str())));
    assert_eq!(answer.header("set-cookie"), None);
    assert_eq!(answer.header("content-security-policy"), Some("default-src 'self'"), "its own policy holds too");
    is_confined(&answer);
}

/// Browsers keep these for the origin, which is every guest's.
#[tokio::test]
async fn what_a_guest_answers_is_kept_for_no_other_guest() {
    let kept = [
        ("NEL", r#"{"report_to":"g","max_age":9999,"success_fraction":1.0}"#),
        ("Report-To", r#"{"group":"g","max_age":9999,"endpoints":[{"url":"https://collector.example"}]}"#),
        ("Reporting-Endpoints", r#"g="https://collector.example""#),
        ("WWW-Authenticate", r#"Basic realm="app""#),
        ("Authentication-Info", "nextnonce=\"1\""),
        ("Proxy-Authenticate", r#"Basic realm="app""#),
        ("Strict-Transport-Security", "max-age=9999"),
        ("Accept-CH", "Sec-CH-UA-Model"),
        ("Service-Worker-Allowed", "/"),
        ("Use-As-Dictionary", r#"match="/*""#),
        ("Clear-Site-Data", r#""*""#),
    ];
    let mut head = String::from("HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\nPermissions-Policy: camera=()\r\n");
    for (name, value) in kept {
        write!(head, "{name}: {value}\r\n").unwrap();
    }
    let preview = Preview::with_options(&Guest::answering(format!("{head}\r\n")).await, with_paths()).await;
    let answer = preview.by_path("GET", &preview.path("/")).send().await;
    assert_eq!(answer.status, 401);
    for (name, _) in kept {
        assert_eq!(answer.header(&name.to_lowercase()), None, "{name}");
    }
    assert_eq!(answer.header("permissions-policy"), Some("camera=()"), "what holds for one page passes");
    let by_name = preview.request("GET", "/").send().await;
    assert_eq!(by_name.header("www-authenticate"), Some(r#"Basic realm="app""#), "a host of its own has its own");
    assert_eq!(by_name.header("nel"), None, "addresses hold tokens");
}

/// A browser sends what was typed for another guest; a program, what it was told.
#[tokio::test]
async fn credentials_of_a_browser_reach_no_guest_by_path() {
    let preview = Preview::with_options(&Guest::echoing().await, with_paths()).await;
    let seen = async |credentials: &str, is_browser: bool| {
        let mut request = preview.by_path("GET", &preview.path("/")).header("Authorization", credentials);
        if is_browser {
            request = request.header("Sec-Fetch-Mode", "navigate");
        }
        field(request.send().await.text(), "authorization").map(str::to_owned)
    };
    assert_eq!(seen("Basic YTpi", false).await.as_deref(), Some("Basic YTpi"));
    assert_eq!(seen("Bearer a", true).await.as_deref(), Some("Bearer a"), "a page's script writes that");
    assert_eq!(seen("Basic YTpi", true).await, None);
    let by_name =
        preview.request("GET", "/").header("Authorization", "Basic YTpi").header("Sec-Fetch-Mode", "navigate");
    assert_eq!(field(by_name.send().await.text(), "authorization"), Some("Basic YTpi"));
}

#[tokio::test]
async fn the_listener_shows_previews_and_nothing_else() {
    let preview = Preview::with_options(&Guest::echoing().await, with_paths()).await;
    for path in ["/", "/api/v1/sandboxes", "/api/v1/live", "/metrics", "/sb-00000000000000000000/3000/", "/x/y/z"] {
        let answer = preview.by_path("GET", path).send().await;
        assert_eq!(answer.failure(), (404, "NOT_FOUND".to_owned()), "{path}");
        is_confined(&answer);
    }
    let page = preview.by_path("GET", &format!("/{}/8080/", preview.id)).header("Accept", "text/html").send().await;
    assert!(page.status == 502 && page.text().contains("nothing listens"), "{page:?}");
    is_confined(&page);
    for host in ["evil.example".to_owned(), preview.host(PORT)] {
        let answer = preview.by_path("GET", &preview.path("/")).header("Host", &host).send().await;
        assert_eq!(answer.failure(), (403, "FORBIDDEN".to_owned()), "{host}");
        is_confined(&answer);
    }
    let main = preview.fixture.request("GET", &preview.path("/")).send().await;
    assert_eq!(main.failure().0, 404, "and the API's listener knows no such paths");
}

/// A server with a key and no names for previews.
async fn without_a_domain(guest: &Guest) -> Preview {
    let preview = PreviewOptions { path_port: Some(0), ..PreviewOptions::default() };
    let options = ServerOptions { api_key: Secret::new("the-key"), preview, ..ServerOptions::default() };
    Preview::on(guest, Fixture::with_options(options).await.with_key("the-key")).await
}

#[tokio::test]
async fn without_a_domain_addresses_and_links_are_paths() {
    let preview = without_a_domain(&Guest::echoing().await).await;
    let api = format!("/sandboxes/{}/ports/{PORT}", preview.id);
    let paths = preview.fixture.preview_address.unwrap().port();
    for host in ["127.0.0.1", "localhost", "[::1]"] {
        let called = format!("{host}:{}", preview.fixture.address.port());
        let port = preview.fixture.api("GET", &api).header("Host", &called).send().await.expect(200);
        assert_eq!(port["url"], format!("http://{host}:{paths}{}", preview.path("/")));
    }
    let agent = preview.fixture.get(&format!("/sandboxes/{}/ports/49983", preview.id)).await.expect(200);
    assert_eq!(agent.get("url"), None);
    let link = preview.fixture.post(&format!("{api}/link"), &json!({})).await.expect(201);
    let (url, token) = (link["url"].as_str().unwrap(), link["token"].as_str().unwrap());
    assert_eq!(url, format!("http://127.0.0.1:{paths}{}?stacyvm_token={token}", preview.path("/")));

    // A program is let in at once; a browser goes on to where the page's own
    // links carry the token.
    let stranger = |path: &str| preview.by_path("GET", path).header("X-API-Key", "");
    let behind = url.split_once(&format!(":{paths}")).unwrap().1;
    let opened = stranger(behind).send().await;
    assert!(opened.status == 200 && !opened.text().contains(token), "{opened:?}");
    let sent_on = stranger(&format!("{behind}&a=1")).header("Accept", "text/html").send().await;
    let inside = format!("/{}/{PORT}~{token}/", preview.id);
    assert_eq!((sent_on.status, sent_on.header("location")), (303, Some(format!("{inside}?a=1").as_str())));
    assert_eq!((sent_on.header("set-cookie"), sent_on.header("referrer-policy")), (None, Some("no-referrer")));
    is_confined(&sent_on);
    let asset = stranger(&format!("{inside}style.css")).send().await;
    assert!(asset.text().starts_with("GET /style.css HTTP/1.1") && !asset.text().contains(token), "{asset:?}");
    assert_eq!(asset.header("referrer-policy"), Some("no-referrer"));
    is_confined(&asset);
    let other = stranger(&format!("/{}/8080~{token}/", preview.id)).send().await;
    assert_eq!(other.failure(), (401, "UNAUTHORIZED".to_owned()), "it is of another port");
    assert_eq!(stranger(&preview.path("/")).send().await.failure().0, 401);
}

#[tokio::test]
async fn what_a_guest_sends_on_to_carries_the_token() {
    let answer = "HTTP/1.1 302 Found\r\nLocation: /login\r\nReferrer-Policy: unsafe-url\r\nContent-Length: 0\r\n\r\n";
    let preview = without_a_domain(&Guest::answering(answer).await).await;
    let link = preview.fixture.post(&format!("/sandboxes/{}/ports/{PORT}/link", preview.id), &json!({})).await;
    let token = link.expect(201)["token"].as_str().unwrap().to_owned();
    let inside = format!("/{}/{PORT}~{token}", preview.id);
    let answer = preview.by_path("GET", &format!("{inside}/")).header("X-API-Key", "").send().await;
    assert_eq!((answer.status, answer.header("location")), (302, Some(format!("{inside}/login").as_str())));
    assert_eq!(answer.header("referrer-policy"), Some("no-referrer"));
}

#[tokio::test]
async fn cookies_open_nothing_and_headers_do() {
    let options = ServerOptions { api_key: Secret::new("the-key"), ..with_paths() };
    let guest = Guest::echoing().await;
    let preview = Preview::on(&guest, Fixture::with_options(options).await.with_key("the-key")).await;
    let link = preview.fixture.post(&format!("/sandboxes/{}/ports/{PORT}/link", preview.id), &json!({})).await;
    let token = link.expect(201)["token"].as_str().unwrap().to_owned();
    let stranger = |path: &str| preview.by_path("GET", &preview.path(path)).header("X-API-Key", "");
    assert_eq!(stranger("/").send().await.failure().0, 401);
    let cookie = format!("__Host-stacyvm-preview={token}");
    assert_eq!(stranger("/").header("Cookie", &cookie).send().await.failure().0, 401);
    let opened = stranger("/").header("e2b-traffic-access-token", &token).send().await;
    assert!(opened.status == 200 && !opened.text().contains(&token), "{opened:?}");
    let opened = stranger("/").header("X-API-Key", "the-key").send().await;
    assert!(opened.status == 200 && !opened.text().contains("the-key"), "{opened:?}");
}
