//! Which sandbox of ours is which of a backend's.
//!
//! A backend that takes our ids ([`Feature::Spec`]) needs none of this. Others
//! choose their own, and what they chose has to outlive this process, or the
//! sandbox could never be ended again. So it is one small file per sandbox, for
//! its owner alone: the environment in it may be secret.
//!
//! [`Feature::Spec`]: stacyvm_api::backend::Feature::Spec

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use stacyvm_api::{LimitReport, SandboxId, Timestamp};

/// A sandbox whose id the backend chose.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Registered {
    pub(super) backend_id: String,
    pub(super) image: String,
    pub(super) created_at: Timestamp,
    /// The protocol has an environment per command only.
    #[serde(default)]
    pub(super) env: BTreeMap<String, String>,
    #[serde(default)]
    pub(super) metadata: BTreeMap<String, String>,
    #[serde(default)]
    pub(super) limits: Option<LimitReport>,
}

#[derive(Debug, Clone)]
pub(super) struct Registry {
    dir: PathBuf,
    /// Held while an id is looked for and taken.
    claims: Arc<Mutex<()>>,
}

impl Registry {
    pub(super) fn open(dir: PathBuf) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
        Ok(Self { dir, claims: Arc::default() })
    }

    /// Puts a sandbox down unless the backend's id already is another's: what
    /// has two names here would be ended by either.
    pub(super) fn claim(&self, id: &SandboxId, registered: &Registered) -> io::Result<bool> {
        let _alone = self.claims.lock().unwrap_or_else(PoisonError::into_inner);
        if self.has(&registered.backend_id)? {
            return Ok(false);
        }
        self.put(id, registered).map(|()| true)
    }

    /// Whether a sandbox of ours has this id at the backend.
    pub(super) fn has(&self, backend_id: &str) -> io::Result<bool> {
        Ok(self.all()?.iter().any(|(_, registered)| registered.backend_id == backend_id))
    }

    /// There is either the whole record or none.
    fn put(&self, id: &SandboxId, registered: &Registered) -> io::Result<()> {
        let unfinished = self.dir.join(format!("{id}.new"));
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&unfinished)?;
        file.write_all(&serde_json::to_vec(registered)?)?;
        file.sync_all()?;
        fs::rename(unfinished, self.path(id))
    }

    pub(super) fn get(&self, id: &SandboxId) -> io::Result<Option<Registered>> {
        match fs::read(self.path(id)) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(super) fn remove(&self, id: &SandboxId) -> io::Result<()> {
        match fs::remove_file(self.path(id)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    pub(super) fn all(&self) -> io::Result<Vec<(SandboxId, Registered)>> {
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let name = entry?.file_name();
            let id = name.to_str().and_then(|name| name.strip_suffix(".json")).and_then(|id| id.parse().ok());
            let Some(id) = id else { continue };
            // Gone since the directory was read, or damaged: not one to show.
            if let Ok(Some(registered)) = self.get(&id) {
                all.push((id, registered));
            }
        }
        Ok(all)
    }

    fn path(&self, id: &SandboxId) -> PathBuf {
        self.dir.join(format!("{id}.json"))
    }
}

/// The name of this server at the backend: made once.
pub(super) fn owner(path: &Path) -> io::Result<String> {
    match fs::read_to_string(path) {
        Ok(name) if !name.trim().is_empty() => return Ok(name.trim().to_owned()),
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let name = SandboxId::random().to_string();
    fs::write(path, &name)?;
    Ok(name)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn what_was_put_is_there_for_the_next_process_and_for_nobody_else() {
        let dir = tempfile::tempdir().unwrap();
        let id = SandboxId::random();
        let registered = Registered {
            backend_id: "box/7 of theirs".to_owned(),
            image: "alpine".to_owned(),
            created_at: Timestamp::now(),
            env: BTreeMap::from([("SECRET".to_owned(), "s".to_owned())]),
            metadata: BTreeMap::new(),
            limits: Some(LimitReport::default()),
        };
        Registry::open(dir.path().join("a/b")).unwrap().claim(&id, &registered).unwrap();
        let again = Registry::open(dir.path().join("a/b")).unwrap();
        assert_eq!(again.get(&id).unwrap().as_ref(), Some(&registered));
        assert!(!again.claim(&SandboxId::random(), &registered).unwrap(), "an id is one sandbox's");
        assert_eq!(again.all().unwrap().len(), 1);
        let mode = fs::metadata(again.path(&id)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        again.remove(&id).unwrap();
        again.remove(&id).unwrap();
        assert_eq!(again.get(&id).unwrap(), None);
    }
}
