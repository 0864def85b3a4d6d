//! Trees of a mock sandbox as tar, both ways.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt};
use stacyvm_sandbox::{ByteStream, SessionError};
use tokio::io::AsyncReadExt;
use tokio_tar::{Archive, Builder, EntryType, Header};
use tokio_util::io::StreamReader;

use super::sandbox::MockSandbox;
use super::tree::{Content, Node, as_prefix, join};

/// Most that one archive may unpack to.
const ARCHIVE_BYTES_MAX: u64 = 256 << 20;

pub(super) async fn pack(sandbox: &Arc<MockSandbox>, path: &str) -> Result<Bytes, SessionError> {
    let nodes: Vec<(String, Node)> = {
        let tree = sandbox.tree();
        let directory = tree.resolve(path)?;
        if tree.is_directory(&directory)? {
            let prefix = as_prefix(&directory);
            tree.nodes_below(&directory).map(|(path, node)| (path[prefix.len()..].to_owned(), node.clone())).collect()
        } else {
            let (entry, bytes) = tree.read(&directory)?;
            let node = Node {
                content: Content::File(bytes),
                mode: entry.mode,
                owner: entry.owner,
                modified_at: entry.modified_at,
            };
            vec![(entry.name, node)]
        }
    };
    let mut builder = Builder::new(Vec::new());
    for (name, node) in nodes {
        let mut header = Header::new_gnu();
        header.set_mode(node.mode);
        header.set_mtime(u64::try_from(node.modified_at.unix_ms() / 1000).unwrap_or(0));
        let bytes = match &node.content {
            Content::File(bytes) => bytes.clone(),
            Content::Directory => {
                header.set_entry_type(EntryType::Directory);
                Bytes::new()
            }
            Content::Symlink(target) => {
                header.set_entry_type(EntryType::Symlink);
                header.set_link_name(target).map_err(failed)?;
                Bytes::new()
            }
        };
        header.set_size(bytes.len() as u64);
        builder.append_data(&mut header, &name, bytes.as_ref()).await.map_err(failed)?;
    }
    Ok(builder.into_inner().await.map_err(failed)?.into())
}

pub(super) async fn unpack(sandbox: &Arc<MockSandbox>, path: &str, archive: ByteStream) -> Result<(), SessionError> {
    let owner = sandbox.user().to_owned();
    sandbox.make_dir(path, &owner)?;
    let reader = StreamReader::new(archive.map_err(std::io::Error::other));
    let mut entries = Archive::new(Box::pin(reader)).entries().map_err(malformed)?;
    let mut left = ARCHIVE_BYTES_MAX;
    while let Some(entry) = entries.next().await {
        let mut entry = entry.map_err(malformed)?;
        let name = entry.path().map_err(malformed)?.to_string_lossy().into_owned();
        let name = name.trim_end_matches('/').trim_start_matches("./").to_owned();
        if name.starts_with('/') || name.split('/').any(|part| part == "..") {
            return Err(SessionError::InvalidArgument(format!("the archive reaches outside: {name}")));
        }
        if name.is_empty() || name == "." {
            continue;
        }
        let target = join(path, &name);
        stays_inside(sandbox, path, &target)?;
        let header = entry.header().clone();
        match header.entry_type() {
            EntryType::Directory => {
                sandbox.make_dir(&target, &owner)?;
            }
            EntryType::Symlink => {
                let link = entry.link_name().map_err(malformed)?;
                let link = link.map(|link| link.to_string_lossy().into_owned()).unwrap_or_default();
                sandbox.link(&target, &link, &owner)?;
            }
            EntryType::Regular | EntryType::Continuous => {
                let mut bytes = Vec::new();
                let count = (&mut entry).take(left + 1).read_to_end(&mut bytes).await.map_err(malformed)? as u64;
                left = left.checked_sub(count).ok_or(SessionError::DiskFull)?;
                let mode = header.mode().ok();
                sandbox.tree_for_writing()?.write(&target, bytes.into(), mode, &owner)?;
            }
            other => return Err(SessionError::InvalidArgument(format!("{name}: {other:?} cannot be unpacked"))),
        }
    }
    Ok(())
}

/// A link, from this archive or from before, must not lead out of the directory.
fn stays_inside(sandbox: &MockSandbox, directory: &str, target: &str) -> Result<(), SessionError> {
    let tree = sandbox.tree();
    let directory = tree.resolve(directory)?;
    if tree.resolve(target)?.starts_with(&as_prefix(&directory)) {
        return Ok(());
    }
    Err(SessionError::InvalidArgument(format!("the archive reaches outside: {target}")))
}

fn failed(error: std::io::Error) -> SessionError {
    SessionError::Failed { operation: "pack the files", cause: error.into() }
}

#[expect(clippy::needless_pass_by_value, reason = "the shape that `map_err` wants")]
fn malformed(error: std::io::Error) -> SessionError {
    SessionError::InvalidArgument(format!("this is not a tar archive: {error}"))
}
