//! What a sandbox's directory says about it: a record, written before anything
//! runs, and who its first process is, written before that does anything.

use std::io;
use std::path::Path;

use serde::de::DeserializeOwned;

use super::process::Identity;

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum OnDisk<Record> {
    /// Launched, some time.
    Launched(Box<Record>, Identity),
    /// Never finished, or unreadable: only remains.
    Remains(Option<Box<Record>>),
    Nothing,
}

/// Reads a sandbox's directory; a record that is not `current` counts as
/// unreadable.
pub(crate) fn load<Record: DeserializeOwned>(
    sandbox: &Path,
    identity_file: &Path,
    current: impl FnOnce(&Record) -> bool,
) -> io::Result<OnDisk<Record>> {
    if !sandbox.exists() {
        return Ok(OnDisk::Nothing);
    }
    let record = read_json::<Record>(&sandbox.join("state.json"))?.filter(current);
    let identity = read_json::<Identity>(identity_file)?;
    Ok(match (record, identity) {
        (Some(record), Some(identity)) => OnDisk::Launched(Box::new(record), identity),
        (record, _) => OnDisk::Remains(record.map(Box::new)),
    })
}

/// Which run of the kernel this is: processes of another one are nobody.
pub(crate) fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// `None` when it is missing or damaged; other errors are the host's trouble.
fn read_json<T: DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
