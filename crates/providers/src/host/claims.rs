//! Numbers that only one server on this host may use at a time.
//!
//! Ranges of uids and network slots are the host's, while servers with
//! different data directories know nothing of each other. Each number is a
//! file in a directory below `/run`, naming the data directory that holds it.
//! A claim is stale when that directory is gone (a test, a removed
//! installation): it may then be taken over, or freed by any other server;
//! `/run` itself empties at boot, when no sandbox is left either.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Name of the file in a data directory that says which server it belongs to.
const INSTANCE_FILE: &str = "instance";

/// A server's own name: random once, then kept in its data directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Instance {
    id: String,
    dir: PathBuf,
}

impl Instance {
    /// Reads the name of the data directory `dir`, or gives it one.
    pub(crate) fn open(dir: &Path) -> io::Result<Self> {
        let dir = dir.canonicalize()?;
        let path = dir.join(INSTANCE_FILE);
        let id = match std::fs::read_to_string(&path) {
            Ok(id) if is_plausible(id.trim()) => id.trim().to_owned(),
            Ok(_) => return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{} is damaged", path.display()))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let mut bytes = [0; 4];
                rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
                let id = format!("{:08x}", u32::from_ne_bytes(bytes));
                std::fs::write(&path, format!("{id}\n"))?;
                id
            }
            Err(error) => return Err(error),
        };
        Ok(Self { id, dir })
    }

    /// Eight hexadecimal digits.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    fn parse(claim: &str) -> Option<Self> {
        let (id, dir) = claim.trim_end_matches('\n').split_once(' ')?;
        Some(Self { id: id.to_owned(), dir: dir.into() })
    }

    fn exists(&self) -> bool {
        std::fs::read_to_string(self.dir.join(INSTANCE_FILE)).is_ok_and(|id| id.trim() == self.id)
    }
}

fn is_plausible(id: &str) -> bool {
    id.len() == 8 && id.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// The claims of one kind.
#[derive(Debug)]
pub(crate) struct Claims {
    dir: PathBuf,
    owner: Instance,
}

impl Claims {
    pub(crate) fn open(run_dir: &Path, kind: &str, owner: Instance) -> io::Result<Self> {
        let dir = run_dir.join(kind);
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
        Ok(Self { dir, owner })
    }

    /// Takes the lowest number below `count` that is free and `fits`.
    pub(crate) fn take(&self, count: u32, fits: impl Fn(u32) -> bool) -> io::Result<Option<u32>> {
        let _lock = self.lock()?;
        for number in (0..count).filter(|number| fits(*number)) {
            if self.holder(number)?.is_none_or(|holder| !holder.exists()) {
                self.write(number)?;
                return Ok(Some(number));
            }
        }
        Ok(None)
    }

    /// Numbers this server holds, in order.
    pub(crate) fn held(&self) -> io::Result<Vec<u32>> {
        self.numbers(|holder| *holder == self.owner)
    }

    /// Frees every number whose server is gone for good, once `free` has removed
    /// what that server left. Nobody takes a number meanwhile.
    pub(crate) fn free_abandoned(&self, free: impl Fn(u32) -> io::Result<()>) -> io::Result<Vec<u32>> {
        let _lock = self.lock()?;
        let abandoned = self.numbers(|holder| !holder.exists())?;
        for number in &abandoned {
            free(*number)?;
            std::fs::remove_file(self.path(*number))?;
        }
        Ok(abandoned)
    }

    /// Numbers with such a holder, in order.
    fn numbers(&self, wanted: impl Fn(&Instance) -> bool) -> io::Result<Vec<u32>> {
        let mut numbers = Vec::new();
        for entry in std::fs::read_dir(&self.dir)? {
            let Some(number) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            if self.holder(number)?.as_ref().is_some_and(&wanted) {
                numbers.push(number);
            }
        }
        numbers.sort_unstable();
        Ok(numbers)
    }

    pub(crate) fn release(&self, number: u32) -> io::Result<()> {
        let _lock = self.lock()?;
        if self.holder(number)?.as_ref() == Some(&self.owner) {
            std::fs::remove_file(self.path(number))?;
        }
        Ok(())
    }

    fn holder(&self, number: u32) -> io::Result<Option<Instance>> {
        match std::fs::read_to_string(self.path(number)) {
            Ok(claim) => Ok(Instance::parse(&claim)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn write(&self, number: u32) -> io::Result<()> {
        let path = self.path(number);
        let fresh = path.with_extension("new");
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
        writeln!(file, "{} {}", self.owner.id, self.owner.dir.display())?;
        std::fs::rename(fresh, path)
    }

    fn path(&self, number: u32) -> PathBuf {
        self.dir.join(number.to_string())
    }

    /// Held while claims are compared and written; released by closing.
    fn lock(&self) -> io::Result<File> {
        let file =
            OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(self.dir.join("lock"))?;
        rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive)?;
        Ok(file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(root: &Path, name: &str) -> Instance {
        std::fs::create_dir_all(root.join(name)).unwrap();
        Instance::open(&root.join(name)).unwrap()
    }

    #[test]
    fn servers_get_different_numbers_and_keep_their_own() {
        let root = tempfile::tempdir().unwrap();
        let (run, a, b) = (root.path().join("run"), server(root.path(), "a"), server(root.path(), "b"));
        let of_a = Claims::open(&run, "slots", a.clone()).unwrap();
        let of_b = Claims::open(&run, "slots", b).unwrap();
        assert_eq!(of_a.take(3, |_| true).unwrap(), Some(0));
        assert_eq!(of_b.take(3, |_| true).unwrap(), Some(1));
        assert_eq!(of_a.take(3, |number| number != 2).unwrap(), None);
        assert_eq!(of_a.take(3, |_| true).unwrap(), Some(2));
        let restarted = Claims::open(&run, "slots", Instance::open(&root.path().join("a")).unwrap()).unwrap();
        assert_eq!(restarted.held().unwrap(), [0, 2]);
        of_b.release(0).unwrap();
        assert_eq!(restarted.held().unwrap(), [0, 2], "a claim of another server stays");
        restarted.release(0).unwrap();
        assert_eq!(of_b.take(3, |_| true).unwrap(), Some(0));
    }

    #[test]
    fn claims_of_a_removed_data_directory_are_free() {
        let root = tempfile::tempdir().unwrap();
        let run = root.path().join("run");
        let gone = Claims::open(&run, "slots", server(root.path(), "gone")).unwrap();
        assert_eq!(gone.take(1, |_| true).unwrap(), Some(0));
        std::fs::remove_dir_all(root.path().join("gone")).unwrap();
        let heir = Claims::open(&run, "slots", server(root.path(), "heir")).unwrap();
        assert_eq!(heir.take(1, |_| true).unwrap(), Some(0));
    }

    #[test]
    fn what_a_removed_data_directory_held_is_freed_and_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let run = root.path().join("run");
        let [gone, lives, heir] =
            ["gone", "lives", "heir"].map(|name| Claims::open(&run, "slots", server(root.path(), name)).unwrap());
        assert_eq!(lives.take(3, |number| number == 1).unwrap(), Some(1));
        for number in [0, 2] {
            assert_eq!(gone.take(3, |_| true).unwrap(), Some(number));
        }
        std::fs::remove_dir_all(root.path().join("gone")).unwrap();

        let busy = |_| Err(io::ErrorKind::ResourceBusy.into());
        heir.free_abandoned(busy).unwrap_err();
        assert!(run.join("slots/0").exists(), "what cannot be freed stays claimed");
        assert_eq!(heir.free_abandoned(|_| Ok(())).unwrap(), [0, 2]);
        assert_eq!((lives.held().unwrap(), heir.held().unwrap()), (vec![1], vec![]));
        assert!(!run.join("slots/0").exists() && !run.join("slots/2").exists());
    }
}
