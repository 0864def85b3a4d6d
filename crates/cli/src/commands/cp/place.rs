//! The two sides of a copy.

use std::path::{Component, Path, PathBuf};

use stacyvm_api::SandboxId;

use crate::failure::Advice;

/// One side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    Local(PathBuf),
    /// A sandbox and an absolute path in it.
    Sandbox(SandboxId, String),
    /// `-`: standard input or output.
    Stream,
}

impl Place {
    /// `ID:/path` is in a sandbox; `./a:b` is a local file with a colon.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        if text == "-" {
            return Ok(Self::Stream);
        }
        if text.is_empty() {
            return Err("a path is empty".to_owned());
        }
        let Some((id, path)) = text.split_once(':') else { return Ok(Self::Local(text.into())) };
        match id.parse::<SandboxId>() {
            Ok(id) if path.starts_with('/') => Ok(Self::Sandbox(id, path.to_owned())),
            Ok(id) if id.as_str().starts_with("sb-") => Err(format!("write an absolute path: {id}:/workspace/{path}")),
            Ok(_) | Err(_) => Ok(Self::Local(text.into())),
        }
    }
}

/// `dir` and `name` with one slash between.
pub(super) fn join(dir: &str, name: &str) -> String {
    format!("{}/{name}", dir.trim_end_matches('/'))
}

/// `dir/.` or `.`: what is in the directory rather than the directory.
pub(super) fn means_contents(path: &Path) -> bool {
    let text = path.as_os_str().as_encoded_bytes();
    text == b"." || text.ends_with(b"/.") || text.ends_with(b"/..") || text == b".."
}

/// The same of a path in a sandbox.
pub(super) fn remote_means_contents(path: &str) -> bool {
    path.ends_with("/.") || path == "/"
}

/// The last name of a local path, for the sandbox.
pub(super) fn local_name(path: &Path) -> anyhow::Result<String> {
    let full = path.canonicalize()?;
    // The name as it was written, not that of what a link points to.
    let name = match path.components().next_back() {
        Some(Component::Normal(name)) => name.to_owned(),
        _ => full.file_name().unwrap_or_default().to_owned(),
    };
    name.into_string().map_err(|name| {
        Advice::new(
            format!("the name {} is not Unicode", name.to_string_lossy()),
            "name the target file, or copy the directory that holds it",
        )
        .into()
    })
}

/// The last name of a path in a sandbox.
pub(super) fn remote_name(path: &str) -> anyhow::Result<String> {
    let name = path.trim_end_matches("/.").trim_end_matches('/').rsplit('/').next().unwrap_or_default();
    match name {
        "" | "." | ".." => Err(Advice::new(format!("`{path}` has no name to copy it under"), "name the target").into()),
        name => Ok(name.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_told_apart() {
        let id: SandboxId = "sb-1".parse().unwrap();
        assert_eq!(Place::parse("sb-1:/a:b"), Ok(Place::Sandbox(id, "/a:b".to_owned())));
        assert_eq!(Place::parse("./sb-1:/x"), Ok(Place::Local("./sb-1:/x".into())));
        assert_eq!(Place::parse("C:x"), Ok(Place::Local("C:x".into())));
        assert_eq!(Place::parse("-"), Ok(Place::Stream));
        assert_eq!(Place::parse("sb-1:x").unwrap_err(), "write an absolute path: sb-1:/workspace/x");
        assert!(Place::parse("").is_err());
    }

    #[test]
    fn names_come_from_either_side() {
        assert_eq!(remote_name("/a/b/").unwrap(), "b");
        assert_eq!(remote_name("/a/b/.").unwrap(), "b");
        assert!(remote_name("/").is_err() && remote_name("/a/..").is_err());
        assert_eq!(join("/a/", "b"), "/a/b");
        assert_eq!(join("/", "b"), "/b");
        assert!(means_contents(Path::new("x/.")) && means_contents(Path::new(".")) && !means_contents(Path::new("x.")));
    }
}
