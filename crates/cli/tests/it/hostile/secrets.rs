//! What image `host` must not show of the host.

use std::fs;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use stacyvm_api::{ErrorCode, WriteRequest};

use super::{Attack, refusal};
use crate::support::{output, sh};

const SECRET: &str = "secret-of-the-host";

/// A file on the host that goes with the value.
struct Planted(PathBuf);

impl Planted {
    fn at(directory: &str, mode: u32) -> Self {
        let name = format!("stacyvm-e2e-{}-{mode:o}", std::process::id());
        let path = Path::new(directory).join(name);
        // It must be new: nobody else's file is taken away at the end.
        let file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&path);
        let planted = Self(path);
        let mut file = file.unwrap_or_else(|error| panic!("{}: {error}", planted.0.display()));
        std::io::Write::write_all(&mut file, SECRET.as_bytes()).expect("written");
        fs::set_permissions(&planted.0, fs::Permissions::from_mode(mode)).expect("its mode");
        planted
    }

    fn path(&self) -> &str {
        self.0.to_str().expect("text")
    }
}

impl Drop for Planted {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_are_not_for_everybody_cannot_be_read() {
    let (private, group) = (Planted::at("/usr/share", 0o600), Planted::at("/usr/share", 0o640));
    let public = Planted::at("/usr/share", 0o644);
    let attack = Attack::by_host_programs().await;
    for planted in [&private, &group] {
        let path = planted.path();
        assert_eq!(refusal(attack.guest.read_file(path).await), ErrorCode::FileForbidden, "{path}");
        let read = sh(&attack.guest, &format!("cat {path}; cp {path} /tmp/copy; dd if={path}; chmod 644 {path}")).await;
        assert!(read.exit_code != 0 && !read.stdout.contains(SECRET), "{read:?}");
        assert_eq!(refusal(attack.guest.chmod(path, "0644").await), ErrorCode::FileForbidden, "{path}");
        let link = format!("ln -sf {path} /workspace/link; ln {path} /workspace/hard 2>&1; true");
        output(&attack.guest, &link).await;
        assert_eq!(refusal(attack.guest.read_file("/workspace/link").await), ErrorCode::FileForbidden);
        assert_eq!(refusal(attack.guest.read_file("/workspace/hard").await), ErrorCode::FileNotFound);
    }
    assert_eq!(attack.guest.read_file(public.path()).await.expect("it is for everybody"), SECRET.as_bytes());
    let write = WriteRequest { path: public.path().to_owned(), content: "x".to_owned(), ..WriteRequest::default() };
    assert_eq!(refusal(attack.guest.write_file(&write).await), ErrorCode::FileForbidden);
    assert_eq!(refusal(attack.guest.remove(public.path()).await), ErrorCode::FileForbidden);
    assert_eq!(fs::read_to_string(&public.0).expect("still there"), SECRET);
    attack.ends_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_people_keep_on_the_host_is_not_there() {
    let planted = ["/usr/local/share", "/usr/src"].map(|directory| Planted::at(directory, 0o644));
    let attack = Attack::by_host_programs().await;
    for path in planted.iter().map(Planted::path) {
        assert_eq!(refusal(attack.guest.read_file(path).await), ErrorCode::FileNotFound, "{path}");
        assert_eq!(output(&attack.guest, &format!("cat {path} 2>/dev/null; echo end")).await, "end");
    }
    // `/usr/local` is the sandbox's own, and stays so.
    output(&attack.guest, "echo mine > /usr/local/bin/mine").await;
    assert!(!Path::new("/usr/local/bin/mine").exists());
    for own in ["/etc/shadow", "/etc/ssh", "/root/.ssh", "/var/lib/stacyvm", "/boot", "/run/stacyvm"] {
        assert_eq!(refusal(attack.guest.stat(own).await), ErrorCode::FileNotFound, "{own}");
    }
    let home = attack.server.site.home().to_str().expect("text");
    assert_eq!(refusal(attack.guest.stat(home).await), ErrorCode::FileNotFound);
    attack.ends_well().await;
}
