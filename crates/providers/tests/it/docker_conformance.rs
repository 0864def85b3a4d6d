//! The one contract suite, on a real daemon and every kind of runtime there is
//! here.

use std::sync::Arc;

use stacyvm_conformance::{CheckReport, Format, Observer, ProviderTarget, Report, RunOptions, run};

use crate::docker_fixture::DockerFixture;
use crate::dockerd::IMAGE;

#[tokio::test(flavor = "multi_thread")]
async fn runc_passes_the_contract() {
    passes("runc").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_oci_runtime_passes_the_contract() {
    passes("crun").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn gvisor_passes_the_contract() {
    let fixture = DockerFixture::with(|options| "runsc".clone_into(&mut options.runtime));
    // Whose limit counts its own kernel: `docker_runtimes` shows what happens.
    let report = suite("runsc", &fixture, &[]).await;
    assert_eq!(report.skipped_ids(), ["S73"], "{}", report.render(Format::Text));
    assert!(report.is_success(), "{}", report.render(Format::Text));
    fixture.finish().await;
}

/// Nothing of this host is shared with it: the agent goes in as an archive, and
/// every byte through the daemon.
#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_elsewhere_passes_the_contract() {
    passes_on("runc", DockerFixture::elsewhere(), &[]).await;
}

async fn passes(runtime: &'static str) {
    passes_on(runtime, DockerFixture::with(|options| runtime.clone_into(&mut options.runtime)), &[]).await;
}

/// Nothing but `lacking` may be skipped: that would hide a regression.
async fn passes_on(runtime: &'static str, fixture: DockerFixture, lacking: &[&str]) {
    let report = suite(runtime, &fixture, &[]).await;
    assert!(report.is_success(), "{runtime}: {}", report.render(Format::Text));
    assert_eq!(report.skipped_ids(), lacking, "{}", report.render(Format::Text));
    fixture.finish().await;
}

async fn suite(runtime: &'static str, fixture: &DockerFixture, only: &[&str]) -> Report {
    let target = Arc::new(ProviderTarget::new(fixture.provider.clone()));
    let only = only.iter().map(|id| (*id).to_owned()).collect();
    let options = RunOptions { image: IMAGE.to_owned(), only, ..RunOptions::default() };
    run(target, &options, &Progress(runtime)).await.expect("something is selected")
}

/// Shows with `--nocapture` how far a runtime has come.
struct Progress(&'static str);

impl Observer for Progress {
    fn finished(&self, _index: usize, _total: usize, result: &CheckReport) {
        eprintln!("{}: {} ({} ms)", self.0, result.text_line(), result.duration_ms);
    }
}
