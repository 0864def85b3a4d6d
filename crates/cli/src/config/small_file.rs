//! Files an operator names in a setting: configurations and keys.
//!
//! Whatever the name leads to, reading it ends: a pipe nobody writes to and a
//! device without an end are refused, and nothing is longer than a setting.

use std::io::{self, Read as _};
use std::path::Path;

use rustix::fs::{Mode, OFlags};

/// A key, generously.
pub(crate) const MAX_KEY_FILE_BYTES: u64 = 64 << 10;

/// Reads a regular file of at most `max_bytes`, or of what a link leads to.
pub(crate) fn read_small_file(path: &Path, max_bytes: u64) -> io::Result<String> {
    // Without waiting for somebody who writes to a pipe.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = std::fs::File::from(rustix::fs::open(path, flags, Mode::empty())?);
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is no regular file; write its content to one and name that"));
    }
    let mut text = String::new();
    file.take(max_bytes + 1).read_to_string(&mut text)?;
    if text.len() as u64 > max_bytes {
        return Err(io::Error::other(format!("it is longer than {max_bytes} bytes")));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files_of_bounded_length_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("file"), "1234").unwrap();
        std::os::unix::fs::symlink("file", at("link")).unwrap();
        assert_eq!(read_small_file(&at("link"), 4).unwrap(), "1234");
        assert_eq!(read_small_file(&at("file"), 3).unwrap_err().to_string(), "it is longer than 3 bytes");
        assert_eq!(read_small_file(&at("missing"), 3).unwrap_err().kind(), io::ErrorKind::NotFound);

        rustix::fs::mknodat(rustix::fs::CWD, at("pipe"), rustix::fs::FileType::Fifo, Mode::RUSR, 0).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        for odd in [&at("pipe"), Path::new("/dev/zero"), Path::new("/dev/null"), dir.path()] {
            let refused = read_small_file(odd, 4).unwrap_err().to_string();
            assert!(refused.starts_with("it is no regular file"), "{}: {refused}", odd.display());
        }
        assert!(read_small_file(&at("socket"), 4).is_err());
    }
}
