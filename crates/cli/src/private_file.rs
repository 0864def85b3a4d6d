//! Files for their owner alone, there as a whole or not at all.

use std::fs::File;
use std::io::{ErrorKind, Read, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use tempfile::NamedTempFile;

use crate::failure::Advice;

/// What happens to a file of that name that is there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Existing {
    Refuse,
    Replace,
}

impl Existing {
    /// As `--force` asks for.
    pub(crate) fn new(force: bool) -> Self {
        if force { Self::Replace } else { Self::Refuse }
    }
}

/// A file in the making, of mode 0600. Dropped, it leaves nothing.
#[derive(Debug)]
pub(crate) struct PrivateFile {
    file: NamedTempFile,
    target: PathBuf,
    existing: Existing,
}

impl PrivateFile {
    /// Begins a file, and makes its directory where that is missing. Refuses
    /// early, so that no work is done for nothing.
    pub(crate) fn begin(target: &Path, existing: Existing) -> anyhow::Result<Self> {
        let target = std::path::absolute(target).with_context(|| format!("cannot use {}", target.display()))?;
        if existing == Existing::Refuse && target.symlink_metadata().is_ok() {
            return Err(taken(&target).into());
        }
        let directory = target.parent().with_context(|| format!("{} is no file name", target.display()))?;
        let cannot = || format!("cannot write to {}", directory.display());
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).with_context(cannot)?;
        let file = tempfile::Builder::new().prefix(".stacyvm-").tempfile_in(directory).with_context(cannot)?;
        Ok(Self { file, target, existing })
    }

    /// Where it is for now: an empty file that others may fill.
    pub(crate) fn path(&self) -> &Path {
        self.file.path()
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        self.file.write_all(bytes).with_context(|| format!("cannot write {}", self.target.display()))
    }

    /// Writes all there is to read.
    pub(crate) fn fill(&mut self, from: &mut impl Read) -> anyhow::Result<()> {
        std::io::copy(from, &mut self.file).with_context(|| format!("cannot write {}", self.target.display()))?;
        Ok(())
    }

    /// Puts it in its place, on the disk for good. Returns where that is.
    pub(crate) fn finish(self) -> anyhow::Result<PathBuf> {
        let Self { file, target, existing } = self;
        let cannot = || format!("cannot write {}", target.display());
        // Whoever filled it may have replaced the file behind our descriptor.
        File::open(file.path()).and_then(|file| file.sync_all()).with_context(cannot)?;
        let persisted = match existing {
            Existing::Refuse => file.persist_noclobber(&target),
            Existing::Replace => file.persist(&target),
        };
        match persisted {
            Ok(_) => {}
            Err(error) if error.error.kind() == ErrorKind::AlreadyExists => return Err(taken(&target).into()),
            Err(error) => return Err(error.error).with_context(cannot),
        }
        let directory = target.parent().unwrap_or(Path::new("/"));
        File::open(directory).and_then(|directory| directory.sync_all()).with_context(cannot)?;
        Ok(target)
    }
}

fn taken(target: &Path) -> Advice {
    Advice::new(format!("{} exists already", target.display()), "choose another name, or replace it with --force")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn write(target: &Path, existing: Existing, text: &str) -> anyhow::Result<PathBuf> {
        let mut file = PrivateFile::begin(target, existing)?;
        file.write(text.as_bytes())?;
        file.finish()
    }

    #[test]
    fn a_file_is_private_and_never_replaced_by_accident() {
        let outer = tempfile::tempdir().unwrap();
        let target = outer.path().join("a/b/file");
        write(&target, Existing::Refuse, "one").unwrap();
        assert_eq!(target.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert!(write(&target, Existing::Refuse, "two").unwrap_err().to_string().contains("exists already"));
        assert_eq!(std::fs::read_to_string(&target).unwrap(), "one");
        write(&target, Existing::Replace, "three").unwrap();
        assert_eq!(std::fs::read_to_string(&target).unwrap(), "three");
    }

    #[test]
    fn what_is_not_finished_leaves_nothing() {
        let outer = tempfile::tempdir().unwrap();
        let mut file = PrivateFile::begin(&outer.path().join("file"), Existing::Refuse).unwrap();
        file.write(b"half").unwrap();
        drop(file);
        assert_eq!(std::fs::read_dir(outer.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_file_that_appears_meanwhile_is_kept() {
        let outer = tempfile::tempdir().unwrap();
        let target = outer.path().join("file");
        let file = PrivateFile::begin(&target, Existing::Refuse).unwrap();
        std::fs::write(&target, "of another").unwrap();
        assert!(file.finish().is_err());
        assert_eq!(std::fs::read_to_string(&target).unwrap(), "of another");
    }
}
