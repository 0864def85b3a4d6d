//! Who may open a preview: public ports, keys, signed links and the cookies that
//! browsers get for them.

use serde_json::json;
use stacyvm_server::{PreviewOptions, Secret, ServerOptions};

use crate::guest::{Guest, PORT, Preview, field, previews};
use crate::support::{Answer, Fixture, Request};

/// A server with a key, where a port that nobody spoke of wants a token.
async fn guarded(guest: &Guest) -> Preview {
    let options = ServerOptions { api_key: Secret::new("the-key"), admin_api_key: Secret::new("root"), ..previews() };
    Preview::on(guest, Fixture::with_options(options).await.with_key("the-key")).await
}

impl Preview {
    /// A request to the guest that shows no key.
    fn stranger(&self, method: &str, path: &str) -> Request {
        self.request(method, path).header("X-API-Key", "")
    }

    fn api_path(&self, port: u16, rest: &str) -> String {
        format!("/sandboxes/{}/ports/{port}{rest}", self.id)
    }

    async fn token(&self, port: u16, ttl: &str) -> String {
        let link = self.fixture.post(&self.api_path(port, "/link"), &json!({ "ttl": ttl })).await.expect(201);
        link["token"].as_str().unwrap().to_owned()
    }

    /// Opens a link as a browser does; the cookie it gets.
    async fn cookie(&self) -> String {
        let path = format!("/?stacyvm_token={}", self.token(PORT, "1h").await);
        let answer = self.stranger("GET", &path).header("Accept", "text/html").send().await;
        assert_eq!(answer.status, 303, "{answer:?}");
        answer.header("set-cookie").unwrap().split(';').next().unwrap().to_owned()
    }
}

fn is_refused(answer: &Answer, status: u16) {
    let code = if status == 401 { "UNAUTHORIZED" } else { "FORBIDDEN" };
    assert_eq!(answer.failure(), (status, code.to_owned()), "{answer:?}");
}

#[tokio::test]
async fn without_keys_ports_are_public_until_somebody_closes_them() {
    let preview = Preview::of(&Guest::echoing().await).await;
    assert_eq!(preview.request("GET", "/").send().await.status, 200);
    let port = preview.fixture.get(&preview.api_path(PORT, "")).await.expect(200);
    assert_eq!((&port["access"], &port["listening"]), (&json!("public"), &json!(true)));

    let set = json!({ "access": "token" });
    let closed = preview.fixture.api("PUT", &preview.api_path(PORT, "")).json(&set).send().await.expect(200);
    assert_eq!(closed["access"], "token");
    is_refused(&preview.request("GET", "/").send().await, 401);
    is_refused(&preview.request("GET", "/").header("X-API-Key", "any").send().await, 401);
    let token = preview.token(PORT, "1m").await;
    let opened = preview.request("GET", "/").header("E2B-Traffic-Access-Token", &token).send().await;
    assert_eq!(opened.status, 200);
}

#[tokio::test]
async fn with_keys_ports_want_a_key_or_a_token_and_guests_see_neither() {
    let guest = Guest::echoing().await;
    let preview = guarded(&guest).await;
    is_refused(&preview.stranger("GET", "/").send().await, 401);
    is_refused(&preview.request("GET", "/").header("X-API-Key", "wrong").send().await, 401);
    let page = preview.stranger("GET", "/").header("Accept", "text/html").send().await;
    assert!(page.status == 401 && page.text().contains("is not public") && !page.text().contains("refresh"));
    assert_eq!(guest.connections(), 0, "nobody came through");

    let token = preview.token(PORT, "1h").await;
    for (name, value) in [
        ("X-API-Key", "the-key"),
        ("X-API-Key", "root"),
        ("X-Admin-API-Key", "root"),
        ("e2b-traffic-access-token", token.as_str()),
    ] {
        let answer = preview.stranger("GET", "/").header(name, value).send().await;
        assert_eq!(answer.status, 200, "{name}: {value}");
        assert!(!answer.text().contains(value) && field(answer.text(), name).is_none(), "{}", answer.text());
    }
    let in_address = preview.stranger("GET", &format!("/x?a=1&stacyvm_token={token}&b=2")).send().await;
    assert!(in_address.text().starts_with("GET /x?a=1&b=2 HTTP/1.1"), "{in_address:?}");

    let open = json!({ "access": "public" });
    preview.fixture.api("PUT", &preview.api_path(PORT, "")).json(&open).send().await.expect(200);
    let public = preview.request("GET", "/").send().await;
    assert!(public.status == 200 && !public.text().contains("the-key"), "keys are kept from public ports too");
}

#[tokio::test]
async fn a_browser_gets_a_cookie_for_a_link_and_loses_the_token() {
    let guest = Guest::echoing().await;
    let preview = guarded(&guest).await;
    let link = preview.fixture.post(&preview.api_path(PORT, "/link"), &json!({ "ttl": "2h" })).await.expect(201);
    let token = link["token"].as_str().unwrap();
    let url = format!("http://{}/?stacyvm_token={token}", preview.host(PORT));
    assert_eq!(link["url"].as_str(), Some(url.as_str()));

    let path = format!("/page?a=1&stacyvm_token={token}&b=%2F");
    let answer = preview.stranger("GET", &path).header("Accept", "text/html").send().await;
    assert_eq!((answer.status, answer.header("location")), (303, Some("/page?a=1&b=%2F")), "{answer:?}");
    assert_eq!(
        (answer.header("cache-control"), answer.header("referrer-policy")),
        (Some("no-store"), Some("no-referrer"))
    );
    assert_eq!(guest.connections(), 0);
    let cookie = answer.header("set-cookie").unwrap();
    assert!(cookie.starts_with(&format!("__Host-stacyvm-preview={token}; Path=/; Max-Age=7")), "{cookie}");
    assert!(cookie.ends_with("; Secure; HttpOnly; SameSite=None; Partitioned"), "{cookie}");

    let pair = cookie.split(';').next().unwrap();
    let with_cookie = preview.stranger("GET", "/page").header("Cookie", &format!("a=1; {pair}; b=2")).send().await;
    assert_eq!((with_cookie.status, field(with_cookie.text(), "cookie")), (200, Some("a=1; b=2")));
    let alone = preview.stranger("GET", "/page").header("Cookie", pair).send().await;
    assert_eq!((alone.status, field(alone.text(), "cookie")), (200, None), "{alone:?}");
}

#[tokio::test]
async fn the_way_on_never_leads_to_another_host() {
    let preview = guarded(&Guest::echoing().await).await;
    let token = preview.token(PORT, "1h").await;
    for (path, location) in [
        ("//evil.example/", "/.//evil.example/"),
        ("///evil.example", "/.///evil.example"),
        ("/\\evil.example", "/./\\evil.example"),
        ("/ok", "/ok"),
    ] {
        let path = format!("{path}?stacyvm_token={token}");
        let answer = preview.stranger("GET", &path).header("Sec-Fetch-Mode", "navigate").send().await;
        assert_eq!((answer.status, answer.header("location")), (303, Some(location)), "{path}");
    }
}

#[tokio::test]
async fn a_token_opens_one_port_of_one_sandbox_for_its_time() {
    let guest = Guest::echoing().await;
    let preview = guarded(&guest).await;
    let other = preview.fixture.sandbox().await;
    let ask = |token: &str| preview.stranger("GET", "/").header("e2b-traffic-access-token", token).send();
    assert_eq!(ask(&preview.token(PORT, "1h").await).await.status, 200);
    is_refused(&ask(&preview.token(8080, "1h").await).await, 401);
    let of_other = preview.fixture.post(&format!("/sandboxes/{other}/ports/3000/link"), &json!({})).await.expect(201);
    is_refused(&ask(of_other["token"].as_str().unwrap()).await, 401);
    let mut changed = preview.token(PORT, "1h").await;
    changed.replace_range(changed.len() - 3..changed.len() - 2, "~");
    is_refused(&ask(&changed).await, 401);
    let page =
        preview.stranger("GET", &format!("/?stacyvm_token={changed}")).header("Accept", "text/html").send().await;
    assert!(page.status == 401 && page.text().contains("has expired, or is for another port"), "{page:?}");
    let cookie = format!("__Host-stacyvm-preview={changed}");
    is_refused(&preview.stranger("GET", "/").header("Cookie", &cookie).send().await, 401);

    let short = preview.token(PORT, "1s").await;
    crate::support::eventually("the token expires", || async { (ask(&short).await.status == 401).then_some(()) }).await;
}

#[tokio::test]
async fn a_session_serves_pages_of_its_own_sandbox_only() {
    let preview = guarded(&Guest::echoing().await).await;
    let cookie = preview.cookie().await;
    let port = preview.fixture.address.port();
    let (own, other_port) = (format!("http://{}", preview.host(PORT)), format!("http://{}", preview.host(8080)));
    let other_sandbox = format!("http://3000-sb-00000000000000000000.localhost:{port}");
    let ask = |method: &str, headers: &[(&str, &str)]| {
        let request = preview.stranger(method, "/").header("Cookie", &cookie);
        headers.iter().fold(request, |request, (name, value)| request.header(name, value)).send()
    };
    let socket = [("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-Fetch-Mode", "websocket")];
    for good in [
        &[("Origin", own.as_str())][..],
        &[("Origin", &other_port)],
        &[("Origin", &own), socket[0], socket[1], socket[2]],
        &[("Sec-Fetch-Site", "same-origin"), ("Sec-Fetch-Mode", "no-cors")],
        &[("Sec-Fetch-Site", "none"), ("Sec-Fetch-Mode", "navigate")],
        &[("Sec-Fetch-Site", "cross-site"), ("Sec-Fetch-Mode", "navigate")],
    ] {
        assert_eq!(ask("GET", good).await.status, 200, "{good:?}");
    }
    for bad in [
        &[("Origin", other_sandbox.as_str())][..],
        &[("Origin", &other_sandbox), socket[0], socket[1], socket[2]],
        &[("Origin", "null")],
        &[("Origin", "https://app.example")],
        &[("Sec-Fetch-Site", "same-site"), ("Sec-Fetch-Mode", "no-cors")],
        &[("Sec-Fetch-Site", "cross-site"), ("Sec-Fetch-Mode", "no-cors")],
    ] {
        is_refused(&ask("GET", bad).await, 403);
    }
    let form = [("Origin", other_sandbox.as_str()), ("Sec-Fetch-Site", "same-site"), ("Sec-Fetch-Mode", "navigate")];
    is_refused(&ask("POST", &form).await, 403);
    let form = [("Sec-Fetch-Site", "same-site"), ("Sec-Fetch-Mode", "navigate")];
    is_refused(&ask("POST", &form).await, 403);
}

#[tokio::test]
async fn the_api_says_where_ports_are_and_who_may_open_them() {
    let preview = guarded(&Guest::echoing().await).await;
    let url = |port: u16| format!("http://{}/", preview.host(port));
    let listed = preview.fixture.get(&format!("/sandboxes/{}/ports", preview.id)).await.expect(200);
    let entry = |port: u16| json!({ "port": port, "listening": true, "access": "token", "url": url(port) });
    assert_eq!(listed, json!([entry(7), entry(PORT)]));
    let closed = preview.fixture.get(&preview.api_path(9999, "")).await.expect(200);
    assert_eq!(closed, json!({ "port": 9999, "listening": false, "access": "token", "url": url(9999) }));

    for (path, body) in
        [("/0", json!({ "access": "token" })), ("/x", json!({ "access": "token" })), ("/3000", json!({}))]
    {
        let path = format!("/sandboxes/{}/ports{path}", preview.id);
        assert_eq!(preview.fixture.api("PUT", &path).json(&body).send().await.failure().0, 400, "{path} {body}");
    }
    for ttl in ["0s", "721h", "x"] {
        let link = preview.fixture.post(&preview.api_path(PORT, "/link"), &json!({ "ttl": ttl })).await;
        assert_eq!(link.failure(), (400, "BAD_REQUEST".to_owned()), "{ttl}");
    }
    let other_tenant = preview.fixture.api("POST", &preview.api_path(PORT, "/link")).header("X-Tenant-ID", "other");
    assert_eq!(other_tenant.send().await.failure().0, 404);
    // What published SDKs make of the record leads to the same place.
    let record = preview.fixture.get(&format!("/sandboxes/{}", preview.id)).await.expect(200);
    let domain = record["preview_domain"].as_str().unwrap();
    assert_eq!(format!("http://{PORT}-{}.{domain}/", preview.id), url(PORT));
    let listed = preview.fixture.get("/sandboxes").await.expect(200);
    assert_eq!(listed[0]["preview_domain"], domain);
    let unknown = preview.fixture.post("/sandboxes/sb-00000000000000000000/ports/1/link", &json!({})).await;
    assert_eq!(unknown.failure().0, 404);
}

#[tokio::test]
async fn behind_a_proxy_addresses_are_the_proxys() {
    let preview = PreviewOptions {
        domain: Some("preview.example.com".to_owned()),
        url: Some("https://preview.example.com".to_owned()),
        path_port: None,
    };
    let options = ServerOptions { preview, ..ServerOptions::default() };
    let preview = Preview::with_options(&Guest::echoing().await, options).await;
    let host = format!("3000-{}.preview.example.com", preview.id);
    let port = preview.fixture.get(&preview.api_path(PORT, "")).await.expect(200);
    assert_eq!(port["url"].as_str(), Some(format!("https://{host}/").as_str()));
    let record = preview.fixture.get(&format!("/sandboxes/{}", preview.id)).await.expect(200);
    assert_eq!(record["preview_domain"], "preview.example.com", "SDKs write http:// in front");
    let answer = preview.request("GET", "/").header("Host", &host).send().await;
    assert_eq!((answer.status, field(answer.text(), "x-forwarded-proto")), (200, Some("https")), "{answer:?}");
}
