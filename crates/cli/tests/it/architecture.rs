//! `ARCHITECTURE.md` says which crate may use which; here the build says it.

use std::collections::{BTreeMap, BTreeSet};

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand, Package};

use crate::support::in_repository;

/// What each crate of the workspace may use of the others. A new line here is
/// a new line in `ARCHITECTURE.md`.
const MAY_USE: [(&str, &[&str]); 15] = [
    ("stacyvm-api", &[]),
    ("stacyvm-envd", &[]),
    ("stacyvm-agent", &["stacyvm-envd"]),
    ("stacyvm-agent-embed", &[]),
    ("stacyvm-sandbox", &["stacyvm-api", "stacyvm-envd"]),
    ("stacyvm-image", &["stacyvm-api", "stacyvm-sandbox"]),
    ("stacyvm-providers", &["stacyvm-agent-embed", "stacyvm-api", "stacyvm-envd", "stacyvm-image", "stacyvm-sandbox"]),
    ("stacyvm-engine", &["stacyvm-api", "stacyvm-sandbox"]),
    ("stacyvm-server", &["stacyvm-api", "stacyvm-engine", "stacyvm-sandbox"]),
    ("stacyvm-backend", &["stacyvm-api", "stacyvm-sandbox"]),
    ("stacyvm-client", &["stacyvm-api"]),
    ("stacyvm-conformance", &["stacyvm-api", "stacyvm-client", "stacyvm-sandbox"]),
    ("stacyvm-certify", &["stacyvm-api", "stacyvm-client", "stacyvm-conformance"]),
    ("stacyvm-bench", &["stacyvm-api", "stacyvm-client", "stacyvm-conformance"]),
    (
        "stacyvm",
        &[
            "stacyvm-agent-embed",
            "stacyvm-api",
            "stacyvm-backend",
            "stacyvm-certify",
            "stacyvm-client",
            "stacyvm-conformance",
            "stacyvm-engine",
            "stacyvm-envd",
            "stacyvm-image",
            "stacyvm-providers",
            "stacyvm-sandbox",
            "stacyvm-server",
        ],
    ),
];

/// Libraries that only these crates may name, so that what they are used for
/// stays in one place.
const ONLY_IN: [(&str, &[&str]); 7] = [
    // HTTP is the server's, and that of the server of one runtime.
    ("axum", &["stacyvm-backend", "stacyvm-server"]),
    ("utoipa-swagger-ui", &["stacyvm-server"]),
    ("instant-acme", &["stacyvm-server"]),
    // So is the store the engine's.
    ("sqlx", &["stacyvm-engine"]),
    // The framework of the agent protocol could be replaced in one place.
    ("connectrpc", &["stacyvm-agent", "stacyvm-envd", "stacyvm-sandbox"]),
    ("buffa", &["stacyvm-envd"]),
    // The environment and the terminal are the program's.
    ("clap", &["stacyvm", "stacyvm-bench"]),
];

/// There is one implementation of TLS and cryptography, and no C library of one.
const NOWHERE: [&str; 4] = ["openssl-sys", "native-tls", "aws-lc-rs", "aws-lc-sys"];

fn metadata() -> Metadata {
    // What others are made of would have to be fetched first.
    let mut command = MetadataCommand::new();
    command.manifest_path(in_repository("Cargo.toml")).no_deps();
    command.exec().expect("cargo knows this workspace")
}

/// Names of what a package is built from; tests may use more.
fn used_by(package: &Package) -> BTreeSet<&str> {
    let built = package.dependencies.iter().filter(|it| it.kind != DependencyKind::Development);
    built.map(|it| it.name.as_str()).collect()
}

#[test]
fn every_crate_uses_only_what_the_map_allows() {
    let metadata = metadata();
    let map: BTreeMap<&str, &[&str]> = MAY_USE.into();
    let packages = metadata.workspace_packages();
    let ours: BTreeSet<&str> = packages.iter().map(|package| package.name.as_str()).collect();
    assert_eq!(ours, map.keys().copied().collect(), "crates of the workspace, and of the map");
    for package in packages {
        let used: BTreeSet<&str> = used_by(package).intersection(&ours).copied().collect();
        let allowed: BTreeSet<&str> = map[package.name.as_str()].iter().copied().collect();
        assert_eq!(used, allowed, "{} uses, and may use", package.name);
    }
}

#[test]
fn what_has_one_place_stays_there() {
    let metadata = metadata();
    for package in metadata.workspace_packages() {
        let used = used_by(package);
        for (library, places) in ONLY_IN {
            let is_place = places.contains(&package.name.as_str());
            assert!(is_place || !used.contains(library), "{} uses {library}, which is for {places:?}", package.name);
        }
    }
    let lock = std::fs::read_to_string(in_repository("Cargo.lock")).expect("readable");
    let locked: BTreeSet<&str> =
        lock.lines().filter_map(|line| line.strip_prefix("name = \"")?.strip_suffix('"')).collect();
    assert!(locked.contains("rustls") && locked.contains("ring"), "Cargo.lock is not understood");
    for library in NOWHERE {
        assert!(!locked.contains(library), "{library} is in Cargo.lock");
    }
}

#[test]
fn the_page_shows_every_crate_and_no_other() {
    let metadata = metadata();
    let page = std::fs::read_to_string(in_repository("ARCHITECTURE.md")).expect("the page");
    let shown: BTreeSet<&str> = page
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split('`').next())
        .filter(|it| it.contains('/'))
        .collect();
    let root = &metadata.workspace_root;
    let folders: BTreeSet<String> = metadata
        .workspace_packages()
        .iter()
        .filter_map(|package| package.manifest_path.parent()?.strip_prefix(root).ok())
        .map(ToString::to_string)
        // Measures the product and is no part of it.
        .filter(|folder| folder != "bench")
        .collect();
    assert_eq!(shown, folders.iter().map(String::as_str).collect());
}
