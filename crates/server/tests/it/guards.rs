//! Web pages can't drive the server: unknown hosts, other origins, content
//! types that forms can send.

use serde_json::json;
use stacyvm_server::{BodyRule, Secret, Server, ServerError, ServerOptions, route_list};

use crate::support::{Answer, Fixture, Request};

fn create(fixture: &Fixture) -> Request {
    fixture.api("POST", "/sandboxes").json(&json!({}))
}

fn refused(answer: &Answer) {
    assert_eq!(answer.failure(), (403, "FORBIDDEN".to_owned()));
}

#[tokio::test]
async fn unknown_hosts_are_refused_on_every_route() {
    let fixture = Fixture::open().await;
    let port = fixture.address.port();
    for host in ["evil.example", &format!("evil.example:{port}"), "127.0.0.1.nip.io", "192.168.0.1", "0.0.0.0"] {
        refused(&fixture.api("GET", "/sandboxes").header("Host", host).send().await);
        refused(&fixture.request("GET", "/swagger/").header("Host", host).send().await);
    }
    for host in ["localhost", &format!("LocalHost:{port}"), "[::1]:1", "127.0.0.1"] {
        assert_eq!(fixture.api("GET", "/sandboxes").header("Host", host).send().await.status, 200, "{host}");
    }
}

#[tokio::test]
async fn a_request_without_or_with_two_hosts_is_refused() {
    let fixture = Fixture::open().await;
    assert_eq!(fixture.api("GET", "/health").header("Host", "").send().await.status, 400);
    let twice = fixture.api("GET", "/health").header("X-Filler", "1\r\nHost: evil.example").send().await;
    assert_eq!(twice.status, 400, "{twice:?}");
    let absolute = fixture.request("GET", "http://evil.example/api/v1/health").send().await;
    assert!(matches!(absolute.status, 400 | 403), "{absolute:?}");
}

#[tokio::test]
async fn pages_of_other_origins_are_refused_for_reads_and_writes() {
    let fixture = Fixture::open().await;
    let port = fixture.address.port();
    let own = format!("http://127.0.0.1:{port}");
    let others = [
        "https://evil.example".to_owned(),
        format!("http://3000-sb-00000000000000000000.localhost:{port}"),
        "http://127.0.0.1:1".to_owned(),
        format!("http://localhost:{port}"),
        "null".to_owned(),
    ];
    for origin in &others {
        refused(&create(&fixture).header("Origin", origin).send().await);
        refused(&fixture.api("GET", "/sandboxes").header("Origin", origin).send().await);
    }
    for site in ["cross-site", "same-site", "nonsense"] {
        refused(&create(&fixture).header("Sec-Fetch-Site", site).send().await);
        refused(&fixture.api("GET", "/events").header("Sec-Fetch-Site", site).send().await);
    }
    let page = create(&fixture).header("Origin", &own).header("Sec-Fetch-Site", "same-origin");
    assert_eq!(page.send().await.status, 201);
    assert_eq!(fixture.api("GET", "/sandboxes").header("Sec-Fetch-Site", "none").send().await.status, 200);
}

#[tokio::test]
async fn web_sockets_of_other_origins_are_refused() {
    let fixture = Fixture::open().await;
    let id = fixture.sandbox().await;
    let handshake = |origin: &str| {
        fixture
            .api("GET", &format!("/sandboxes/{id}/exec/ws"))
            .header("Connection", "Upgrade")
            .header("Upgrade", "websocket")
            .header("Sec-WebSocket-Version", "13")
            .header("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ==")
            .header("Origin", origin)
    };
    refused(&handshake("https://evil.example").send().await);
    let live = handshake(&format!("http://{}", fixture.address)).open().await;
    assert_eq!(live.status, 101);
}

#[tokio::test]
async fn every_mutation_refuses_bodies_that_forms_can_send() {
    let fixture = Fixture::open().await;
    let forms = [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "text/plain;application/json",
    ];
    for route in route_list().into_iter().filter(|route| !matches!(route.method.as_str(), "GET" | "HEAD")) {
        let target =
            route.path.replace("{id}", "sb-00000000000000000000").replace("{exec_id}", "ex-00000000000000000000");
        let request = || fixture.request(route.method.as_str(), &target);
        for content_type in forms {
            for body in ["{}", ""] {
                let answer = request().header("Content-Type", content_type).body(body).send().await;
                assert_eq!(answer.failure(), (415, "UNSUPPORTED_MEDIA_TYPE".to_owned()), "{} {target}", route.method);
            }
        }
        if route.body != BodyRule::Upload {
            let answer = request().body("{}").send().await;
            assert_eq!(answer.status, 415, "a body without a type: {} {target}", route.method);
        }
    }
}

#[tokio::test]
async fn json_may_have_a_charset_and_bodies_may_be_missing_where_they_are_optional() {
    let fixture = Fixture::open().await;
    let request = fixture.api("POST", "/sandboxes").header("Content-Type", "application/json; charset=utf-8");
    assert_eq!(request.body("{}").send().await.status, 201);
    for (method, path) in [("POST", "/providers/test"), ("DELETE", "/sandboxes"), ("DELETE", "/sandboxes/sb-0")] {
        assert_eq!(fixture.api(method, path).send().await.status, 200, "{method} {path}");
    }
    assert_eq!(fixture.api("POST", "/providers/test").json(&json!({})).send().await.status, 200);
    // Published SDKs spawn from templates with an empty body.
    let unknown = fixture.api("POST", "/templates/none/spawn").send().await;
    assert_eq!(unknown.failure(), (404, "NOT_FOUND".to_owned()));
}

#[tokio::test]
async fn listed_origins_get_cors_and_preflights_need_no_key() {
    let options = ServerOptions {
        api_key: Secret::new("k"),
        cors_origins: vec!["https://app.example".to_owned()],
        ..ServerOptions::default()
    };
    let fixture = Fixture::with_options(options).await;
    let preflight = |origin: &str| {
        fixture.api("OPTIONS", "/sandboxes").header("Origin", origin).header("Access-Control-Request-Method", "POST")
    };
    let answer = preflight("https://app.example").send().await;
    assert_eq!((answer.status, answer.body.len()), (200, 0));
    assert_eq!(answer.header("access-control-allow-origin"), Some("https://app.example"));
    assert!(answer.header("access-control-allow-methods").unwrap().contains("PATCH"));
    assert!(answer.header("access-control-allow-headers").unwrap().contains("X-API-Key"));
    refused(&preflight("https://evil.example").send().await);

    let call = fixture.api("GET", "/sandboxes").header("Origin", "https://app.example").header("X-API-Key", "k");
    let answer = call.header("Sec-Fetch-Site", "cross-site").send().await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("access-control-allow-origin"), Some("https://app.example"));
    assert_eq!(answer.header("vary"), Some("Origin"));
    let without_key = fixture.api("GET", "/sandboxes").header("Origin", "https://app.example").send().await;
    assert_eq!(without_key.failure(), (401, "UNAUTHORIZED".to_owned()));
    assert_eq!(without_key.header("access-control-allow-origin"), Some("https://app.example"), "pages can read why");
}

#[tokio::test]
async fn errors_carry_cors_headers_so_that_pages_can_read_why() {
    let options = ServerOptions {
        api_key: Secret::new("k"),
        cors_origins: vec!["https://app.example".to_owned()],
        ..ServerOptions::default()
    };
    let fixture = Fixture::with_options(options).await;
    let page = |method: &str, path: &str| fixture.api(method, path).header("Origin", "https://app.example");
    let too_large = vec![b'x'; (1 << 20) + 1];
    for (request, status) in [
        (page("GET", "/sandboxes"), 401),
        (page("GET", "/nothing").key("k"), 404),
        (page("PUT", "/sandboxes").key("k"), 405),
        (page("POST", "/sandboxes").key("k").body("x").header("Content-Type", "text/plain"), 415),
        (page("POST", "/sandboxes").key("k").body("x").header("Content-Type", "application/json"), 400),
        (page("POST", "/sandboxes").key("k").body(too_large).header("Content-Type", "application/json"), 413),
        (page("OPTIONS", "/sandboxes").key("k"), 405),
    ] {
        let answer = request.send().await;
        assert_eq!(answer.status, status);
        assert_eq!(answer.header("access-control-allow-origin"), Some("https://app.example"), "{status}");
        assert!(answer.header("access-control-expose-headers").unwrap().contains("X-Request-ID"), "{status}");
        assert_eq!(answer.header("access-control-allow-credentials"), None, "keys are headers, not cookies");
        answer.failure();
    }
}

#[tokio::test]
async fn any_origin_works_with_a_stored_key() {
    let open = Fixture::open().await;
    open.stored_key("root", &["read", "api", "admin"]).await;
    let options = ServerOptions { cors_origins: vec!["*".to_owned()], port: 0, ..ServerOptions::default() };
    let fixture = open.on_engine(options).await;
    let reader = fixture.stored_key("page", &["read"]).await;
    let call = fixture.api("GET", "/sandboxes").header("Origin", "https://any.example").key(&reader).send().await;
    assert_eq!((call.status, call.header("access-control-allow-origin")), (200, Some("*")));
    let refused = fixture.api("POST", "/sandboxes").header("Origin", "https://any.example").key(&reader);
    let refused = refused.json(&json!({})).send().await;
    assert_eq!((refused.status, refused.header("access-control-allow-origin")), (403, Some("*")));
}

#[tokio::test]
async fn binding_beyond_loopback_or_to_every_origin_needs_a_key() {
    let fixture = Fixture::open().await;
    let bind = |options: ServerOptions| Server::bind(ServerOptions { port: 0, ..options }, fixture.engine.clone());
    let beyond = |api_key| ServerOptions { host: "0.0.0.0".to_owned(), api_key, ..ServerOptions::default() };
    let Err(error) = bind(beyond(None)).await else { panic!("bound without a key") };
    assert!(matches!(error, ServerError::OpenBeyondLoopback { .. }));
    let message = error.to_string();
    assert!(message.contains("auth.api_key") && message.contains("127.0.0.1"), "{message}");
    assert!(bind(beyond(Secret::new("k"))).await.is_ok());
    assert!(bind(beyond(Secret::new("  "))).await.is_err(), "blank text is no key");

    let every = |api_key| ServerOptions { cors_origins: vec!["*".to_owned()], api_key, ..ServerOptions::default() };
    assert!(matches!(bind(every(None)).await, Err(ServerError::OpenToEveryOrigin)));
    assert!(bind(every(Secret::new("k"))).await.is_ok());

    let taken = ServerOptions { port: fixture.address.port(), ..ServerOptions::default() };
    let Err(error) = Server::bind(taken, fixture.engine.clone()).await else { panic!("bound twice") };
    assert!(error.to_string().contains("another program listens there"), "{error}");
}
