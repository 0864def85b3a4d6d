//! Data directories on file systems that sandboxes cannot be made from.

use stacyvm_api::{FindingLevel, SandboxId};
use stacyvm_sandbox::{Provider, ProviderError};

use crate::fixture::{Fixture, spec};

#[tokio::test(flavor = "multi_thread")]
async fn a_data_directory_that_layers_cannot_be_used_from_is_said_to_be_the_cause() {
    let overlay = Overlay::mount();
    let fixture = Fixture::over(&overlay.merged()).await;
    let report = fixture.provider.check().await;
    let finding = report.findings.iter().find(|finding| finding.name == "oci.owners").expect("looked at");
    assert_eq!(finding.level, FindingLevel::Failure, "{finding:?}");
    let refused = fixture.provider.create(&SandboxId::random(), &spec(), &()).await;
    let Err(ProviderError::Unavailable { message, hint, .. }) = &refused else { panic!("{refused:?}") };
    assert!(message.contains("cannot shift the owners"), "{message}");
    assert!(hint.as_ref().is_some_and(|hint| hint.contains("a volume")), "{hint:?}");
    fixture.provider.shutdown().await;
}

/// What a container has as its own file system: owners cannot be shifted there.
struct Overlay(tempfile::TempDir);

impl Overlay {
    fn mount() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        for name in ["lower", "upper", "work", "merged"] {
            std::fs::create_dir(directory.path().join(name)).expect("it is empty");
        }
        let base = directory.path().display();
        let options = format!("lowerdir={base}/lower,upperdir={base}/upper,workdir={base}/work");
        let options = std::ffi::CString::new(options).expect("no NUL");
        let overlay = Self(directory);
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("overlay", overlay.merged(), "overlay", flags, options.as_c_str()).expect("root mounts");
        overlay
    }

    fn merged(&self) -> std::path::PathBuf {
        self.0.path().join("merged")
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.merged(), rustix::mount::UnmountFlags::DETACH);
    }
}
