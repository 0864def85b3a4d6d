//! The mock's file system: one sorted map from absolute path to node.
//!
//! Every node's parent directory is in the map too, which makes a listing one
//! range of the map and a rename of a directory one change of prefix.

use std::collections::BTreeMap;

use bytes::Bytes;
use stacyvm_api::{Timestamp, WatchEventKind};
use stacyvm_sandbox::{EntryKind, FileEntry, SessionError};
use tokio::sync::broadcast;

/// Symbolic links followed before a path counts as a loop, as in Linux.
const LINKS_MAX: usize = 40;
/// Longest path, as in Linux.
const PATH_MAX_BYTES: usize = 4096;
/// Longest name of one entry, as in Linux.
const NAME_MAX_BYTES: usize = 255;
/// Changes that a slow watcher may lag behind.
const WATCH_BUFFER: usize = 1024;

#[derive(Debug, Clone)]
pub(super) struct Node {
    pub(super) content: Content,
    pub(super) mode: u32,
    pub(super) owner: String,
    pub(super) modified_at: Timestamp,
}

#[derive(Debug, Clone)]
pub(super) enum Content {
    File(Bytes),
    Directory,
    Symlink(String),
}

/// A change, as watchers see it: absolute path and kind.
#[derive(Debug, Clone)]
pub(super) struct Change {
    pub(super) path: String,
    pub(super) kind: WatchEventKind,
}

#[derive(Debug)]
pub(super) struct Tree {
    nodes: BTreeMap<String, Node>,
    changes: broadcast::Sender<Change>,
}

impl Tree {
    pub(super) fn new() -> Self {
        let mut tree = Self { nodes: BTreeMap::new(), changes: broadcast::channel(WATCH_BUFFER).0 };
        for (path, mode) in [("/", 0o755), ("/etc", 0o755), ("/home", 0o755), ("/tmp", 0o1777), ("/workspace", 0o777)] {
            tree.nodes.insert(path.to_owned(), Node::new(Content::Directory, mode, "root"));
        }
        let release = Content::File(Bytes::from_static(b"ID=mock\nNAME=\"StacyVM mock\"\n"));
        tree.nodes.insert("/etc/os-release".to_owned(), Node::new(release, 0o644, "root"));
        tree
    }

    pub(super) fn subscribe(&self) -> broadcast::Receiver<Change> {
        self.changes.subscribe()
    }

    /// The entry itself; a link at the end is not followed.
    pub(super) fn stat(&self, path: &str) -> Result<FileEntry, SessionError> {
        let path = self.resolve_parent(path)?;
        self.entry(&path)
    }

    pub(super) fn read(&self, path: &str) -> Result<(FileEntry, Bytes), SessionError> {
        let resolved = self.resolve(path)?;
        let node = self.nodes.get(&resolved).ok_or_else(|| SessionError::FileNotFound(path.to_owned()))?;
        match &node.content {
            Content::File(bytes) => Ok((self.entry(&resolved)?, bytes.clone())),
            Content::Directory => Err(SessionError::FileConflict(format!("{path} is a directory"))),
            Content::Symlink(_) => Err(SessionError::FileNotFound(path.to_owned())),
        }
    }

    pub(super) fn write(
        &mut self,
        path: &str,
        bytes: Bytes,
        mode: Option<u32>,
        owner: &str,
    ) -> Result<FileEntry, SessionError> {
        let resolved = self.resolve(path)?;
        self.make_parents(&resolved, owner)?;
        let kept_mode = match self.nodes.get(&resolved) {
            Some(Node { content: Content::Directory, .. }) => {
                return Err(SessionError::FileConflict(format!("{path} is a directory")));
            }
            Some(node) => Some(node.mode),
            None => None,
        };
        if kept_mode.is_none() {
            self.announce(&resolved, WatchEventKind::Create);
        }
        let mode = mode.or(kept_mode).unwrap_or(0o644) & 0o7777;
        self.nodes.insert(resolved.clone(), Node::new(Content::File(bytes), mode, owner));
        self.announce(&resolved, WatchEventKind::Write);
        self.entry(&resolved)
    }

    /// Entries below a directory, `depth` levels deep.
    pub(super) fn list(&self, path: &str, depth: u32) -> Result<Vec<FileEntry>, SessionError> {
        let directory = self.resolve(path)?;
        match self.nodes.get(&directory) {
            Some(Node { content: Content::Directory, .. }) => {}
            Some(_) => return Err(SessionError::FileConflict(format!("{path} is not a directory"))),
            None => return Err(SessionError::FileNotFound(path.to_owned())),
        }
        let below = as_prefix(&directory);
        let depth = depth.max(1) as usize;
        self.below(&directory)
            .filter(|found| found[below.len()..].split('/').count() <= depth)
            .map(|found| self.entry(found))
            .collect()
    }

    pub(super) fn make_dir(&mut self, path: &str, owner: &str) -> Result<FileEntry, SessionError> {
        let resolved = self.resolve(path)?;
        if let Some(node) = self.nodes.get(&resolved) {
            return match node.content {
                Content::Directory => self.entry(&resolved),
                Content::File(_) | Content::Symlink(_) => {
                    Err(SessionError::FileConflict(format!("{path} exists and is not a directory")))
                }
            };
        }
        self.make_parents(&resolved, owner)?;
        self.nodes.insert(resolved.clone(), Node::new(Content::Directory, 0o755, owner));
        self.announce(&resolved, WatchEventKind::Create);
        self.entry(&resolved)
    }

    pub(super) fn link(&mut self, path: &str, target: &str, owner: &str) -> Result<(), SessionError> {
        let resolved = self.resolve_parent(path)?;
        if self.nodes.contains_key(&resolved) {
            return Err(SessionError::FileConflict(format!("{path} exists")));
        }
        self.make_parents(&resolved, owner)?;
        self.nodes.insert(resolved.clone(), Node::new(Content::Symlink(target.to_owned()), 0o777, owner));
        self.announce(&resolved, WatchEventKind::Create);
        Ok(())
    }

    pub(super) fn rename(&mut self, old: &str, new: &str, owner: &str) -> Result<(), SessionError> {
        let (from, to) = (self.resolve_parent(old)?, self.resolve_parent(new)?);
        if !self.nodes.contains_key(&from) {
            return Err(SessionError::FileNotFound(old.to_owned()));
        }
        if from == to {
            return Ok(());
        }
        if from == "/" || to.starts_with(&as_prefix(&from)) {
            return Err(SessionError::FileConflict(format!("{old} cannot be moved below itself")));
        }
        let replaces_directory = matches!(self.nodes.get(&to), Some(Node { content: Content::Directory, .. }));
        if replaces_directory && self.below(&to).next().is_some() {
            return Err(SessionError::FileConflict(format!("{new} is a directory that is not empty")));
        }
        self.make_parents(&to, owner)?;
        let moved: Vec<String> = std::iter::once(from.clone()).chain(self.below(&from).cloned()).collect();
        for path in moved {
            if let Some(node) = self.nodes.remove(&path) {
                self.nodes.insert(format!("{to}{}", &path[from.len()..]), node);
            }
        }
        self.announce(&from, WatchEventKind::Rename);
        self.announce(&to, WatchEventKind::Create);
        Ok(())
    }

    pub(super) fn remove(&mut self, path: &str, recursive: bool) -> Result<(), SessionError> {
        let resolved = self.resolve_parent(path)?;
        let Some(node) = self.nodes.get(&resolved) else {
            return Err(SessionError::FileNotFound(path.to_owned()));
        };
        if resolved == "/" {
            return Err(SessionError::FileForbidden(path.to_owned()));
        }
        let below: Vec<String> = self.below(&resolved).cloned().collect();
        if matches!(node.content, Content::Directory) && !recursive {
            return Err(SessionError::FileConflict(format!("{path} is a directory; ask for a recursive removal")));
        }
        for path in below {
            self.nodes.remove(&path);
        }
        self.nodes.remove(&resolved);
        self.announce(&resolved, WatchEventKind::Remove);
        Ok(())
    }

    pub(super) fn chmod(&mut self, path: &str, mode: u32) -> Result<(), SessionError> {
        let resolved = self.resolve(path)?;
        let node = self.nodes.get_mut(&resolved).ok_or_else(|| SessionError::FileNotFound(path.to_owned()))?;
        node.mode = mode & 0o7777;
        self.announce(&resolved, WatchEventKind::Chmod);
        Ok(())
    }

    /// Every path, for matching patterns against.
    pub(super) fn paths(&self) -> impl Iterator<Item = &String> {
        self.nodes.keys()
    }

    pub(super) fn nodes_below(&self, directory: &str) -> impl Iterator<Item = (&String, &Node)> {
        let prefix = as_prefix(directory);
        // The root is its own prefix, but not below itself.
        let from = self.nodes.range(prefix.clone()..).filter(|(path, _)| path.as_str() != "/");
        from.take_while(move |(path, _)| path.starts_with(&prefix))
    }

    pub(super) fn is_directory(&self, path: &str) -> Result<bool, SessionError> {
        let resolved = self.resolve(path)?;
        Ok(matches!(self.nodes.get(&resolved), Some(Node { content: Content::Directory, .. })))
    }

    /// Absolute path with every link followed; the last component may be
    /// missing.
    pub(super) fn resolve(&self, path: &str) -> Result<String, SessionError> {
        self.walk(path, 0, true)
    }

    fn resolve_parent(&self, path: &str) -> Result<String, SessionError> {
        self.walk(path, 0, false)
    }

    fn walk(&self, path: &str, links: usize, follow_last: bool) -> Result<String, SessionError> {
        check_path(path)?;
        if links > LINKS_MAX {
            return Err(SessionError::FileConflict(format!("{path} has too many symbolic links")));
        }
        let components: Vec<&str> = path.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
        let mut at = String::from("/");
        for (index, component) in components.iter().enumerate() {
            if *component == ".." {
                at = parent(&at).to_owned();
                continue;
            }
            let next = join(&at, component);
            let last = index + 1 == components.len();
            match self.nodes.get(&next).map(|node| &node.content) {
                Some(Content::Symlink(target)) if !last || follow_last => {
                    let target = if target.starts_with('/') { target.clone() } else { join(&at, target) };
                    let rest = components[index + 1..].join("/");
                    let redirected = if rest.is_empty() { target } else { join(&target, &rest) };
                    return self.walk(&redirected, links + 1, follow_last);
                }
                Some(Content::File(_)) if !last => {
                    return Err(SessionError::FileConflict(format!("{next} is not a directory")));
                }
                Some(Content::File(_) | Content::Directory | Content::Symlink(_)) | None => at = next,
            }
        }
        Ok(at)
    }

    fn make_parents(&mut self, resolved: &str, owner: &str) -> Result<(), SessionError> {
        let mut missing = Vec::new();
        let mut at = parent(resolved);
        loop {
            match self.nodes.get(at).map(|node| &node.content) {
                Some(Content::Directory) => break,
                Some(Content::File(_) | Content::Symlink(_)) => {
                    return Err(SessionError::FileConflict(format!("{at} is not a directory")));
                }
                None => missing.push(at.to_owned()),
            }
            at = parent(at);
        }
        for path in missing.into_iter().rev() {
            self.announce(&path, WatchEventKind::Create);
            self.nodes.insert(path, Node::new(Content::Directory, 0o755, owner));
        }
        Ok(())
    }

    fn below(&self, directory: &str) -> impl Iterator<Item = &String> {
        self.nodes_below(directory).map(|(path, _)| path)
    }

    fn entry(&self, resolved: &str) -> Result<FileEntry, SessionError> {
        let node = self.nodes.get(resolved).ok_or_else(|| SessionError::FileNotFound(resolved.to_owned()))?;
        let (kind, size, symlink_target) = match &node.content {
            Content::File(bytes) => (EntryKind::File, bytes.len() as u64, None),
            Content::Directory => (EntryKind::Directory, 0, None),
            Content::Symlink(target) => (EntryKind::Symlink, target.len() as u64, Some(target.clone())),
        };
        Ok(FileEntry {
            name: resolved.rsplit('/').next().unwrap_or_default().to_owned(),
            path: resolved.to_owned(),
            kind,
            size,
            mode: node.mode,
            owner: node.owner.clone(),
            group: node.owner.clone(),
            modified_at: node.modified_at,
            symlink_target,
        })
    }

    /// Nobody watching is fine.
    fn announce(&self, path: &str, kind: WatchEventKind) {
        let _nobody = self.changes.send(Change { path: path.to_owned(), kind });
    }
}

impl Node {
    fn new(content: Content, mode: u32, owner: &str) -> Self {
        Self { content, mode, owner: owner.to_owned(), modified_at: Timestamp::now() }
    }
}

/// `a/b` below `base`, without doubling the slash of the root.
pub(super) fn join(base: &str, rest: &str) -> String {
    if base.ends_with('/') { format!("{base}{rest}") } else { format!("{base}/{rest}") }
}

/// What every path below `directory` begins with.
pub(super) fn as_prefix(directory: &str) -> String {
    join(directory, "")
}

fn parent(path: &str) -> &str {
    match path.rfind('/') {
        Some(0) | None => "/",
        Some(at) => &path[..at],
    }
}

fn check_path(path: &str) -> Result<(), SessionError> {
    let refuse = |why: &str| Err(SessionError::InvalidArgument(why.to_owned()));
    if path.trim().is_empty() {
        return refuse("a path is required");
    }
    if !path.starts_with('/') {
        return refuse("a path must be absolute");
    }
    if path.contains('\0') {
        return refuse("a path must not contain NUL");
    }
    if path.len() > PATH_MAX_BYTES || path.split('/').any(|name| name.len() > NAME_MAX_BYTES) {
        return refuse("a path has at most 4096 bytes, and a name at most 255");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(tree: &Tree, path: &str) -> String {
        String::from_utf8(tree.read(path).unwrap().1.to_vec()).unwrap()
    }

    #[test]
    fn writes_make_parents_and_listings_stay_within_their_depth() {
        let mut tree = Tree::new();
        tree.write("/workspace/a/b/c.txt", Bytes::from_static(b"hi"), Some(0o600), "root").unwrap();
        tree.write("/workspace/ab.txt", Bytes::from_static(b"x"), None, "root").unwrap();
        let names = |depth| -> Vec<String> {
            tree.list("/workspace", depth).unwrap().into_iter().map(|entry| entry.path).collect()
        };
        assert_eq!(names(1), ["/workspace/a", "/workspace/ab.txt"]);
        assert_eq!(names(9), ["/workspace/a", "/workspace/a/b", "/workspace/a/b/c.txt", "/workspace/ab.txt"]);
        assert_eq!(tree.stat("/workspace/a/b/c.txt").unwrap().mode, 0o600);
        assert!(tree.list("/", 1).unwrap().iter().any(|entry| entry.path == "/tmp"));
    }

    #[test]
    fn directories_move_with_what_is_below_them_but_not_into_themselves() {
        let mut tree = Tree::new();
        tree.write("/workspace/a/f", Bytes::from_static(b"1"), None, "root").unwrap();
        tree.write("/workspace/a-b", Bytes::from_static(b"2"), None, "root").unwrap();
        tree.rename("/workspace/a", "/new/place", "root").unwrap();
        assert_eq!(text(&tree, "/new/place/f"), "1");
        assert_eq!(text(&tree, "/workspace/a-b"), "2");
        assert!(matches!(tree.rename("/new", "/new/x", "root"), Err(SessionError::FileConflict(_))));
        assert!(matches!(tree.stat("/workspace/a"), Err(SessionError::FileNotFound(_))));
    }

    #[test]
    fn links_are_followed_inside_and_loops_end() {
        let mut tree = Tree::new();
        tree.write("/workspace/real", Bytes::from_static(b"r"), None, "root").unwrap();
        tree.link("/workspace/rel", "real", "root").unwrap();
        tree.link("/workspace/up", "../../../../workspace/real", "root").unwrap();
        tree.link("/workspace/loop", "/workspace/loop", "root").unwrap();
        assert_eq!(text(&tree, "/workspace/rel"), "r");
        assert_eq!(text(&tree, "/workspace/up"), "r");
        assert!(matches!(tree.read("/workspace/loop"), Err(SessionError::FileConflict(_))));
        assert_eq!(tree.stat("/workspace/rel").unwrap().symlink_target.as_deref(), Some("real"));
        tree.remove("/workspace/rel", false).unwrap();
        assert_eq!(text(&tree, "/workspace/real"), "r");
    }

    #[test]
    fn bad_paths_are_refused() {
        let tree = Tree::new();
        for path in ["", "  ", "relative", "/a\0b", &format!("/{}", "n".repeat(256))] {
            assert!(matches!(tree.stat(path), Err(SessionError::InvalidArgument(_))), "{path:?}");
        }
    }
}
