//! Each rule with the least that breaks it, and with what satisfies it.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use super::*;
use crate::check::Status;
use crate::config::load::{Environment, examine};
use crate::config::settings::{Content, Value};

const KEY: &str = "0123456789abcdef0123456789abcdef";
const ADMIN_KEY: &str = "fedcba9876543210fedcba9876543210";

fn judge(yaml: &str, strictness: Strictness) -> Checks {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("stacyvm.yaml");
    std::fs::write(&file, yaml).unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    let environment = Environment { current_dir: dir.path().to_owned(), ..Environment::default() };
    lint(&examine(None, &environment, &[]), strictness)
}

/// Status of a check, both on one's own machine and in production.
fn statuses(yaml: &str, name: &str) -> (Status, Status) {
    let status = |strictness| {
        let checks = judge(yaml, strictness);
        let found: Vec<_> = checks.0.iter().filter(|check| check.name == name).map(|check| check.status).collect();
        assert_eq!(found.len(), 1, "{name} in {checks:#?}");
        found[0]
    };
    (status(Strictness::Development), status(Strictness::Production))
}

const RISK: (Status, Status) = (Status::Warn, Status::Fail);
const FINE: (Status, Status) = (Status::Pass, Status::Pass);
const HINT: (Status, Status) = (Status::Warn, Status::Warn);
const WRONG: (Status, Status) = (Status::Fail, Status::Fail);

fn expect(name: &str, expected: (Status, Status), yaml: &str) {
    assert_eq!(statuses(yaml, name), expected, "{name}: {yaml}");
}

#[test]
fn keys_are_there_long_and_two() {
    expect("auth.enabled", RISK, "");
    expect("auth.enabled", FINE, &format!("auth: {{api_key: {KEY}}}"));
    for key in ["auth.enabled", "auth.api_key", "auth.admin_api_key"] {
        expect(key, FINE, "auth: {enabled: true}");
    }
    expect("auth.failures_per_minute", RISK, "auth: {failures_per_minute: 0}");
    expect("auth.failures_per_minute", FINE, "");
    expect("auth.api_key", RISK, "");
    expect("auth.api_key", RISK, "auth: {api_key: short}");
    expect("auth.api_key", RISK, &format!("auth: {{api_key: please-CHANGE-ME-{KEY}}}"));
    expect("auth.api_key", FINE, &format!("auth: {{api_key: {KEY}}}"));
    expect("auth.admin_api_key", RISK, &format!("auth: {{api_key: {KEY}}}"));
    expect("auth.admin_api_key", FINE, &format!("auth: {{admin_api_key: {KEY}}}"));
    expect("auth.key_separation", RISK, &format!("auth: {{api_key: {KEY}, admin_api_key: {KEY}}}"));
    expect("auth.key_separation", FINE, &format!("auth: {{api_key: {KEY}, admin_api_key: {ADMIN_KEY}}}"));
    expect("auth.key_separation", FINE, "");
    expect("auth.admin_fallback_enabled", RISK, "");
    expect("auth.admin_fallback_enabled", FINE, "auth: {admin_fallback_enabled: false}");
}

#[test]
fn keys_in_files_are_for_the_owner_alone() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("key");
    std::fs::write(&file, KEY).unwrap();
    let yaml = format!("auth: {{api_key_file: {}}}", file.display());
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
    expect("auth.api_key_file", RISK, &yaml);
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    let checks = judge(&yaml, Strictness::Production);
    assert!(!checks.0.iter().any(|check| check.name == "auth.api_key_file"), "{checks:#?}");
    // One that cannot be read is a fault, and not the same as none.
    std::fs::remove_file(&file).unwrap();
    let checks = judge(&format!("auth: {{enabled: true, api_key_file: {}}}", file.display()), Strictness::Production);
    assert!(!checks.0.iter().any(|check| check.name == "auth.api_key"), "{checks:#?}");
    assert!(checks.0.iter().any(|check| check.place.as_deref() == Some("auth.api_key_file")), "{checks:#?}");
}

#[test]
fn what_is_reached_from_elsewhere_needs_a_key() {
    expect("server.host", FINE, "");
    expect("server.host", FINE, "server: {host: localhost}");
    expect("server.host", FINE, "server: {host: '::1'}");
    expect("server.host", WRONG, "server: {host: 0.0.0.0}");
    expect("server.host", HINT, &format!("server: {{host: 0.0.0.0}}\nauth: {{api_key: {KEY}}}"));
}

#[test]
fn certificates_of_a_ca_are_for_all_that_is_shown() {
    let yaml = |server: &str, acme: &str| {
        let acme =
            format!("{{enabled: true, email: ops@example.com, agree_terms: true, names: [vm.example.com]{acme}}}");
        format!("server: {{host: 0.0.0.0{server}, acme: {acme}}}\nauth: {{api_key: {KEY}}}")
    };
    expect("server.host", FINE, &yaml("", ""));
    expect("server.port", HINT, &yaml("", ""));
    expect("server.acme.dns_hook", FINE, &yaml("", ""));
    expect("server.acme.dns_hook", RISK, &yaml(", preview_domain: 'example.net:8443'", ""));
    expect("server.acme.dns_hook", FINE, &yaml(", preview_domain: example.net", ", dns_hook: /etc/hook"));
    expect("server.acme.directory_url", FINE, &yaml("", ""));
    let staging = ", directory_url: 'https://acme-staging-v02.api.letsencrypt.org/directory'";
    expect("server.acme.directory_url", RISK, &yaml("", staging));
    for quiet in [yaml(", port: 443", ""), yaml("", ", dns_hook: /etc/hook"), String::new()] {
        let checks = judge(&quiet, Strictness::Production);
        assert!(!checks.0.iter().any(|check| check.name == "server.port"), "{quiet}: {checks:#?}");
    }
    expect("config", WRONG, &yaml("", ", agree_terms: false").replace("agree_terms: true, ", ""));
}

#[test]
fn what_no_server_starts_with_keeps_no_rule_from_being_looked_at() {
    let acme = "{enabled: true, email: ops@example.com, agree_terms: true, names: [vm.example.com], \
                dns_hook: /etc/hook, dns_hook_env: [UNSET_TOKEN]}";
    let yaml = format!("server: {{host: 0.0.0.0, preview_domain: co.uk, acme: {acme}}}\nlogging: {{level: info}}");
    let checks = judge(&yaml, Strictness::Production);
    let faults: Vec<_> = checks.0.iter().filter(|check| check.name == "config").collect();
    assert_eq!(faults.len(), 2, "{checks:#?}");
    assert!(faults[0].message.contains("`co.uk`") && faults[1].message.contains("UNSET_TOKEN"), "{faults:#?}");
    assert_eq!(faults[1].place.as_deref(), Some("server.acme.dns_hook_env"));
    expect("server.host", WRONG, &yaml);
    expect("auth.api_key", RISK, &yaml);
    assert!(!checks.0.iter().any(|check| check.name == "server.preview_domain"), "it is no pass: {checks:#?}");
}

#[test]
fn names_and_origins_are_ones_own() {
    expect("server.allowed_hosts", FINE, "server: {allowed_hosts: ['*.vm.example.com']}");
    expect("server.allowed_hosts", RISK, "server: {allowed_hosts: ['*.co.uk']}");
    expect("server.cors_allowed_origins", FINE, "");
    expect("server.cors_allowed_origins", FINE, "server: {cors_allowed_origins: ['https://app.example.com']}");
    expect(
        "server.cors_allowed_origins",
        RISK,
        &format!("server: {{cors_allowed_origins: ['*']}}\nauth: {{api_key: {KEY}}}"),
    );
    expect("server.cors_allowed_origins", WRONG, "server: {cors_allowed_origins: ['*']}");
    expect("server.cors_allowed_origins", HINT, "server: {cors_allowed_origins: ['http://app.example.com']}");
    expect("server.cors_allowed_origins", FINE, "server: {cors_allowed_origins: ['http://localhost:3000']}");
}

#[test]
fn previews_have_a_site_of_their_own() {
    let yaml = |preview: &str| format!("server: {{allowed_hosts: [api.example.com], preview_domain: {preview}}}");
    expect("server.preview_domain", FINE, "");
    expect("config", WRONG, &yaml("preview.example.com"));
    expect("config", WRONG, &yaml("api.example.com"));
    expect("server.preview_domain", FINE, &yaml("example-previews.com"));
    expect("server.preview_domain", FINE, &yaml("localhost"));
}

#[test]
fn a_proxy_in_front_is_told_of() {
    let named = "allowed_hosts: [vm.example.com], preview_domain: example-previews.com";
    for key in ["server.trusted_proxies", "server.preview_url"] {
        expect(key, HINT, &format!("server: {{{named}}}"));
        let told = format!("{named}, trusted_proxies: [127.0.0.1], preview_url: 'https://example-previews.com'");
        expect(key, FINE, &format!("server: {{{told}}}"));
    }
    expect("server.trusted_proxies", HINT, "server: {allowed_hosts: ['*.vm.example.com']}");
    let without = ["", "server: {allowed_hosts: [box.localhost]}", &format!("server: {{host: 0.0.0.0, {named}}}")];
    for quiet in without {
        let checks = judge(quiet, Strictness::Production);
        let of_proxies =
            |check: &Check| ["server.trusted_proxies", "server.preview_url"].contains(&check.name.as_str());
        assert!(!checks.0.iter().any(of_proxies), "{quiet}: {checks:#?}");
    }
}

#[test]
fn what_grows_has_a_bound() {
    expect("defaults.sandbox_caps", RISK, "");
    expect("defaults.sandbox_caps", RISK, "defaults: {max_sandboxes: 10}");
    expect("defaults.sandbox_caps", FINE, "defaults: {max_sandboxes: 10, max_sandboxes_per_owner: 2}");
    expect("defaults.max_spawn_queue", RISK, "defaults: {max_spawn_queue: 0}");
    expect("defaults.max_spawn_queue", FINE, "");
    expect("defaults.exec_timeouts", RISK, "defaults: {max_exec_timeout: 0s}");
    expect("defaults.exec_timeouts", FINE, "");
    expect("defaults.max_ttl", RISK, "defaults: {max_ttl: 0}");
    expect("defaults.max_ttl", FINE, "");
    expect("defaults.resource_caps", RISK, "defaults: {max_memory_mb: 4096, max_vcpus: 2}");
    expect("defaults.resource_caps", FINE, "defaults: {max_memory_mb: 4096, max_vcpus: 2, max_disk_size_mb: 10240}");
}

#[test]
fn data_stays_where_it_is_put() {
    expect("data_dir", FINE, "");
    expect("data_dir", FINE, "data_dir: /var/lib/stacyvm");
    expect("data_dir", RISK, "data_dir: data");
    expect("data_dir", RISK, "data_dir: /tmp/stacyvm");
    expect("database.path", FINE, "");
    expect("database.path", RISK, "database: {path: ../stacyvm.db}");
    expect("logging.format", FINE, "");
    expect("logging.format", RISK, "logging: {format: pretty}");
}

#[test]
fn fakes_and_open_doors_are_not_for_production() {
    expect("providers.default", FINE, "");
    expect("providers.default", RISK, "providers: {default: mock}");
    expect("providers.default", WRONG, "providers: {default: dokcer}");
    expect("providers.mock.enabled", RISK, "providers: {mock: {enabled: true}}");
    expect("providers.oci.host_include", FINE, "providers: {oci: {host_include: [/opt]}}");
    expect("providers.oci.host_include", RISK, "providers: {oci: {host_include: [/opt, /etc/ssl]}}");
    expect("images.plain_http_registries", RISK, "images: {plain_http_registries: ['registry.lan:5000']}");
}

#[test]
fn findings_name_the_line_and_failures_all_problems() {
    let checks = judge("server:\n  port: 1\nlogging:\n  format: pretty\n", Strictness::Production);
    let found = checks.0.iter().find(|check| check.name == "logging.format").unwrap();
    assert_eq!(found.place.as_deref(), Some("stacyvm.yaml:4"));
    assert!(found.fix.as_ref().unwrap().contains("json"), "{found:?}");

    let checks = judge("server:\n  prot: 1\n  host: 0.0.0.0\ndefaults:\n  ttl: 5\n", Strictness::Development);
    let places: Vec<_> = checks.0.iter().map(|check| (check.status, check.place.as_deref().unwrap())).collect();
    assert_eq!(places, [(Status::Fail, "stacyvm.yaml:2"), (Status::Fail, "stacyvm.yaml:5")]);
    assert_eq!(checks.0[0].fix.as_deref(), Some("did you mean `server.port`?"));
}

#[test]
fn everything_but_a_pass_says_what_to_do() {
    for strictness in [Strictness::Development, Strictness::Production] {
        for check in judge("", strictness).0 {
            assert_eq!(check.fix.is_some(), check.status != Status::Pass, "{check:?}");
        }
    }
}

/// A made-up version that has these settings.
fn judge_values(values: &[(&'static str, Content)]) -> BTreeMap<String, Status> {
    let values = values.iter().map(|(key, content)| Value {
        key,
        source: Source::KeyFile(PathBuf::from("/nowhere")),
        content: content.clone(),
    });
    let settings = Settings::of(values.collect());
    let mut linter = Linter::new(&settings, &[], Strictness::Production);
    linter.all();
    linter.checks.0.into_iter().map(|check| (check.name, check.status)).collect()
}

fn text(text: &str) -> Content {
    Content::Text(text.to_owned())
}

#[test]
fn a_missing_feature_never_passes() {
    let found = judge_values(&[]);
    assert_eq!(found["rate_limit.enabled"], Status::Warn);
    assert_eq!(found["auth.admin_audit_retention"], Status::Warn);
    assert!(!found.keys().any(|name| name.starts_with("docker.")), "{found:?}");
}

#[test]
fn limits_of_requests_are_judged_where_there_are_any() {
    let on = ("rate_limit.enabled", text("true"));
    assert_eq!(judge_values(&[("rate_limit.enabled", text("false"))])["rate_limit.enabled"], Status::Fail);
    let found =
        judge_values(&[on.clone(), ("rate_limit.requests_per_minute", text("0")), ("rate_limit.key_by", text("ip"))]);
    let status = |name: &str| found[name];
    assert_eq!(
        [status("rate_limit.enabled"), status("rate_limit.capacity"), status("rate_limit.key_by")],
        [Status::Pass, Status::Fail, Status::Warn]
    );
    assert_eq!(judge_values(&[on, ("rate_limit.burst", text("0"))])["rate_limit.capacity"], Status::Pass);
}

#[test]
fn identity_providers_are_judged_where_there_are_any() {
    let found = judge_values(&[
        ("auth.oidc_enabled", text("true")),
        ("auth.oidc_issuer", text("")),
        ("auth.oidc_public_key", text("-----BEGIN")),
        ("auth.admin_audit_retention", text("0s")),
    ]);
    assert_eq!(found["auth.oidc_issuer"], Status::Fail);
    assert_eq!(found["auth.oidc_jwks_url"], Status::Pass, "a key is a way to check signatures");
    assert_eq!(found["auth.oidc_public_key"], Status::Warn);
    assert_eq!((found["auth.oidc_audience"], found["auth.oidc_groups"]), (Status::Warn, Status::Warn));
    assert_eq!(found["auth.admin_audit_retention"], Status::Fail);
}

#[test]
fn a_container_daemon_is_judged_where_it_is_used() {
    let docker = |changes: &[(&'static str, Content)]| {
        let mut values = vec![
            ("providers.docker.enabled", text("true")),
            ("providers.docker.runtime", text("runc")),
            ("providers.docker.network_mode", text("bridge")),
            ("providers.docker.user", text("1000:1000")),
            ("providers.docker.memory", text("512m")),
            ("providers.docker.cpus", text("1")),
            ("providers.docker.pids_limit", text("256")),
            ("providers.docker.seccomp_profile", text("default")),
            ("providers.docker.added_caps", Content::List(Vec::new())),
            ("providers.docker.dropped_caps", Content::List(vec!["ALL".to_owned()])),
        ];
        for (key, content) in changes {
            values.iter_mut().find(|(name, _)| name == key).unwrap().1 = content.clone();
        }
        judge_values(&values)
    };
    let well = docker(&[]);
    let checks: Vec<_> = well.iter().filter(|(name, _)| name.starts_with("docker.")).collect();
    assert!(checks.len() == 9 && checks.iter().all(|(_, status)| **status == Status::Pass), "{checks:?}");
    let list = |name: &str| Content::List(vec![name.to_owned()]);
    for (key, content, check) in [
        ("providers.docker.runtime", text(""), "docker.runtime"),
        ("providers.docker.user", text(""), "docker.user"),
        ("providers.docker.pids_limit", text("0"), "docker.pids_limit"),
        ("providers.docker.seccomp_profile", text("unconfined"), "docker.seccomp_profile"),
        ("providers.docker.added_caps", list("SYS_ADMIN"), "docker.added_caps"),
        ("providers.docker.dropped_caps", list("NET_RAW"), "docker.dropped_caps"),
    ] {
        assert_eq!(docker(&[(key, content)])[check], Status::Fail, "{key}");
    }
    let unused = docker(&[("providers.docker.enabled", text("false"))]);
    assert!(!unused.keys().any(|name| name.starts_with("docker.")), "{unused:?}");
}

/// No server starts with these.
#[test]
fn what_a_part_of_the_server_refuses_is_a_failure_of_its_key() {
    for (key, yaml) in [
        ("server.trusted_proxies", "server: {trusted_proxies: [proxy]}"),
        ("server.allowed_hosts", "server: {allowed_hosts: ['http://a/b']}"),
        ("server.cors_allowed_origins", "server: {cors_allowed_origins: [app]}"),
        ("logging.level", "logging: {level: loud}"),
        ("providers.docker.dropped_caps", "providers: {docker: {enabled: true, dropped_caps: [NET_ROW]}}"),
        ("providers.docker.network_mode", "providers: {docker: {enabled: true, network_mode: 'container:x'}}"),
        ("providers.docker.seccomp_profile", "providers: {default: docker, docker: {seccomp_profile: /none}}"),
        ("providers.docker.socket", "providers: {default: docker, docker: {socket: 'ftp://x'}}"),
        ("providers.docker.tmpfs", "providers: {docker: {tmpfs: {/cache: size=lots}}}"),
        ("providers.docker.memory", "providers: {docker: {enabled: true, memory: 8m}}"),
        ("providers.docker.cpus", "providers: {docker: {enabled: true, cpus: 9000}}"),
        ("providers.docker.default_image", "providers: {docker: {enabled: true, default_image: UPPER}}"),
        ("defaults.image", "defaults: {image: 'A B'}"),
        ("defaults.image", "defaults: {image: UPPER}"),
        ("defaults.image", "defaults: {image: 'A B'}\nproviders: {custom: {enabled: true, base_url: 'http://a'}}"),
        ("defaults.network", "defaults: {network: foo}"),
        ("defaults.network", "defaults: {network: foo}\nproviders: {docker: {network_mode: foo}}"),
        ("defaults.network", "defaults: {network: host}\nproviders: {proot: {enabled: false}}"),
        ("defaults.memory_mb", "defaults: {memory_mb: 15}"),
        ("defaults.memory_mb", "defaults: {memory_mb: 16777217}"),
        ("defaults.vcpus", "defaults: {vcpus: 0.001}"),
        ("defaults.vcpus", "defaults: {vcpus: 8193}"),
        ("defaults.pids_limit", "defaults: {pids_limit: 4194305}"),
        ("defaults.disk_size_mb", "defaults: {disk_size_mb: 4294967297}"),
    ] {
        let checks = judge(yaml, Strictness::Development);
        let found = checks.0.iter().find(|check| check.status == Status::Fail);
        assert_eq!(found.and_then(|check| check.place.as_deref()), Some(key), "{yaml}: {checks:#?}");
    }
    for well in [
        "providers: {docker: {socket: 'ftp://x'}}",
        "defaults: {image: rootfs, network: none, memory_mb: 16, vcpus: 8192, disk_size_mb: 0}",
        "defaults: {network: foo}\nproviders: {docker: {enabled: true, network_mode: foo}}",
        "defaults: {network: host}\nproviders: {proot: {enabled: true}}",
        "defaults: {image: Base}\nproviders: {custom: {enabled: true, base_url: 'http://a'}}",
    ] {
        let checks = judge(well, Strictness::Development);
        assert_ne!(checks.status(), Status::Fail, "{well}: {checks:#?}");
    }
}

#[test]
fn files_of_a_certificate_hold_one_and_its_key() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    std::fs::write(at("certificate"), "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").unwrap();
    std::fs::write(at("text"), "no PEM\n").unwrap();
    for (certificate, key, expected) in [
        ("text", "text", Some(("server.tls_cert_file", "holds no certificate"))),
        ("certificate", "text", Some(("server.tls_key_file", "holds no private key"))),
        ("certificate", "certificate", Some(("server.tls_key_file", "holds no private key"))),
        ("certificate", "", Some(("server.tls_key_file", "no regular file"))),
        // It may be where the server runs.
        ("certificate", "missing", None),
    ] {
        let yaml = format!("server: {{tls_cert_file: {}, tls_key_file: {}}}", at(certificate), at(key));
        let checks = judge(&yaml, Strictness::Development);
        let failed = checks.0.iter().find(|check| check.status == Status::Fail);
        let found = failed.map(|check| (check.place.as_deref().unwrap_or_default(), check.message.as_str()));
        let as_expected = match (found, expected) {
            (Some((place, message)), Some((key, why))) => place == key && message.contains(why),
            (found, expected) => found.is_none() && expected.is_none(),
        };
        assert!(as_expected, "{certificate} and {key}: {checks:#?}");
    }
}
