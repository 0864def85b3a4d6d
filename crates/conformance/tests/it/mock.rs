//! The suite on the fake runtime: what it says it has, it has.

use std::sync::Arc;

use stacyvm_conformance::{Format, ProviderTarget, RunOptions, run};
use stacyvm_providers::mock::MockProvider;

#[tokio::test(flavor = "multi_thread")]
async fn the_mock_passes_everything_that_it_does_not_say_it_lacks() {
    let provider = MockProvider::default();
    let target = Arc::new(ProviderTarget::new(Arc::new(provider.clone())));
    let report = run(target, &RunOptions::default(), &()).await.unwrap();
    assert!(report.is_success(), "{}", report.render(Format::Text));
    for check in &report.checks {
        if let Some(reason) = &check.reason {
            assert!(reason.contains("running real programs"), "{} was skipped: {reason}", check.id);
        }
    }
    // The published checks need nothing that a runtime may lack.
    assert!(report.skipped_ids().iter().all(|id| !id.starts_with('C')), "{:?}", report.skipped_ids());
    assert_eq!(provider.sandbox_ids(), []);
}
