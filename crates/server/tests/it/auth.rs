//! Every route with every kind of key, with keys and without.

use stacyvm_server::{AdminFallback, BodyRule, ProbeAccess, RouteInfo, Scope, Secret, ServerOptions, route_list};

use crate::support::{Answer, Fixture};

/// A path of the route that can be asked for. Ids in it name nothing.
fn path_of(route: &RouteInfo) -> String {
    route
        .path
        .replace("{id}", "sb-00000000000000000000")
        .replace("{exec_id}", "ex-00000000000000000000")
        .replace("{port}", "3000")
        .replace("{name}", "none")
        .replace("{owner_id}", "nobody")
        .replace("{key_id}", "key-00000000000000000000")
        .replace("{*path}", "index.html")
}

async fn ask(fixture: &Fixture, route: &RouteInfo, headers: &[(&str, &str)]) -> Answer {
    let mut request = fixture.request(route.method.as_str(), &path_of(route));
    match route.body {
        // A blank body fails later than a missing scope, which is what counts.
        BodyRule::Json | BodyRule::FileJson => request = request.header("Content-Type", "application/json").body("{}"),
        BodyRule::Upload => request = request.header("X-StacyVM-Upload", "1"),
        BodyRule::None | BodyRule::OptionalJson => {}
    }
    for (name, value) in headers {
        request = request.header(name, value);
    }
    // Streams never end by themselves; the status is all that is needed.
    let live = request.open().await;
    Answer { status: live.status, headers: live.headers, body: Vec::new(), trailers: Vec::new() }
}

/// What the table promises for a scope to a caller with these scopes; none are
/// those of nobody.
fn admitted(scope: Scope, held: &[&str]) -> bool {
    match scope {
        Scope::Public | Scope::Probe => true,
        Scope::Read | Scope::Api | Scope::Admin => held.contains(&scope.name()),
    }
}

const READ: &str = "read:*";
const API: &str = "api:*";
const ADMIN: &str = "admin:*";

#[tokio::test]
async fn every_route_admits_exactly_the_keys_with_its_scope() {
    let fixture = Fixture::with_keys("user-key", "root-key").await;
    let unknown = format!("e2b_{}", "0".repeat(40));
    let (api_header, admin_header) = ("X-API-Key", "X-Admin-API-Key");
    let mut callers: Vec<(&str, String, Vec<&str>)> = vec![
        (api_header, String::new(), vec![]),
        (api_header, "wrong".to_owned(), vec![]),
        (api_header, unknown, vec![]),
        ("Authorization", "Bearer user-key".to_owned(), vec![]),
        (api_header, "user-key".to_owned(), vec![READ, API]),
        (api_header, "root-key".to_owned(), vec![READ, API, ADMIN]),
        (admin_header, "root-key".to_owned(), vec![READ, API, ADMIN]),
    ];
    for held in [vec![READ], vec![API], vec![ADMIN], vec![READ, API], vec![READ, ADMIN], vec![READ, API, ADMIN]] {
        let key = fixture.stored_key(&format!("k{}", callers.len()), &held).await;
        callers.push((api_header, key.clone(), held.clone()));
        callers.push((admin_header, key, held));
    }
    for route in route_list() {
        for (header, key, held) in &callers {
            let answer = ask(&fixture, &route, &[(header, key)]).await;
            let refused = matches!(answer.status, 401 | 403);
            let what = format!("{} {} with {held:?} in {header}: {}", route.method, route.path, answer.status);
            assert_eq!(!refused, admitted(route.scope, held), "{what}");
            if refused {
                assert_eq!(answer.status, if held.is_empty() { 401 } else { 403 }, "{what}");
            }
        }
    }
}

#[tokio::test]
async fn a_stored_key_alone_closes_every_route_to_others() {
    let fixture = Fixture::with_keys("", "").await;
    let key = fixture.stored_key("root", &[READ, API, ADMIN]).await;
    for route in route_list() {
        let open = matches!(route.scope, Scope::Public | Scope::Probe);
        let anonymous = ask(&fixture, &route, &[]).await.status;
        assert_eq!(anonymous == 401, !open, "{} {}: {anonymous}", route.method, route.path);
        let holder = ask(&fixture, &route, &[("X-API-Key", &key)]).await.status;
        assert!(!matches!(holder, 401 | 403), "{} {}: {holder}", route.method, route.path);
    }
}

#[tokio::test]
async fn without_keys_every_route_is_open() {
    let fixture = Fixture::open().await;
    for route in route_list() {
        for headers in [&[][..], &[("X-API-Key", "anything")][..]] {
            let answer = ask(&fixture, &route, headers).await;
            assert!(!matches!(answer.status, 401 | 403), "{} {}: {}", route.method, route.path, answer.status);
        }
    }
}

#[tokio::test]
async fn an_admin_key_alone_closes_every_route_to_others() {
    let fixture = Fixture::with_keys("", "root-key").await;
    for route in route_list() {
        let open = matches!(route.scope, Scope::Public | Scope::Probe);
        let anonymous = ask(&fixture, &route, &[]).await.status;
        assert_eq!(anonymous == 401, !open, "{} {}: {anonymous}", route.method, route.path);
        let admin = ask(&fixture, &route, &[("X-API-Key", "root-key")]).await.status;
        assert!(!matches!(admin, 401 | 403), "{} {}: {admin}", route.method, route.path);
    }
}

#[tokio::test]
async fn the_api_key_opens_admin_routes_only_under_fallback() {
    for (fallback, status) in [(AdminFallback::Enabled, 200), (AdminFallback::Disabled, 403)] {
        let options = ServerOptions { api_key: Secret::new("k"), admin_fallback: fallback, ..ServerOptions::default() };
        let fixture = Fixture::with_options(options).await.with_key("k");
        assert_eq!(fixture.get("/admin/providers").await.status, status);
    }
}

#[tokio::test]
async fn probes_can_be_closed() {
    let options =
        ServerOptions { api_key: Secret::new("k"), probes: ProbeAccess::Authenticated, ..ServerOptions::default() };
    let fixture = Fixture::with_options(options).await;
    for path in ["/live", "/health", "/ready", "/version"] {
        assert_eq!(fixture.get(path).await.failure(), (401, "UNAUTHORIZED".to_owned()), "{path}");
    }
}

#[tokio::test]
async fn unknown_paths_show_themselves_only_to_callers_with_a_key() {
    let fixture = Fixture::with_keys("k", "").await;
    assert_eq!(fixture.get("/nothing").await.failure(), (401, "UNAUTHORIZED".to_owned()));
    assert_eq!(fixture.api("PUT", "/sandboxes").send().await.failure(), (401, "UNAUTHORIZED".to_owned()));
    let fixture = fixture.with_key("k");
    assert_eq!(fixture.get("/nothing").await.failure(), (404, "NOT_FOUND".to_owned()));
    let answer = fixture.api("PUT", "/sandboxes").send().await;
    assert_eq!(answer.failure(), (405, "METHOD_NOT_ALLOWED".to_owned()));
    let allowed = answer.header("allow").unwrap();
    for method in ["GET", "POST", "DELETE"] {
        assert!(allowed.contains(method), "{allowed}");
    }
}

#[tokio::test]
async fn keys_are_never_written_to_answers() {
    let fixture = Fixture::with_keys("user-key", "root-key").await.with_key("root-key");
    for path in ["/diagnostics", "/metrics", "/metrics/prometheus", "/providers", "/version"] {
        let answer = fixture.get(path).await;
        assert_eq!(answer.status, 200, "{path}");
        assert!(!answer.text().contains("user-key") && !answer.text().contains("root-key"), "{path}");
    }
}
