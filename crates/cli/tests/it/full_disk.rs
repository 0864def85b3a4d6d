//! A server whose data directory is on a full disk: what is there can be used
//! and destroyed, nothing new is made, and everybody is told why.

use std::fs::{self, File};
use std::io::{ErrorKind, Write as _};
use std::path::PathBuf;
use std::sync::Arc;

use rustix::mount::{MountFlags, UnmountFlags};
use rustix::process::Signal;
use stacyvm_api::{CreateRequest, ErrorCode, ListQuery};
use stacyvm_client::ClientError;

use crate::support::{Server, Site, create, eventually, output, small};

/// A disk that is soon full.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn of(site: &Site) -> Self {
        let place = site.home().join("disk");
        fs::create_dir(&place).expect("a directory");
        rustix::mount::mount("tmpfs", &place, "tmpfs", MountFlags::empty(), c"size=128m").expect("mounted");
        Self(place)
    }

    fn data_dir(&self) -> PathBuf {
        self.0.join("data")
    }

    async fn serve(&self, site: &Arc<Site>) -> Server {
        Server::start_with(site, |serve| {
            serve.arg("--destroy-on-exit").env("STACYVM_DATA_DIR", self.data_dir());
        })
        .await
    }

    /// Leaves not even a page.
    fn fill(&self) {
        let mut file = File::options().create(true).append(true).open(self.0.join("ballast")).expect("a file");
        loop {
            match file.write(&[7; 4096]) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::StorageFull => return,
                Err(error) => panic!("{error}"),
            }
        }
    }

    fn empty(&self) {
        fs::remove_file(self.0.join("ballast")).expect("removed");
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, UnmountFlags::DETACH);
    }
}

fn of_host() -> CreateRequest {
    CreateRequest { image: Some("host".to_owned()), ..small() }
}

async fn refuses_creates(server: &Server) {
    let refused = server.client().create(&of_host()).await.map(drop).expect_err("there is no room");
    let ClientError::Api(failure) = refused else { panic!("not an answer of the server: {refused:?}") };
    assert_eq!(failure.code, Some(ErrorCode::Unavailable), "{failure:?}");
    assert!(failure.message.contains("the disk that holds the server's data directory is full"), "{failure:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_runs_is_used_and_destroyed_and_nothing_is_made() {
    let site = Site::new();
    let disk = SmallDisk::of(&site);
    let server = disk.serve(&site).await;
    let client = server.client();
    let [kept, destroyed] = [create(&client, &of_host()).await, create(&client, &of_host()).await];
    disk.fill();
    refuses_creates(&server).await;
    assert_eq!(output(&kept, "echo alive").await, "alive");
    destroyed.destroy().await.expect("destroyed");
    let listed = client.list_all(&ListQuery::default()).await.expect("a list");
    assert_eq!(listed.iter().map(|sandbox| &sandbox.id).collect::<Vec<_>>(), [kept.id()]);

    // The reserve lets it start, and then it is as full as before.
    let kept = kept.id().clone();
    disk.fill();
    server.kill();
    let server = disk.serve(&site).await;
    let client = server.client();
    disk.fill();
    let guest = client.sandbox(kept);
    assert_eq!(output(&guest, "echo alive").await, "alive");
    refuses_creates(&server).await;
    guest.destroy().await.expect("destroyed");
    assert_eq!(client.list_all(&ListQuery::default()).await.expect("a list"), []);

    disk.empty();
    let made = eventually("creates work again", async || client.create(&of_host()).await.ok()).await;
    assert_eq!(output(&client.sandbox(made.id), "echo new").await, "new");
    assert!(server.stop(Signal::TERM).await.status.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_without_any_room_says_which_directory() {
    let site = Site::new();
    let disk = SmallDisk::of(&site);
    fs::create_dir(disk.data_dir()).expect("a directory");
    disk.fill();
    let data_dir = disk.data_dir().display().to_string();
    for provider in ["oci", "mock"] {
        let mut serve = site.program();
        serve.args(["serve", "--port", "0", "--data-dir", &data_dir]).env("STACYVM_PROVIDERS_DEFAULT", provider);
        let ended = crate::support::run(serve.into(), b"").await.failed(1);
        ended.says(&format!("the disk that holds the data directory {data_dir} is full")).says("free some space");
    }
}
