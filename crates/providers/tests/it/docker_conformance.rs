//! The one contract suite, on a real daemon and every kind of runtime there is
//! here.

use std::sync::Arc;

use stacyvm_conformance::{Format, ProviderTarget, RunOptions, run};

use crate::docker_fixture::DockerFixture;
use crate::dockerd::IMAGE;

#[tokio::test(flavor = "multi_thread")]
async fn runc_passes_the_contract() {
    passes("runc").await;
}

async fn passes(runtime: &str) {
    let fixture = DockerFixture::with(|options| runtime.clone_into(&mut options.runtime));
    let target = Arc::new(ProviderTarget::new(fixture.provider.clone()));
    let options = RunOptions { image: IMAGE.to_owned(), ..RunOptions::default() };
    let report = run(target, &options, &()).await.expect("everything is selected");
    assert!(report.is_success(), "{runtime}: {}", report.render(Format::Text));
    // This runtime lacks nothing, so a skip would hide a regression.
    assert_eq!(report.skipped_ids(), Vec::<&str>::new(), "{}", report.render(Format::Text));
    fixture.finish().await;
}
