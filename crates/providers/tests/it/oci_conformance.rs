//! The one contract suite, on real namespaces, with and without an image.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use stacyvm_conformance::{Format, ProviderTarget, RunOptions, run};
use stacyvm_image::{ImageStore, ImageStoreOptions, ImportOptions};
use stacyvm_providers::oci::OciOptions;
use stacyvm_sandbox::Provider as _;

use crate::fixture::Fixture;
use crate::ordinary_user;

/// Name that the suite, and published SDKs, ask for.
const IMAGE: &str = "alpine:latest";

#[tokio::test(flavor = "multi_thread")]
async fn the_host_image_passes_the_contract() {
    passes("host").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_imported_image_passes_the_contract() {
    passes(IMAGE).await;
}

async fn passes(image: &str) {
    passes_with(image, |_| {}).await;
}

/// Runs the suite on a provider with settings of its own.
pub(crate) async fn passes_with(image: &str, change: impl FnOnce(&mut OciOptions)) {
    let directory = tempfile::tempdir().expect("a directory for images");
    let images = imported(directory.path()).await;
    let fixture = Fixture::with(|options| {
        options.images = Some(images);
        change(options);
    })
    .await;
    let target = Arc::new(ProviderTarget::new(fixture.provider.clone()));
    let options = RunOptions { image: image.to_owned(), ..RunOptions::default() };
    let report = run(target, &options, &()).await.expect("everything is selected");
    fixture.provider.shutdown().await;
    assert!(report.is_success(), "{}", report.render(Format::Text));
    // This runtime lacks nothing, so a skip would hide a regression.
    assert_eq!(report.skipped_ids(), Vec::<&str>::new(), "{}", report.render(Format::Text));
}

/// A store that holds an image made from busybox under the name that everybody
/// uses, so that nothing is fetched.
async fn imported(directory: &Path) -> ImageStore {
    let archive = ordinary_user::image_archive().unwrap_or_else(|| directory.join("image.tar"));
    if !archive.exists() {
        make_image(&archive);
    }
    let store = ImageStore::open(ImageStoreOptions::new(directory.join("store"))).await.expect("a store");
    store.import(&archive, ImportOptions::default(), &()).await.expect("an image");
    store
}

/// A docker archive of that image.
pub(crate) fn make_image(archive: &Path) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/make-test-image.sh");
    let made = Command::new(script).arg(archive).arg(IMAGE).output().expect("the script starts");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}
