//! The same sandboxes, started by OCI runtimes of the host.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use stacyvm_api::{FindingLevel, Limit, SandboxId};
use stacyvm_providers::oci::{BridgeOptions, OciProvider, OciRuntime};
use stacyvm_sandbox::{Provider, ProviderError, RuntimeState};

use crate::fixture::{Fixture, chain, options, spec};
use crate::oci_conformance::passes_with;

/// Both are packages of `scripts/test-packages.txt`.
const RUNTIMES: [&str; 2] = ["runc", "crun"];

fn program(name: &str) -> OciRuntime {
    OciRuntime::Program { name: name.to_owned(), search: "/usr/sbin:/usr/bin".to_owned() }
}

async fn with(runtime: &str) -> Fixture {
    Fixture::with(|options| options.runtime = program(runtime)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn runc_passes_the_contract() {
    passes_with("host", |options| options.runtime = program("runc")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn crun_passes_the_contract() {
    passes_with("host", |options| options.runtime = program("crun")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_imported_image_passes_the_contract_with_crun() {
    passes_with("alpine:latest", |options| options.runtime = program("crun")).await;
}
