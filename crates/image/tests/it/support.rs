//! What every test here starts from.

use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use stacyvm_image::{ImageStore, ImageStoreOptions};
use stacyvm_sandbox::{Progress, ProgressSink};
use tempfile::TempDir;

/// For anything that should happen at once.
pub(crate) const DEADLINE: Duration = Duration::from_mins(1);

/// A store of its own, gone with the test.
pub(crate) struct TestStore {
    pub(crate) store: ImageStore,
    directory: TempDir,
}

impl TestStore {
    pub(crate) async fn open() -> Self {
        Self::open_with(|_| {}).await
    }

    pub(crate) async fn open_with(adjust: impl FnOnce(&mut ImageStoreOptions)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut options = ImageStoreOptions::new(directory.path().join("images"));
        adjust(&mut options);
        Self { store: ImageStore::open(options).await.unwrap(), directory }
    }

    pub(crate) fn root(&self) -> std::path::PathBuf {
        self.directory.path().join("images")
    }

    /// A second process's view of the same store, as far as locks go.
    pub(crate) async fn open_again(&self) -> ImageStore {
        ImageStore::open(ImageStoreOptions::new(self.root())).await.unwrap()
    }
}

/// A store tidies up in the background after its last handle is gone, which can
/// undo the removal of its directory; so it is removed until it stays away.
impl Drop for TestStore {
    fn drop(&mut self) {
        let deadline = Instant::now() + DEADLINE;
        while self.directory.path().exists() && Instant::now() < deadline {
            if std::fs::remove_dir_all(self.directory.path()).is_err() {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

/// Keeps all it is told.
#[derive(Default)]
pub(crate) struct Recorded(Mutex<Vec<Progress>>);

impl ProgressSink for Recorded {
    fn report(&self, progress: Progress) {
        self.0.lock().unwrap().push(progress);
    }
}

impl Recorded {
    pub(crate) fn all(&self) -> Vec<Progress> {
        self.0.lock().unwrap().clone()
    }
}

/// Polls until `condition` holds; fails with `what` when it does not in time.
pub(crate) async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not happen in {DEADLINE:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub(crate) fn entries(path: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Tests of ownership, devices and overlayfs need root, and say so.
pub(crate) fn require_root() {
    assert!(rustix::process::geteuid().is_root(), "this test needs root: run it as root");
}
