//! A tar stream from a sandbox into a local directory.
//!
//! The stream is hostile: whoever is in the sandbox wrote it. Names may not
//! leave the directory, only files, directories and links exist, and no set-uid
//! bits survive. Links are made last; that none is ever followed, whoever made
//! it, is the part of [`Destination`].

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Component, Path, PathBuf};

use anyhow::Context as _;
use futures_util::StreamExt as _;
use tokio::fs::File;
use tokio::io::{AsyncRead, AsyncWriteExt as _, BufReader};
use tokio_tar::{ArchiveBuilder, Entry, EntryType};

use super::destination::Destination;

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

pub(super) async fn unpack<R: AsyncRead + Unpin>(source: R, destination: &Destination) -> anyhow::Result<Unpacked> {
    let reader = BufReader::with_capacity(BUFFER_BYTES, source);
    let mut archive = ArchiveBuilder::new(reader).set_unpack_xattrs(false).build();
    let mut entries = archive.entries().context("read the archive")?;
    let mut unpacking =
        Unpacking { destination, links: Vec::new(), directories: Vec::new(), done: Unpacked::default() };
    while let Some(entry) = entries.next().await {
        let mut entry = entry.context("the archive broke off or is damaged")?;
        unpacking.entry(&mut entry).await?;
    }
    unpacking.finish()
}

struct Unpacking<'a> {
    destination: &'a Destination,
    links: Vec<(PathBuf, PathBuf)>,
    directories: Vec<(PathBuf, u32)>,
    done: Unpacked,
}

impl Unpacking<'_> {
    async fn entry<R: AsyncRead + Unpin>(&mut self, entry: &mut Entry<R>) -> anyhow::Result<()> {
        let name = safe_name(&entry.path().context("read a name of the archive")?)?;
        if name.as_os_str().is_empty() {
            // The directory itself is the user's, and keeps its mode.
            return Ok(());
        }
        let cannot = || format!("cannot write {}", self.shown(&name));
        let asked = entry.header().mode().unwrap_or(0o644);
        let mode = asked & PERMISSION_BITS;
        let kind = entry.header().entry_type();
        match kind {
            EntryType::Directory => {
                self.destination.make_directory(&name).with_context(cannot)?;
                self.defer_check()?;
                self.directories.push((name, mode));
            }
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                let file = self.destination.create_file(&name).with_context(cannot)?;
                write_file(entry, file, mode).await.with_context(cannot)?;
            }
            EntryType::Symlink => {
                let link = entry.link_name().context("read a link of the archive")?.unwrap_or_default().into_owned();
                self.defer_check()?;
                self.links.push((name, link));
            }
            EntryType::Link => {
                let link = entry.link_name().context("read a link of the archive")?.unwrap_or_default();
                let original = safe_name(&link)?;
                self.copy_file(&original, &name)
                    .with_context(|| format!("cannot copy {} to {}", self.shown(&original), self.shown(&name)))?;
            }
            _ => self.done.skipped += 1,
        }
        if asked & SPECIAL_BITS != 0 && (kind.is_file() || kind.is_dir()) {
            self.done.plainer += 1;
        }
        Ok(())
    }

    /// Links, and the modes of directories, which may be read-only.
    fn finish(self) -> anyhow::Result<Unpacked> {
        for (name, link) in &self.links {
            let made = self.destination.create_link(name, link);
            made.with_context(|| format!("cannot link {}", self.shown(name)))?;
        }
        for (name, mode) in self.directories.iter().rev() {
            let set = self.destination.set_directory_mode(name, *mode);
            set.with_context(|| format!("cannot set the mode of {}", self.shown(name)))?;
        }
        Ok(self.done)
    }

    fn copy_file(&self, original: &Path, name: &Path) -> std::io::Result<()> {
        let mut from = self.destination.open_file(original)?;
        let mut to = self.destination.create_file(name)?;
        std::io::copy(&mut from, &mut to)?;
        to.set_permissions(Permissions::from_mode(from.metadata()?.permissions().mode() & PERMISSION_BITS))
    }

    fn shown(&self, name: &Path) -> String {
        self.destination.path().join(name).display().to_string()
    }

    fn defer_check(&self) -> anyhow::Result<()> {
        anyhow::ensure!(
            self.links.len() + self.directories.len() < MAX_DEFERRED,
            "the archive has more than {MAX_DEFERRED} links and directories"
        );
        Ok(())
    }
}

/// A name of the archive as one below the destination; empty for that itself.
fn safe_name(name: &Path) -> anyhow::Result<PathBuf> {
    let mut safe = PathBuf::new();
    for component in name.components() {
        match component {
            Component::Normal(part) => safe.push(part),
            Component::CurDir => {}
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => {
                anyhow::bail!("the sandbox sent the name `{}`, which leaves the directory", name.display());
            }
        }
    }
    Ok(safe)
}

async fn write_file<R: AsyncRead + Unpin>(entry: &mut Entry<R>, file: std::fs::File, mode: u32) -> std::io::Result<()> {
    let mut file = File::from_std(file);
    let mut reader = BufReader::with_capacity(BUFFER_BYTES, entry);
    tokio::io::copy_buf(&mut reader, &mut file).await?;
    file.flush().await?;
    file.set_permissions(Permissions::from_mode(mode)).await
}

#[cfg(test)]
mod tests {
    use tokio_tar::{Builder, Header};

    use super::*;
    use crate::commands::cp::{fixture, pack};

    async fn unpack_into(bytes: &[u8], path: &Path) -> anyhow::Result<Unpacked> {
        unpack(bytes, &Destination::open(path).unwrap()).await
    }

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
        assert_eq!(unpack(stream, &Destination::open(&copy).unwrap()).await.unwrap(), Unpacked::default());
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
            let error = unpack_into(&bytes, &dir.path().join("in")).await.unwrap_err();
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
        unpack_into(&archive(&entries).await, &inside).await.unwrap_err();
        assert!(!outside.join("planted").exists());
        let entries = [("b", EntryType::Link, "../out/secret")];
        unpack_into(&archive(&entries).await, &inside).await.unwrap_err();
    }

    #[tokio::test]
    async fn nothing_is_written_through_a_link_of_an_earlier_copy() {
        let dir = tempfile::tempdir().unwrap();
        let (inside, outside) = (dir.path().join("in"), dir.path().join("out"));
        std::fs::create_dir_all(outside.join("sub")).unwrap();
        std::fs::write(outside.join("secret"), "secret").unwrap();
        std::fs::set_permissions(&outside, Permissions::from_mode(0o700)).unwrap();
        let (tree, file) = (outside.to_str().unwrap(), outside.join("secret"));
        let planted = [
            ("implied", EntryType::Symlink, tree),
            ("named", EntryType::Symlink, tree),
            ("file", EntryType::Symlink, file.to_str().unwrap()),
            ("source", EntryType::Symlink, tree),
            ("twin", EntryType::Symlink, file.to_str().unwrap()),
        ];
        unpack_into(&archive(&planted).await, &inside).await.unwrap();
        let entries = [
            ("implied/sub/job", EntryType::Regular, "x"),
            ("named", EntryType::Directory, ""),
            ("named/job", EntryType::Regular, "x"),
            ("file", EntryType::Regular, "x"),
            ("twin", EntryType::Link, "file"),
            ("implied/twin", EntryType::Link, "file"),
        ];
        unpack_into(&archive(&entries).await, &inside).await.unwrap();
        for name in ["implied/sub/job", "named/job", "file", "twin", "implied/twin"] {
            assert_eq!(std::fs::read_to_string(inside.join(name)).unwrap(), "x", "{name}");
        }
        assert!(inside.join("named").symlink_metadata().unwrap().is_dir());
        // Nor is anything read through one.
        let stolen = [("stolen", EntryType::Link, "source/secret")];
        unpack_into(&archive(&stolen).await, &inside).await.unwrap_err();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "secret");
        assert_eq!(outside.metadata().unwrap().permissions().mode() & 0o7777, 0o700);
        let left: Vec<_> = std::fs::read_dir(&outside).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left.len(), 2, "{left:?}");
        assert_eq!(std::fs::read_dir(outside.join("sub")).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn the_directory_itself_may_be_a_link_and_keeps_its_mode() {
        let dir = tempfile::tempdir().unwrap();
        let (real, link) = (dir.path().join("real"), dir.path().join("link"));
        std::fs::create_dir(&real).unwrap();
        std::fs::set_permissions(&real, Permissions::from_mode(0o700)).unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        let entries = [("./", EntryType::Directory, ""), ("a", EntryType::Regular, "x")];
        unpack_into(&archive(&entries).await, &link).await.unwrap();
        assert_eq!(std::fs::read_to_string(real.join("a")).unwrap(), "x");
        assert_eq!(real.metadata().unwrap().permissions().mode() & 0o7777, 0o700);
    }

    #[tokio::test]
    async fn devices_stay_behind_and_set_uid_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let entries = [("dev", EntryType::Char, ""), ("pipe", EntryType::Fifo, ""), ("bin", EntryType::Regular, "x")];
        let unpacked = unpack_into(&archive(&entries).await, dir.path()).await.unwrap();
        assert_eq!(unpacked, Unpacked { skipped: 2, plainer: 1 });
        assert_eq!(dir.path().join("bin").metadata().unwrap().permissions().mode() & 0o7777, 0o755);
        assert!(!dir.path().join("dev").exists() && !dir.path().join("pipe").exists());
    }

    #[tokio::test]
    async fn an_archive_that_breaks_off_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let bytes = archive(&[("a", EntryType::Regular, &"x".repeat(2000))]).await;
        unpack_into(&bytes[..1024], dir.path()).await.unwrap_err();
    }
}
