//! A tar stream from a sandbox into a local directory.
//!
//! The stream is hostile: whoever is in the sandbox wrote it. Names may not
//! leave the directory, nothing is written through a link that the stream
//! itself made (links are made last), only files, directories and links exist,
//! and no set-uid bits survive.

use std::fs::Permissions;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Component, Path, PathBuf};

use anyhow::Context as _;
use futures_util::StreamExt as _;
use tokio::fs::OpenOptions;
use tokio::io::{AsyncRead, AsyncWriteExt as _, BufReader};
use tokio_tar::{ArchiveBuilder, Entry, EntryType};

/// Bytes moved at a time.
pub(super) const BUFFER_BYTES: usize = 256 * 1024;

/// Links and directories that are remembered until the end.
const MAX_DEFERRED: usize = 1_000_000;

pub(super) const PERMISSION_BITS: u32 = 0o777;

/// Set-user-id, set-group-id and sticky, which the host's own files would have
/// for somebody in the sandbox.
pub(super) const SPECIAL_BITS: u32 = 0o7000;

/// What became of a stream.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Unpacked {
    /// Devices, pipes and sockets, which are not copied.
    pub(super) skipped: u64,
    /// What is here without its special bits.
    pub(super) plainer: u64,
}

pub(super) async fn unpack<R: AsyncRead + Unpin>(source: R, target: &Path) -> anyhow::Result<Unpacked> {
    std::fs::create_dir_all(target).with_context(|| format!("cannot make {}", target.display()))?;
    let reader = BufReader::with_capacity(BUFFER_BYTES, source);
    let mut archive = ArchiveBuilder::new(reader).set_unpack_xattrs(false).build();
    let mut entries = archive.entries().context("read the archive")?;
    let mut unpacking = Unpacking { target, links: Vec::new(), directories: Vec::new(), done: Unpacked::default() };
    while let Some(entry) = entries.next().await {
        let mut entry = entry.context("the archive broke off or is damaged")?;
        unpacking.entry(&mut entry).await?;
    }
    unpacking.finish()
}

struct Unpacking<'a> {
    target: &'a Path,
    links: Vec<(PathBuf, PathBuf)>,
    directories: Vec<(PathBuf, u32)>,
    done: Unpacked,
}

impl Unpacking<'_> {
    async fn entry<R: AsyncRead + Unpin>(&mut self, entry: &mut Entry<R>) -> anyhow::Result<()> {
        let name = entry.path().context("read a name of the archive")?.into_owned();
        let path = self.inside(&name)?;
        let cannot = || format!("cannot write {}", path.display());
        let asked = entry.header().mode().unwrap_or(0o644);
        let mode = asked & PERMISSION_BITS;
        let kind = entry.header().entry_type();
        if asked & SPECIAL_BITS != 0 && (kind.is_file() || kind.is_dir()) {
            self.done.plainer += 1;
        }
        match kind {
            EntryType::Directory => {
                std::fs::create_dir_all(&path).with_context(cannot)?;
                self.defer_check()?;
                self.directories.push((path, mode));
            }
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                make_room(&path).with_context(cannot)?;
                write_file(entry, &path, mode).await.with_context(cannot)?;
            }
            EntryType::Symlink => {
                let link = entry.link_name().context("read a link of the archive")?.unwrap_or_default().into_owned();
                self.defer_check()?;
                self.links.push((path, link));
            }
            EntryType::Link => {
                let name = entry.link_name().context("read a link of the archive")?.unwrap_or_default().into_owned();
                let original = self.inside(&name)?;
                make_room(&path).with_context(cannot)?;
                std::fs::copy(original, &path).with_context(cannot)?;
            }
            _ => self.done.skipped += 1,
        }
        Ok(())
    }

    /// Links, which nothing is written through any more, and the modes of
    /// directories, which may be read-only.
    fn finish(self) -> anyhow::Result<Unpacked> {
        for (path, link) in self.links {
            let cannot = || format!("cannot link {}", path.display());
            make_room(&path).with_context(cannot)?;
            std::os::unix::fs::symlink(link, &path).with_context(cannot)?;
        }
        for (path, mode) in self.directories.into_iter().rev() {
            // A link of the same name took its place.
            if path.symlink_metadata().is_ok_and(|metadata| metadata.is_dir()) {
                std::fs::set_permissions(&path, Permissions::from_mode(mode))
                    .with_context(|| format!("cannot set the mode of {}", path.display()))?;
            }
        }
        Ok(self.done)
    }

    /// The path below the target that a name of the archive means.
    fn inside(&self, name: &Path) -> anyhow::Result<PathBuf> {
        let mut path = self.target.to_owned();
        for component in name.components() {
            match component {
                Component::Normal(part) => path.push(part),
                Component::CurDir => {}
                Component::ParentDir | Component::RootDir | Component::Prefix(_) => {
                    anyhow::bail!("the sandbox sent the name `{}`, which leaves the directory", name.display());
                }
            }
        }
        Ok(path)
    }

    fn defer_check(&self) -> anyhow::Result<()> {
        anyhow::ensure!(
            self.links.len() + self.directories.len() < MAX_DEFERRED,
            "the archive has more than {MAX_DEFERRED} links and directories"
        );
        Ok(())
    }
}

/// Makes the directory a path is in, and takes away what is at the path.
fn make_room(path: &Path) -> std::io::Result<()> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

async fn write_file<R: AsyncRead + Unpin>(entry: &mut Entry<R>, path: &Path, mode: u32) -> std::io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).await?;
    let mut reader = BufReader::with_capacity(BUFFER_BYTES, entry);
    tokio::io::copy_buf(&mut reader, &mut file).await?;
    file.flush().await?;
    std::fs::set_permissions(path, Permissions::from_mode(mode))
}

#[cfg(test)]
mod tests {
    use tokio_tar::{Builder, Header};

    use super::*;
    use crate::commands::cp::{fixture, pack};

    async fn archive(entries: &[(&str, EntryType, &str)]) -> Vec<u8> {
        let mut builder = Builder::new(Vec::new());
        for (name, kind, content) in entries {
            let mut header = Header::new_ustar();
            // Set as bytes: the library refuses the names that are tried here.
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_entry_type(*kind);
            header.set_mode(0o6755);
            let mut data = content.as_bytes();
            if matches!(kind, EntryType::Symlink | EntryType::Link) {
                header.as_old_mut().linkname[..content.len()].copy_from_slice(data);
                data = b"";
            }
            header.set_size(data.len() as u64);
            header.set_cksum();
            builder.append(&header, data).await.unwrap();
        }
        builder.into_inner().await.unwrap()
    }

    #[tokio::test]
    async fn a_tree_arrives_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let tree = fixture(dir.path());
        let (stream, packing) = pack::stream(tree.clone());
        let copy = dir.path().join("new/copy");
        assert_eq!(unpack(stream, &copy).await.unwrap(), Unpacked::default());
        packing.await.unwrap().unwrap();
        assert_eq!(std::fs::read(copy.join("odd \u{fc}\nname")).unwrap(), b"\0\xff");
        assert_eq!(copy.join("a/run.sh").metadata().unwrap().permissions().mode() & 0o7777, 0o755);
        assert!(copy.join("a/empty").is_dir());
        assert_eq!(std::fs::read_link(copy.join("link")).unwrap(), Path::new("a/run.sh"));
    }

    #[tokio::test]
    async fn names_that_leave_the_directory_are_refused() {
        for name in ["../out", "a/../../out", "/etc/out"] {
            let dir = tempfile::tempdir().unwrap();
            let bytes = archive(&[(name, EntryType::Regular, "x")]).await;
            let error = unpack(&bytes[..], &dir.path().join("in")).await.unwrap_err();
            assert!(error.to_string().contains("leaves the directory"), "{error:#}");
            assert!(!dir.path().join("out").exists());
        }
    }

    #[tokio::test]
    async fn nothing_is_written_through_a_link_of_the_archive() {
        let dir = tempfile::tempdir().unwrap();
        let (inside, outside) = (dir.path().join("in"), dir.path().join("out"));
        std::fs::create_dir(&outside).unwrap();
        let link = outside.to_str().unwrap();
        let entries = [("a", EntryType::Symlink, link), ("a/planted", EntryType::Regular, "x")];
        // The link finds a directory in its place, which is an error too.
        unpack(&archive(&entries).await[..], &inside).await.unwrap_err();
        assert!(!outside.join("planted").exists());
        let entries = [("b", EntryType::Link, "../out/secret")];
        unpack(&archive(&entries).await[..], &inside).await.unwrap_err();
    }

    #[tokio::test]
    async fn devices_stay_behind_and_set_uid_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let entries = [("dev", EntryType::Char, ""), ("pipe", EntryType::Fifo, ""), ("bin", EntryType::Regular, "x")];
        let unpacked = unpack(&archive(&entries).await[..], dir.path()).await.unwrap();
        assert_eq!(unpacked, Unpacked { skipped: 2, plainer: 1 });
        assert_eq!(dir.path().join("bin").metadata().unwrap().permissions().mode() & 0o7777, 0o755);
        assert!(!dir.path().join("dev").exists() && !dir.path().join("pipe").exists());
    }

    #[tokio::test]
    async fn an_archive_that_breaks_off_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let bytes = archive(&[("a", EntryType::Regular, &"x".repeat(2000))]).await;
        unpack(&bytes[..1024], dir.path()).await.unwrap_err();
    }
}
