//! The one contract suite under PRoot: as root and as an ordinary user, with
//! namespaces and without, on busybox and on a real Debian.

use std::path::Path;
use std::sync::Arc;

use stacyvm_conformance::{Format, ProviderTarget, RunOptions, run};

use crate::ordinary_user::{Circumstances, as_ordinary_user};
use crate::proot_fixture::{Apart, Proot, busybox_root, debian_root};

async fn passes(apart: Apart, rootfs: &Path) {
    let fixture = Proot::with(apart, |options| rootfs.clone_into(&mut options.rootfs)).await;
    let target = Arc::new(ProviderTarget::new(fixture.provider.clone()));
    let options = RunOptions { image: "rootfs".to_owned(), ..RunOptions::default() };
    let report = run(target, &options, &()).await.expect("everything is selected");
    assert!(report.is_success(), "{}", report.render(Format::Text));
    // PRoot rewrites paths; and without a pid namespace one more thing cannot
    // be had.
    let skipped: &[&str] = if apart == Apart::Shared { &["S70", "S75"] } else { &["S75"] };
    assert_eq!(report.skipped_ids(), skipped, "{}", report.render(Format::Text));
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn root_passes_the_contract_with_namespaces() {
    passes(Apart::Namespaces, &busybox_root()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn root_passes_the_contract_without_namespaces() {
    passes(Apart::Shared, &busybox_root()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn root_passes_the_contract_on_debian() {
    passes(Apart::Namespaces, &debian_root()).await;
}

#[test]
fn an_ordinary_user_passes_the_contract_with_namespaces() {
    const NAME: &str = "proot_conformance::an_ordinary_user_passes_the_contract_with_namespaces";
    as_ordinary_user(NAME, Circumstances::ALONE, async || passes(Apart::Namespaces, &busybox_root()).await);
}

#[test]
fn an_ordinary_user_passes_the_contract_without_namespaces() {
    const NAME: &str = "proot_conformance::an_ordinary_user_passes_the_contract_without_namespaces";
    as_ordinary_user(NAME, Circumstances::ALONE, async || passes(Apart::Shared, &busybox_root()).await);
}

#[test]
fn an_ordinary_user_passes_the_contract_on_debian() {
    const NAME: &str = "proot_conformance::an_ordinary_user_passes_the_contract_on_debian";
    as_ordinary_user(NAME, Circumstances::ALONE, async || passes(Apart::Shared, &debian_root()).await);
}
