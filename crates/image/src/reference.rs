//! Names of images, by Docker's rules: `alpine` is `docker.io/library/alpine:latest`.

use std::fmt;
use std::str::FromStr;

use oci_spec::distribution::Reference;

use crate::{Digest, ImageError};

/// What a reference may take at most; a repository name alone may have 255.
const MAX_REFERENCE_BYTES: usize = 1024;

/// A complete image name: registry, repository, and a tag or digest or both.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageReference {
    inner: Reference,
    digest: Option<Digest>,
}

impl ImageReference {
    /// Where the image lives, as written: `docker.io`, `127.0.0.1:5000`.
    pub fn registry(&self) -> &str {
        self.inner.registry()
    }

    /// The host to talk to, which differs for Docker Hub.
    pub(crate) fn registry_host(&self) -> &str {
        self.inner.resolve_registry()
    }

    pub fn repository(&self) -> &str {
        self.inner.repository()
    }

    pub fn tag(&self) -> Option<&str> {
        self.inner.tag()
    }

    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// What to ask the registry for: the digest where there is one.
    pub(crate) fn selector(&self) -> String {
        match (&self.digest, self.inner.tag()) {
            (Some(digest), _) => digest.to_string(),
            (None, tag) => tag.unwrap_or("latest").to_owned(),
        }
    }
}

impl FromStr for ImageReference {
    type Err = ImageError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = |reason: String| ImageError::InvalidReference {
            reference: text.chars().take(MAX_REFERENCE_BYTES).collect(),
            reason,
        };
        if text.len() > MAX_REFERENCE_BYTES {
            return Err(invalid(format!("longer than {MAX_REFERENCE_BYTES} bytes")));
        }
        if text == "host" {
            return Err(invalid("`host` names the host's own file system, not an image".into()));
        }
        let inner = Reference::from_str(text).map_err(|error| invalid(error.to_string()))?;
        let digest = match inner.digest() {
            Some(digest) => Some(digest.parse::<Digest>().map_err(|error| invalid(error.to_string()))?),
            None => None,
        };
        Ok(Self { inner, digest })
    }
}

impl fmt::Display for ImageReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_completed_as_docker_does() {
        let digest = Digest::of(b"x");
        for (text, expected) in [
            ("alpine", "docker.io/library/alpine:latest".to_owned()),
            ("alpine:3.20", "docker.io/library/alpine:3.20".to_owned()),
            ("docker.io/alpine", "docker.io/library/alpine:latest".to_owned()),
            ("someone/tool:1", "docker.io/someone/tool:1".to_owned()),
            ("localhost/tool", "localhost/tool:latest".to_owned()),
            ("127.0.0.1:5000/a/b:c", "127.0.0.1:5000/a/b:c".to_owned()),
            (&format!("alpine@{digest}"), format!("docker.io/library/alpine@{digest}")),
            (&format!("alpine:3@{digest}"), format!("docker.io/library/alpine:3@{digest}")),
        ] {
            assert_eq!(text.parse::<ImageReference>().unwrap().to_string(), expected);
        }
    }

    #[test]
    fn a_digest_wins_over_a_tag() {
        let digest = Digest::of(b"x");
        let reference: ImageReference = format!("alpine:3@{digest}").parse().unwrap();
        assert_eq!(reference.selector(), digest.as_str());
        assert_eq!("alpine:3".parse::<ImageReference>().unwrap().selector(), "3");
    }

    #[test]
    fn malformed_names_are_refused() {
        let long = "a".repeat(2000);
        for text in ["", "UPPER", "a b", "a:", "../x", "/x", "x@sha256:12", "x@md5:00", "x\0y", "host", &long, "a//b"] {
            match text.parse::<ImageReference>() {
                Err(ImageError::InvalidReference { .. }) => {}
                other => panic!("{text:?} gave {other:?}"),
            }
        }
    }
}
