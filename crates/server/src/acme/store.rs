//! Where the account and the certificates are kept: a directory for each CA, so
//! that one for trying out is never taken for the real one.

use std::fmt::Write as _;
use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use super::Wanted;
use super::issued::{Issued, UnusableCertificate};

/// Of the hash of the directory's address.
const HASH_BYTES: usize = 6;

/// Files for their owner alone.
#[derive(Debug, Clone)]
pub(super) struct Store {
    dir: PathBuf,
}

impl Store {
    /// Makes the directories where they are missing, and closes them to others.
    pub(super) fn open(state_dir: &Path, directory_url: &str) -> io::Result<Self> {
        let store = Self::at(state_dir, directory_url);
        for dir in [state_dir, &store.dir] {
            DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
            std::fs::set_permissions(dir, Permissions::from_mode(0o700))?;
        }
        Ok(store)
    }

    /// Makes nothing.
    pub(super) fn at(state_dir: &Path, directory_url: &str) -> Self {
        let uri = directory_url.parse::<http::Uri>().ok();
        let host = uri.as_ref().and_then(http::Uri::host).unwrap_or_default();
        let host = host.replace(|c: char| !c.is_ascii_alphanumeric() && c != '.' && c != '-', "_");
        let hash = Sha256::digest(directory_url.as_bytes());
        let mut name = format!("{host}-");
        for byte in hash.iter().take(HASH_BYTES) {
            let _ = write!(name, "{byte:02x}");
        }
        Self { dir: state_dir.join(name) }
    }

    /// The certificate that was issued last. It may be for other names than are
    /// wanted now.
    pub(super) fn certificate(&self, wanted: &Wanted) -> Result<Option<Issued>, UnusableCertificate> {
        self.read(&certificate_file(wanted))?.map(|pem| Issued::parse(&pem)).transpose()
    }

    pub(super) fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        match std::fs::read(self.dir.join(name)) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Written aside and renamed: a crash leaves the old or the new.
    pub(super) async fn write(&self, name: &str, bytes: Vec<u8>) -> io::Result<()> {
        let (dir, target) = (self.dir.clone(), self.dir.join(name));
        let scratch = self.dir.join(format!("{name}.new"));
        in_background(move || {
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&scratch)?;
            file.write_all(&bytes)?;
            file.sync_all()?;
            std::fs::rename(&scratch, &target)?;
            File::open(dir)?.sync_all()
        })
        .await
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Takes a file that cannot be used out of the way; where it is now.
    pub(super) async fn set_aside(&self, name: &str) -> io::Result<PathBuf> {
        let (path, aside) = (self.dir.join(name), self.dir.join(format!("{name}.damaged")));
        in_background(move || std::fs::rename(path, &aside).map(|()| aside)).await
    }

    pub(super) async fn remove(&self, name: &str) -> io::Result<()> {
        let path = self.dir.join(name);
        in_background(move || std::fs::remove_file(path)).await
    }
}

pub(super) fn certificate_file(wanted: &Wanted) -> String {
    format!("{}.pem", wanted.label)
}

async fn in_background<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_ca_has_a_directory_and_every_file_one_reader() {
        let outer = tempfile::tempdir().unwrap();
        let one = Store::open(outer.path(), "https://ca.example:14000/dir").unwrap();
        let other = Store::open(outer.path(), "https://ca.example:14000/staging").unwrap();
        one.write("account.json", b"one".to_vec()).await.unwrap();
        assert_eq!(one.read("account.json").unwrap().unwrap(), b"one");
        assert_eq!(other.read("account.json").unwrap(), None);
        one.write("account.json", b"two".to_vec()).await.unwrap();
        let file = one.dir.join("account.json");
        assert_eq!(std::fs::read(&file).unwrap(), b"two");
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&file), mode(&one.dir)), (0o600, 0o700));
        assert!(one.dir.file_name().unwrap().to_str().unwrap().starts_with("ca.example-"));
        one.remove("account.json").await.unwrap();
        assert_eq!(one.read("account.json").unwrap(), None);
    }
}
