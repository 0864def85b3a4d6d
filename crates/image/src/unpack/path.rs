//! Names from an archive, made safe: relative, without tricks, of bounded
//! length and depth. Bytes, not text: Linux names need not be UTF-8.

use super::reader::MAX_NAME_BYTES;

/// The kernel's `NAME_MAX`.
const MAX_COMPONENT_BYTES: usize = 255;
/// Directories inside each other. Removal holds one descriptor per level, and
/// no real image comes near this.
const MAX_DEPTH: usize = 256;

/// A path below the layer's root, components joined by `/`; empty is the root.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct EntryPath(Vec<u8>);

impl EntryPath {
    /// Leading slashes and `.` components are dropped, as tar does; `..` is
    /// refused rather than resolved, since no honest archive needs it.
    pub(crate) fn parse(name: &[u8]) -> Result<Self, &'static str> {
        if name.len() > MAX_NAME_BYTES {
            return Err("name too long");
        }
        if name.contains(&0) {
            return Err("NUL byte in name");
        }
        let mut path = Vec::with_capacity(name.len());
        let mut depth = 0;
        for component in name.split(|byte| *byte == b'/') {
            match component {
                b"" | b"." => continue,
                b".." => return Err("name contains `..`"),
                _ if component.len() > MAX_COMPONENT_BYTES => return Err("name component longer than 255 bytes"),
                _ => {}
            }
            depth += 1;
            if depth > MAX_DEPTH {
                return Err("directories nested too deeply");
            }
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(component);
        }
        Ok(Self(path))
    }

    pub(crate) fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Parent and last component; `None` for the root.
    pub(crate) fn split(&self) -> Option<(Self, &[u8])> {
        if self.is_root() {
            return None;
        }
        Some(match self.0.iter().rposition(|byte| *byte == b'/') {
            Some(slash) => (Self(self.0[..slash].to_vec()), &self.0[slash + 1..]),
            None => (Self(Vec::new()), &self.0),
        })
    }

    pub(crate) fn components(&self) -> impl Iterator<Item = &[u8]> {
        self.0.split(|byte| *byte == b'/').filter(|component| !component.is_empty())
    }

    /// `self` or something below it.
    pub(crate) fn covers(&self, other: &Self) -> bool {
        self.is_root() || other.0.strip_prefix(self.0.as_slice()).is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_relative() {
        for (name, expected) in [
            ("a/b", "a/b"),
            ("./a/b/", "a/b"),
            ("/etc/passwd", "etc/passwd"),
            ("//a///b/./c", "a/b/c"),
            ("./", ""),
            ("", ""),
        ] {
            assert_eq!(EntryPath::parse(name.as_bytes()).unwrap().as_bytes(), expected.as_bytes());
        }
        assert_eq!(EntryPath::parse(b"caf\xe9/\xff").unwrap().as_bytes(), b"caf\xe9/\xff");
    }

    #[test]
    fn tricks_are_refused() {
        let deep = "d/".repeat(300);
        let wide = "n".repeat(256);
        for name in ["..", "../x", "a/../../x", "a/..", "/..", &deep, &wide, "a\0b"] {
            assert!(EntryPath::parse(name.as_bytes()).is_err(), "{name}");
        }
        assert!(EntryPath::parse(b"..x/...").is_ok());
    }

    #[test]
    fn covering_respects_component_borders() {
        let path = |name: &str| EntryPath::parse(name.as_bytes()).unwrap();
        assert!(path("a").covers(&path("a")));
        assert!(path("a").covers(&path("a/b")));
        assert!(!path("a").covers(&path("ab")));
        assert!(path("").covers(&path("a")));
        assert_eq!(path("a/b").split().unwrap(), (path("a"), b"b".as_slice()));
    }
}
