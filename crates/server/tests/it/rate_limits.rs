//! How often callers may call, and that nobody can spend another's requests.

use std::num::NonZeroU32;
use std::time::Duration;

use serde_json::json;
use stacyvm_server::{RateLimitKey, RateLimitOptions, Secret, ServerOptions};

use crate::support::{Answer, Fixture};

/// Requests at once; so few a minute that none comes back during a test.
const BURST: u32 = 3;

async fn limited(key_by: RateLimitKey) -> Fixture {
    let count = |count| NonZeroU32::new(count).unwrap();
    let rate_limit = RateLimitOptions {
        requests_per_minute: count(1),
        burst: count(BURST),
        key_by,
        bucket_ttl: Duration::from_mins(15),
        cleanup_interval: Duration::from_mins(1),
    };
    let options = ServerOptions {
        api_key: Secret::new("user-key"),
        admin_api_key: Secret::new("root-key"),
        failures_per_minute: None,
        rate_limit: Some(rate_limit),
        trusted_proxies: vec!["127.0.0.1".to_owned()],
        cors_origins: vec!["https://app.example".to_owned()],
        ..ServerOptions::default()
    };
    Fixture::with_options(options).await
}

async fn ask(fixture: &Fixture, headers: &[(&str, &str)]) -> Answer {
    let mut request = fixture.api("GET", "/sandboxes");
    for (name, value) in headers {
        request = request.header(name, value);
    }
    request.send().await
}

/// Spends what these headers have; whether there was all of a burst.
async fn spend(fixture: &Fixture, headers: &[(&str, &str)]) -> bool {
    let mut full = true;
    for _ in 0..BURST {
        full &= ask(fixture, headers).await.status == 200;
    }
    assert_eq!(ask(fixture, headers).await.status, 429, "{headers:?}");
    full
}

#[tokio::test]
async fn a_limited_caller_hears_how_much_is_left_and_when_to_come_back() {
    let fixture = limited(RateLimitKey::ApiKey).await;
    let key = [("X-API-Key", "user-key"), ("Origin", "https://app.example")];
    for left in ["2", "1", "0"] {
        let answer = ask(&fixture, &key).await;
        assert_eq!((answer.status, answer.header("x-ratelimit-limit")), (200, Some("3")));
        assert_eq!(answer.header("x-ratelimit-remaining"), Some(left));
        assert_eq!(answer.header("retry-after"), None);
    }
    let answer = ask(&fixture, &key).await;
    assert_eq!(answer.failure(), (429, "RESOURCE_LIMIT".to_owned()));
    assert_eq!((answer.header("x-ratelimit-limit"), answer.header("x-ratelimit-remaining")), (Some("3"), Some("0")));
    let seconds: u64 = answer.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=60).contains(&seconds), "{seconds}");
    // A page can read all of it.
    assert_eq!(answer.header("access-control-allow-origin"), Some("https://app.example"));
    let exposed = answer.header("access-control-expose-headers").unwrap();
    for name in ["Retry-After", "X-RateLimit-Limit", "X-RateLimit-Remaining", "X-Request-ID"] {
        assert!(exposed.contains(name), "{exposed}");
    }
}

#[tokio::test]
async fn by_key_every_key_has_its_own_and_headers_change_nothing() {
    let fixture = limited(RateLimitKey::ApiKey).await;
    let (one, two) = (fixture.stored_key("one", &["read"]).await, fixture.stored_key("two", &["read"]).await);
    assert!(spend(&fixture, &[("X-API-Key", &one)]).await);
    for dodge in [("X-User-ID", "bob"), ("X-Forwarded-For", "198.51.100.7"), ("X-Tenant-ID", "t")] {
        assert_eq!(ask(&fixture, &[("X-API-Key", &one), dodge]).await.status, 429, "{dodge:?}");
    }
    assert_eq!(ask(&fixture, &[("X-Admin-API-Key", &one)]).await.status, 429);
    assert!(spend(&fixture, &[("X-API-Key", &two)]).await);
    assert!(spend(&fixture, &[("X-API-Key", "user-key")]).await);
    assert!(spend(&fixture, &[("X-API-Key", "root-key")]).await, "administrators are limited by themselves");
}

#[tokio::test]
async fn by_owner_a_bound_key_spends_its_owners_and_nobody_else_does() {
    let fixture = limited(RateLimitKey::Owner).await;
    let bound = |name: &str| stacyvm_api::ApiKeyRequest {
        name: name.to_owned(),
        owner_id: Some("alice".parse().unwrap()),
        ..Default::default()
    };
    let make = |name: &'static str| {
        let (keys, request) = (fixture.engine.keys().clone(), bound(name));
        async move { keys.create("test", request).await.unwrap().key }
    };
    let (one, two) = (make("one").await, make("two").await);
    // Somebody else who only says alice's name does not spend her requests.
    assert!(spend(&fixture, &[("X-API-Key", "user-key"), ("X-User-ID", "alice")]).await);
    assert!(spend(&fixture, &[("X-API-Key", &one)]).await);
    assert_eq!(ask(&fixture, &[("X-API-Key", &two)]).await.status, 429, "both are alice");
    assert!(spend(&fixture, &[("X-API-Key", "user-key"), ("X-User-ID", "bob")]).await, "named owners are apart");
    assert!(spend(&fixture, &[("X-API-Key", "user-key")]).await, "without a name the key counts");
    let plain = fixture.stored_key("plain", &["read"]).await;
    assert!(spend(&fixture, &[("X-API-Key", &plain), ("X-User-ID", "carol")]).await);
    let renamed = ask(&fixture, &[("X-API-Key", &plain), ("X-User-ID", "dave")]).await;
    assert_eq!(renamed.status, 429, "naming others is no way out");
    let gateway = fixture.stored_key("gateway", &["read", "admin"]).await;
    assert!(spend(&fixture, &[("X-API-Key", &gateway), ("X-User-ID", "carol")]).await);
    assert!(spend(&fixture, &[("X-API-Key", &gateway), ("X-User-ID", "dave")]).await, "it acts for many");
}

#[tokio::test]
async fn by_address_the_address_counts_and_subscribers_of_version_6_have_one() {
    let fixture = limited(RateLimitKey::Address).await;
    let from = |address: &'static str, key: &'static str| [("X-API-Key", key), ("X-Forwarded-For", address)];
    assert!(spend(&fixture, &from("198.51.100.7", "user-key")).await);
    assert_eq!(ask(&fixture, &from("198.51.100.7", "root-key")).await.status, 429);
    assert!(spend(&fixture, &from("198.51.100.8", "user-key")).await);
    assert!(spend(&fixture, &from("2001:db8::1", "user-key")).await);
    assert_eq!(ask(&fixture, &from("2001:db8::ffff:2", "user-key")).await.status, 429);
}

#[tokio::test]
async fn probes_and_the_api_page_are_not_limited_and_refusals_cost_nothing() {
    let fixture = limited(RateLimitKey::ApiKey).await;
    for _ in 0..2 * BURST {
        for path in ["/live", "/health", "/ready"] {
            let answer = fixture.get(path).await;
            assert_eq!((answer.status, answer.header("x-ratelimit-limit")), (200, None), "{path}");
        }
        assert_eq!(fixture.request("GET", "/swagger/doc.json").send().await.status, 200);
        assert_eq!(ask(&fixture, &[("X-API-Key", "wrong")]).await.status, 401);
    }
    assert!(spend(&fixture, &[("X-API-Key", "user-key")]).await);
}

#[tokio::test]
async fn calls_that_find_no_route_or_no_scope_are_limited_too() {
    let fixture = limited(RateLimitKey::ApiKey).await;
    let nothing = || fixture.api("GET", "/nothing").key("user-key").send();
    let admin = || fixture.api("GET", "/admin/keys").key("user-key").send();
    assert_eq!([nothing().await.status, admin().await.status, nothing().await.status], [404, 403, 404]);
    assert_eq!([nothing().await.status, admin().await.status], [429, 429]);
}

#[tokio::test]
async fn the_limit_shows_in_metrics_and_diagnostics() {
    let fixture = limited(RateLimitKey::ApiKey).await;
    spend(&fixture, &[("X-API-Key", "user-key")]).await;
    let metrics = fixture.api("GET", "/metrics").key("root-key").send().await.expect(200);
    assert_eq!(
        metrics["rate_limit"],
        json!({
            "enabled": true,
            "requests_per_minute": 1,
            "burst": 3,
            "key_by": "api_key",
            "active_buckets": 2,
            "allowed_total": 4,
            "limited_total": 1,
            "evicted_total": 0,
            "bucket_ttl": "15m0s",
            "cleanup_interval": "1m0s",
        })
    );
    let text = fixture.api("GET", "/metrics/prometheus").key("root-key").send().await;
    for sample in [
        "stacyvm_rate_limit_allowed_total 5",
        "stacyvm_rate_limit_blocked_total 1",
        "stacyvm_rate_limit_evicted_buckets_total 0",
        "stacyvm_rate_limit_active_buckets 2",
    ] {
        assert!(text.text().contains(sample), "{sample} is not in:\n{}", text.text());
    }
    let report = fixture.api("GET", "/diagnostics").key("root-key").send().await.expect(200);
    assert_eq!(report["rate_limit"]["key_by"], "api_key");
}
