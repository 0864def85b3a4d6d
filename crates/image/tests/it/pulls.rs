//! Pulling: what registries do, well and badly.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use stacyvm_image::{Digest, ImageError, ImageStoreOptions};
use tempfile::TempDir;

use crate::build::{Blob, Layer, TestImage, busybox_layer, host_architecture, small_image};
use crate::registry::{CutPlan, Cutter, Faults, Front, RealRegistry, TokenRules};
use crate::support::{Recorded, TestStore, entries, eventually, require_root};

/// Big enough to be cut in pieces; not compressible.
fn big_image() -> TestImage {
    let mut state = 1u64;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    })
    .take(600_000)
    .collect();
    TestImage::new(vec![Blob::gzip(&Layer::new().file("noise", &noise))])
}

#[tokio::test]
async fn by_tag_with_every_compression() {
    let registry = RealRegistry::start();
    let image = TestImage::new(vec![
        Blob::plain(&busybox_layer()),
        Blob::gzip(&Layer::new().file("etc/gzip", b"1")),
        Blob::zstd(&Layer::new().file("etc/zstd", b"2")),
    ]);
    registry.push("team/tool", "v1", &image).await;
    let store = TestStore::open().await;
    let name = format!("{}/team/tool:v1", registry.host);
    let progress = Recorded::default();
    let pulled = store.store.pull(&name, &progress).await.unwrap();
    assert_eq!(pulled.reference, name);
    assert_eq!(pulled.digest, image.digest().as_str());
    assert_eq!(fs::read(pulled.layers[1].join("etc/gzip")).unwrap(), b"1");
    assert_eq!(fs::read(pulled.layers[2].join("etc/zstd")).unwrap(), b"2");
    let last = progress.all().pop().unwrap();
    assert_eq!(last.total_bytes, image.layers.iter().map(|layer| layer.bytes.len() as u64).sum::<u64>());
    // From here on the registry is not needed.
    drop(registry);
    drop(pulled);
    let stored = store.store.get(&name, &()).await.unwrap();
    assert_eq!(stored.layers.len(), 3);
    assert_eq!(store.open_again().await.get(&name, &()).await.unwrap().digest, image.digest().as_str());
}

#[tokio::test]
async fn by_digest_and_from_an_index() {
    let registry = RealRegistry::start();
    let ours = small_image("ours");
    let theirs = TestImage::for_architecture(ours.layers.clone(), &serde_json::json!({}), "s390x");
    registry.push("multi", "ours", &ours).await;
    registry.push("multi", "theirs", &theirs).await;
    let host = &registry.host;
    let index = registry.push_index("multi", "all", &[("s390x", &theirs), (&host_architecture(), &ours)]).await;
    let store = TestStore::open().await;
    for name in [
        format!("{host}/multi:all"),
        format!("{host}/multi@{index}"),
        format!("{host}/multi@{}", ours.digest()),
        format!("{host}/multi:ignored@{}", ours.digest()),
    ] {
        let image = store.store.get(&name, &()).await.unwrap();
        assert_eq!(image.digest, ours.digest().as_str(), "{name}");
        assert_eq!(image.reference, name);
    }
    let only_theirs = registry.push_index("multi", "foreign", &[("s390x", &theirs)]).await;
    for name in [format!("{host}/multi@{only_theirs}"), format!("{host}/multi:theirs")] {
        let error = store.store.get(&name, &()).await.unwrap_err();
        assert!(
            matches!(&error, ImageError::PlatformUnavailable { available, .. } if available == "linux/s390x"),
            "{error:?}"
        );
    }
}

#[tokio::test]
async fn a_moved_tag_is_seen_by_pull_and_not_by_get() {
    let registry = RealRegistry::start();
    let (old, new) = (small_image("old"), small_image("new"));
    let name = format!("{}/tool:latest", registry.host);
    let store = TestStore::open().await;
    registry.push("tool", "latest", &old).await;
    assert_eq!(store.store.get(&name, &()).await.unwrap().digest, old.digest().as_str());
    registry.push("tool", "latest", &new).await;
    assert_eq!(store.store.get(&name, &()).await.unwrap().digest, old.digest().as_str());
    assert_eq!(store.store.pull(&name, &()).await.unwrap().digest, new.digest().as_str());
    assert_eq!(store.store.get(&name, &()).await.unwrap().digest, new.digest().as_str());
}

#[tokio::test]
async fn what_is_missing_is_not_found() {
    let registry = RealRegistry::start();
    registry.push("tool", "v1", &small_image("x")).await;
    let store = TestStore::open().await;
    for name in ["tool:v2", "nothing:v1"] {
        let name = format!("{}/{name}", registry.host);
        let error = store.store.get(&name, &()).await.unwrap_err();
        assert!(matches!(&error, ImageError::NotFound { reference } if *reference == name), "{error:?}");
    }
    assert!(matches!(store.store.get("No Such", &()).await, Err(ImageError::InvalidReference { .. })));
    assert!(matches!(store.store.get("host", &()).await, Err(ImageError::InvalidReference { .. })));
}

#[tokio::test]
async fn an_unreachable_registry_says_what_else_works() {
    // A port that was free a moment ago.
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let store = TestStore::open().await;
    let error = store.store.get(&format!("{closed}/tool"), &()).await.unwrap_err();
    assert!(matches!(error, ImageError::RegistryUnavailable { .. }), "{error:?}");
    let hint = error.hint().unwrap();
    assert!(hint.contains("image=\"host\"") && hint.contains("stacyvm image import"), "{hint}");
}

#[tokio::test]
async fn passwords_come_from_the_docker_configuration() {
    let registry = RealRegistry::start_with_password();
    registry.push("team/tool", "v1", &small_image("private")).await;
    let name = format!("{}/team/tool:v1", registry.host);
    let directory = TempDir::new().unwrap();
    let config = directory.path().join("config.json");
    let with_config = |options: &mut ImageStoreOptions| options.docker_config = Some(config.clone());
    let store = TestStore::open_with(with_config).await;
    // No file, then the wrong password, then the right one; no restart between.
    assert!(matches!(store.store.get(&name, &()).await, Err(ImageError::AccessDenied { .. })));
    // base64 of tester:no and tester:pw
    for (auth, works) in [("dGVzdGVyOm5v", false), ("dGVzdGVyOnB3", true)] {
        fs::write(&config, format!(r#"{{"auths":{{"{}":{{"auth":"{auth}"}}}}}}"#, registry.host)).unwrap();
        match store.store.get(&name, &()).await {
            Ok(image) => assert!(works && image.layers[0].join("mark").exists()),
            Err(error) => assert!(!works && matches!(error, ImageError::AccessDenied { .. }), "{error:?}"),
        }
    }
}

#[tokio::test]
async fn tokens_are_fetched_for_one_repository() {
    let registry = RealRegistry::start();
    registry.push("team/tool", "v1", &small_image("token")).await;
    let cases: [(Option<&'static str>, &str, bool); 4] = [
        (None, "{}", true),
        (Some("Basic dGVzdGVyOnB3"), r#"{"auth":"dGVzdGVyOnB3"}"#, true),
        (Some("refresh_token=IDT"), r#"{"identitytoken":"IDT"}"#, true),
        (Some("refresh_token=IDT"), "{}", false),
    ];
    for (credential, entry, works) in cases {
        let rules = TokenRules { realm: None, credential };
        let front = Front::before(&registry.host, Faults { token: Some(rules), ..Faults::default() }).await;
        let directory = TempDir::new().unwrap();
        let config = directory.path().join("config.json");
        fs::write(&config, format!(r#"{{"auths":{{"{}":{entry}}}}}"#, front.host)).unwrap();
        let store = TestStore::open_with(|options| options.docker_config = Some(config)).await;
        let outcome = store.store.get(&format!("{}/team/tool:v1", front.host), &()).await;
        match outcome {
            Ok(_) => assert!(works, "{credential:?}"),
            Err(error) => assert!(!works && matches!(error, ImageError::AccessDenied { .. }), "{error:?}"),
        }
        let tokens = front.seen().iter().filter(|seen| seen.path == "/token").count();
        assert_eq!(tokens, 1, "one token serves the whole pull");
    }
}

#[tokio::test]
async fn credentials_do_not_go_where_they_should_not() {
    let registry = RealRegistry::start();
    registry.push("team/tool", "v1", &small_image("leak")).await;
    // A login service over plain HTTP elsewhere is not asked at all.
    let realm = Some("http://192.0.2.1/token".to_owned());
    let rules = TokenRules { realm, credential: None };
    let front = Front::before(&registry.host, Faults { token: Some(rules), ..Faults::default() }).await;
    let store = TestStore::open().await;
    let error = store.store.get(&format!("{}/team/tool:v1", front.host), &()).await.unwrap_err();
    assert!(matches!(&error, ImageError::AccessDenied { reason, .. } if reason.contains("https")), "{error:?}");

    // Blobs on another host are fetched without the token.
    let elsewhere = Front::before(&registry.host, Faults::default()).await;
    let faults = Faults {
        token: Some(TokenRules { realm: None, credential: None }),
        redirect_blobs_to: Some(format!("http://{}", elsewhere.host)),
        ..Faults::default()
    };
    let front = Front::before(&registry.host, faults.clone()).await;
    store.store.get(&format!("{}/team/tool:v1", front.host), &()).await.unwrap();
    let blobs = elsewhere.seen();
    assert_eq!(blobs.len(), 2);
    assert!(blobs.iter().all(|seen| seen.authorization.is_none()), "{blobs:?}");

    // Plain HTTP beyond this machine is not followed.
    let fresh = TestStore::open().await;
    front.set(Faults { redirect_blobs_to: Some("http://192.0.2.1".into()), ..faults });
    let error = fresh.store.get(&format!("{}/team/tool:v1", front.host), &()).await.unwrap_err();
    assert!(matches!(&error, ImageError::Malformed { reason, .. } if reason.contains("redirect")), "{error:?}");
}

/// Where each request for the big layer started.
fn offsets(front: &Front, blob: &Digest) -> Vec<u64> {
    let start = |range: String| range.trim_start_matches("bytes=").trim_end_matches('-').parse().unwrap();
    front.seen_blobs(blob).into_iter().map(|seen| seen.range.map_or(0, start)).collect()
}

#[tokio::test]
async fn a_cut_download_goes_on_where_it_stopped() {
    let registry = RealRegistry::start();
    let image = big_image();
    registry.push("big", "v1", &image).await;
    let front = Front::before(&registry.host, Faults::default()).await;
    let plan = CutPlan { after_bytes: 200_000, cuts: 2, then_refuse: false };
    let cutter = Cutter::before(&front.host, plan).await;
    let store = TestStore::open().await;
    let pulled = store.store.get(&format!("{}/big:v1", cutter.host), &()).await.unwrap();
    assert_eq!(fs::metadata(pulled.layers[0].join("noise")).unwrap().len(), 600_000);
    let offsets = offsets(&front, &image.layers[0].digest());
    assert_eq!(offsets.len(), 3, "{offsets:?}");
    assert_eq!(offsets[0], 0);
    assert!(offsets[1] > 100_000 && offsets[2] > offsets[1] + 100_000, "{offsets:?}");
    assert!(entries(&store.root().join("partial")).is_empty());
}

#[tokio::test]
async fn another_process_goes_on_with_what_arrived() {
    let registry = RealRegistry::start();
    let image = big_image();
    registry.push("big", "v1", &image).await;
    let blob = image.layers[0].digest();
    let front = Front::before(&registry.host, Faults::default()).await;
    let plan = CutPlan { after_bytes: 200_000, cuts: 1, then_refuse: true };
    let cutter = Cutter::before(&front.host, plan).await;
    let name = format!("{}/big:v1", cutter.host);
    let store = TestStore::open().await;
    // The first process goes away in the middle.
    let partial = store.root().join("partial").join(blob.hex());
    {
        let first = store.open_again().await;
        let pull = first.get(&name, &());
        let arrived = eventually("part of the layer", || fs::metadata(&partial).is_ok_and(|m| m.len() > 100_000));
        tokio::select! {
            _ = pull => panic!("the download cannot be complete"),
            () = arrived => {}
        }
    }
    cutter.repair();
    store.store.get(&name, &()).await.unwrap();
    let offsets = offsets(&front, &blob);
    assert_eq!(offsets[0], 0);
    assert!(*offsets.last().unwrap() > 100_000, "{offsets:?}");
}

#[tokio::test]
async fn a_registry_without_ranges_starts_over() {
    let registry = RealRegistry::start();
    let image = big_image();
    registry.push("big", "v1", &image).await;
    let front = Front::before(&registry.host, Faults { ignore_ranges: true, ..Faults::default() }).await;
    let plan = CutPlan { after_bytes: 300_000, cuts: 1, then_refuse: false };
    let cutter = Cutter::before(&front.host, plan).await;
    let store = TestStore::open().await;
    let pulled = store.store.get(&format!("{}/big:v1", cutter.host), &()).await.unwrap();
    assert_eq!(fs::metadata(pulled.layers[0].join("noise")).unwrap().len(), 600_000);
    assert!(offsets(&front, &image.layers[0].digest())[1] > 0);
}

#[tokio::test]
async fn a_download_that_never_gets_anywhere_ends() {
    let registry = RealRegistry::start();
    registry.push("big", "v1", &big_image()).await;
    let plan = CutPlan { after_bytes: 200_000, cuts: 1, then_refuse: true };
    let cutter = Cutter::before(&registry.host, plan).await;
    let store = TestStore::open().await;
    let error = store.store.get(&format!("{}/big:v1", cutter.host), &()).await.unwrap_err();
    assert!(matches!(error, ImageError::RegistryUnavailable { .. }), "{error:?}");
}

#[tokio::test]
async fn damaged_content_is_never_used() {
    let registry = RealRegistry::start();
    let image = big_image();
    registry.push("big", "v1", &image).await;
    let front = Front::before(&registry.host, Faults { corrupt_blobs: true, ..Faults::default() }).await;
    let store = TestStore::open().await;
    let name = format!("{}/big:v1", front.host);
    let error = store.store.get(&name, &()).await.unwrap_err();
    assert!(matches!(error, ImageError::DigestMismatch { .. }), "{error:?}");
    assert!(entries(&store.root().join("layers")).is_empty());
    // Rubbish from an earlier process is noticed, and fetched again.
    let blob = image.layers[0].digest();
    fs::write(store.root().join("partial").join(blob.hex()), vec![0; 1000]).unwrap();
    front.set(Faults::default());
    store.store.get(&name, &()).await.unwrap();
    assert_eq!(front.seen_blobs(&blob).pop().unwrap().range, None);
    // A manifest that is not what was asked for.
    front.set(Faults { manifest: Some(small_image("evil").manifest), ..Faults::default() });
    let by_digest = format!("{}/big@{}", front.host, Digest::of(b"something else"));
    let error = store.store.get(&by_digest, &()).await.unwrap_err();
    assert!(matches!(error, ImageError::DigestMismatch { .. }), "{error:?}");
}

#[tokio::test]
async fn lying_manifests_are_refused() {
    let registry = RealRegistry::start();
    let image = small_image("honest");
    registry.push("tool", "v1", &image).await;
    let honest = String::from_utf8(image.manifest.clone()).unwrap();
    let size = |text: &str, new: &str| {
        let needle = format!("\"size\":{}", image.layers[0].bytes.len());
        assert!(text.contains(&needle));
        text.replace(&needle, &format!("\"size\":{new}"))
    };
    let layer = image.layers[0].digest().to_string();
    let cases: Vec<(&str, String)> = vec![
        ("longer than stated", size(&honest, "10")),
        ("shorter than stated", size(&honest, "100000")),
        ("absurd", size(&honest, "9223372036854775807")),
        ("negative", size(&honest, "-1")),
        ("path as digest", honest.replace(&layer, "sha256:../../../../etc/passwd")),
        ("other algorithm", honest.replace(&layer, &format!("sha512:{}", "0".repeat(128)))),
        ("not JSON", "<html>".into()),
        ("an artifact", honest.replace("image.config", "helm.config")),
        ("encrypted", honest.replace("tar+gzip", "tar+gzip+encrypted")),
        ("too many layers", honest.replace("\"layers\":[", &format!("\"layers\":[{}", one_layer(&honest).repeat(200)))),
        ("layers without diff ids", honest.replace("\"layers\":[", &format!("\"layers\":[{}", one_layer(&honest)))),
        ("too long", " ".repeat(9 << 20)),
    ];
    let front = Front::before(&registry.host, Faults::default()).await;
    let store = TestStore::open().await;
    for (what, manifest) in cases {
        assert_ne!(manifest, honest, "{what}");
        front.set(Faults { manifest: Some(manifest.into_bytes()), ..Faults::default() });
        let error = store.store.pull(&format!("{}/tool:v1", front.host), &()).await.expect_err(what);
        let is_typed = matches!(
            error,
            ImageError::Malformed { .. }
                | ImageError::TooLarge { .. }
                | ImageError::Unsupported { .. }
                | ImageError::RegistryUnavailable { .. }
        );
        assert!(is_typed, "{what}: {error:?}");
    }
    assert!(store.store.list().await.unwrap().is_empty());
}

fn one_layer(manifest: &str) -> String {
    let start = manifest.find("\"layers\":[").unwrap() + "\"layers\":[".len();
    let end = manifest[start..].find('}').unwrap() + start + 1;
    format!("{},", &manifest[start..end])
}

#[tokio::test]
async fn passing_failures_are_tried_again_and_lasting_ones_are_named() {
    let registry = RealRegistry::start();
    registry.push("tool", "v1", &small_image("x")).await;
    let front = Front::before(&registry.host, Faults { status: Some((503, 2)), ..Faults::default() }).await;
    let name = format!("{}/tool:v1", front.host);
    let store = TestStore::open().await;
    store.store.pull(&name, &()).await.unwrap();
    for (status, count) in [(503, 100), (429, 100), (403, 100), (400, 100)] {
        front.set(Faults { status: Some((status, count)), ..Faults::default() });
        let error = store.store.pull(&name, &()).await.unwrap_err();
        let fits = match status {
            503 => matches!(error, ImageError::RegistryUnavailable { .. }),
            429 => matches!(error, ImageError::RateLimited { .. }),
            403 => matches!(error, ImageError::AccessDenied { .. }),
            _ => matches!(error, ImageError::Malformed { .. }),
        };
        assert!(fits, "{status}: {error:?}");
    }
}

#[tokio::test]
async fn an_image_without_one_of_its_layers_is_malformed() {
    let registry = RealRegistry::start();
    let whole = small_image("whole");
    registry.push("tool", "v1", &whole).await;
    let lost = TestImage::new(vec![Blob::gzip(&Layer::new().file("lost", b"x"))]);
    registry.push("other", "v1", &lost).await;
    // A manifest that names a layer of another repository.
    let front = Front::before(&registry.host, Faults { manifest: Some(lost.manifest), ..Faults::default() }).await;
    let store = TestStore::open().await;
    let error = store.store.get(&format!("{}/tool:v1", front.host), &()).await.unwrap_err();
    assert!(matches!(&error, ImageError::Malformed { reason, .. } if reason.contains("lacks the blob")), "{error:?}");
}

#[tokio::test]
async fn concurrent_callers_share_one_download() {
    let registry = RealRegistry::start();
    let image =
        TestImage::new(vec![Blob::gzip(&Layer::new().file("a", b"a")), Blob::gzip(&Layer::new().file("b", b"b"))]);
    registry.push("tool", "v1", &image).await;
    let (go, hold) = tokio::sync::watch::channel(false);
    let front = Front::before(&registry.host, Faults { hold_blobs: Some(hold), ..Faults::default() }).await;
    let name = Arc::new(format!("{}/tool:v1", front.host));
    let store = TestStore::open().await;
    // Two stores on one directory stand for two processes.
    let other = store.open_again().await;
    let mut callers = tokio::task::JoinSet::new();
    for caller in 0..20 {
        let store = if caller % 2 == 0 { store.store.clone() } else { other.clone() };
        let name = name.clone();
        callers.spawn(async move { store.get(&name, &()).await.unwrap() });
    }
    eventually("a blob request", || front.seen().iter().any(|seen| seen.path.contains("/blobs/"))).await;
    go.send(true).unwrap();
    for image in callers.join_all().await {
        assert_eq!(fs::read(image.layers[1].join("b")).unwrap(), b"b");
    }
    for layer in &image.layers {
        assert_eq!(front.seen_blobs(&layer.digest()).len(), 1);
    }
    let manifests = front.seen().iter().filter(|seen| seen.path.contains("/manifests/")).count();
    assert!(manifests <= 2, "one per process, not {manifests}");
}

#[tokio::test]
async fn an_image_under_a_second_name_costs_no_second_download() {
    let registry = RealRegistry::start();
    let image = small_image("shared");
    registry.push("tool", "v1", &image).await;
    registry.push("tool", "v2", &image).await;
    let front = Front::before(&registry.host, Faults::default()).await;
    let store = TestStore::open().await;
    for tag in ["v1", "v2"] {
        store.store.get(&format!("{}/tool:{tag}", front.host), &()).await.unwrap();
    }
    assert_eq!(front.seen_blobs(&image.layers[0].digest()).len(), 1);
    assert_eq!(store.store.list().await.unwrap().len(), 2);
}

const TLS_IMAGE: &str = "STACYVM_TEST_TLS_IMAGE";

/// Not a test by itself: what the next test runs where `registry.test` is this
/// machine.
#[tokio::test]
async fn tls_child() {
    let Ok(name) = std::env::var(TLS_IMAGE) else { return };
    let store = TestStore::open().await;
    match store.store.get(&name, &()).await {
        Ok(image) => println!("pulled {}", fs::read_to_string(image.layers[0].join("mark")).unwrap()),
        Err(error) => println!("failed {error:?}"),
    }
}

#[tokio::test]
async fn other_hosts_are_reached_over_tls_and_must_be_trusted() {
    require_root();
    let registry = RealRegistry::start();
    registry.push("tool", "v1", &small_image("over tls")).await;
    let directory = TempDir::new().unwrap();
    let file = |name: &str| directory.path().join(name);
    make_certificate(directory.path());
    let registry = registry.restart_with_tls(&file("cert.pem"), &file("key.pem"));
    let port = registry.host.rsplit(':').next().unwrap();
    fs::write(file("hosts"), "127.0.0.1 registry.test\n").unwrap();
    let pull = |trusted: &Path| {
        let output = Command::new("unshare")
            .args([
                "--mount",
                "sh",
                "-c",
                "mount --bind \"$1\" /etc/hosts && exec \"$2\" --exact pulls::tls_child --nocapture",
            ])
            .arg("sh")
            .arg(file("hosts"))
            .arg(std::env::current_exe().unwrap())
            .env(TLS_IMAGE, format!("registry.test:{port}/tool:v1"))
            .env("SSL_CERT_FILE", trusted)
            .env_remove("SSL_CERT_DIR")
            .env("NO_PROXY", "registry.test")
            .output()
            .unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let trusted = pull(&file("ca.pem"));
    assert!(trusted.contains("pulled over tls"), "{trusted}");
    // Its own certificate makes nobody an authority.
    let strange = pull(&file("other-ca.pem"));
    assert!(strange.contains("failed RegistryUnavailable") && strange.contains("UnknownIssuer"), "{strange}");
}

/// `cert.pem` and `key.pem` for registry.test, signed by `ca.pem`, and an
/// authority that has nothing to do with it.
fn make_certificate(directory: &Path) {
    let script = "for ca in ca other-ca; do
            openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=$ca \
                -keyout $ca.key -out $ca.pem || exit 1
        done
        openssl req -x509 -CA ca.pem -CAkey ca.key -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 \
            -subj /CN=registry.test -addext basicConstraints=CA:FALSE -addext subjectAltName=DNS:registry.test \
            -keyout key.pem -out cert.pem";
    let output = Command::new("sh").args(["-c", script]).current_dir(directory).output().unwrap();
    assert!(output.status.success(), "openssl: {}", String::from_utf8_lossy(&output.stderr));
}

#[tokio::test]
async fn a_damaged_store_heals_itself() {
    let registry = RealRegistry::start();
    let image = small_image("healing");
    registry.push("tool", "v1", &image).await;
    let name = format!("{}/tool:v1", registry.host);
    let store = TestStore::open().await;
    drop(store.store.get(&name, &()).await.unwrap());
    let blobs = store.root().join("blobs/sha256");
    // A layer lost, a blob spoiled, a configuration spoiled.
    fs::remove_dir_all(store.root().join("layers")).unwrap();
    fs::create_dir(store.root().join("layers")).unwrap();
    fs::write(blobs.join(image.layers[0].digest().hex()), b"rubbish").unwrap();
    fs::write(blobs.join(Digest::of(&image.config).hex()), b"rubbish").unwrap();
    let healed = store.store.get(&name, &()).await.unwrap();
    assert_eq!(fs::read(healed.layers[0].join("mark")).unwrap(), b"healing");
}
