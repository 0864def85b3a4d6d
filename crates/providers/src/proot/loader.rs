//! The small program by which PRoot starts every other one.
//!
//! PRoot carries it inside itself and, in the version that distributions ship,
//! writes it to `/tmp` at each start, where a sandbox may write nothing. Where
//! its environment names one, it uses that: so each sandbox has a copy beside
//! its agent.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// For programs of 64 and of 32 bits.
const KINDS: [Kind; 2] = [
    Kind {
        class: 2,
        file: "loader",
        variable: "PROOT_LOADER",
        header_bytes: 64,
        sections_at: (40, 8),
        section_bytes: 58,
        sections: 60,
    },
    Kind {
        class: 1,
        file: "loader-32",
        variable: "PROOT_LOADER_32",
        header_bytes: 52,
        sections_at: (32, 4),
        section_bytes: 46,
        sections: 48,
    },
];

/// How every ELF file begins; the class is the next byte.
const MAGIC: &[u8] = b"\x7fELF";

/// Version and byte order behind the class: little endian, version 1.
const IDENTITY: &[u8] = &[1, 1];

/// `e_type` of a program that is loaded where it says, which loaders are.
const EXECUTABLE: u64 = 2;

/// Longer than any loader is.
const MAX_BYTES: usize = 1 << 20;

/// Where things are in the header of one class of ELF files.
struct Kind {
    class: u8,
    file: &'static str,
    variable: &'static str,
    header_bytes: usize,
    /// Where the section headers are, which come last in a loader: offset and length of the field.
    sections_at: (usize, usize),
    section_bytes: usize,
    sections: usize,
}

/// Writes what the program carries beside a sandbox's agent. A PRoot without
/// any writes its own to `PROOT_TMP_DIR`.
pub(super) fn write(program: &Path, sandbox: &Path) -> io::Result<()> {
    let bytes = std::fs::read(program)?;
    for kind in &KINDS {
        if let Some(loader) = kind.find(&bytes) {
            let path = sandbox.join(kind.file);
            std::fs::write(&path, loader)?;
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o555))?;
        }
    }
    Ok(())
}

/// Those of a sandbox, with the variables that name them.
pub(super) fn of(sandbox: &Path) -> impl Iterator<Item = (&'static str, PathBuf)> {
    KINDS.iter().map(|kind| (kind.variable, sandbox.join(kind.file))).filter(|(_, path)| path.exists())
}

impl Kind {
    /// The first program of this class inside another.
    fn find<'a>(&self, program: &'a [u8]) -> Option<&'a [u8]> {
        let start = [MAGIC, &[self.class], IDENTITY].concat();
        let inside = program.get(1..)?;
        let places = inside.windows(start.len()).enumerate().filter(|(_, window)| *window == start);
        places.into_iter().find_map(|(at, _)| self.whole(inside.get(at..)?))
    }

    /// As much of `bytes` as the ELF file at its beginning takes.
    fn whole<'a>(&self, bytes: &'a [u8]) -> Option<&'a [u8]> {
        let header = bytes.get(..self.header_bytes)?;
        if number(header, 16, 2)? != EXECUTABLE {
            return None;
        }
        let sections = number(header, self.section_bytes, 2)? * number(header, self.sections, 2)?;
        let end = number(header, self.sections_at.0, self.sections_at.1)?.checked_add(sections)?;
        let end = usize::try_from(end).ok().filter(|end| (self.header_bytes..=MAX_BYTES).contains(end))?;
        bytes.get(..end)
    }
}

/// A little-endian number of the header.
fn number(header: &[u8], at: usize, length: usize) -> Option<u64> {
    let bytes = header.get(at..at + length)?;
    Some(bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of the 64-bit class with `body` bytes and one section header.
    fn elf(kind: u8, body: usize) -> Vec<u8> {
        let mut bytes = [MAGIC, &[2], IDENTITY].concat();
        bytes.resize(64 + body + 64, 7);
        bytes[16..18].copy_from_slice(&[kind, 0]);
        bytes[40..48].copy_from_slice(&(64 + body as u64).to_le_bytes());
        bytes[58..62].copy_from_slice(&[64, 0, 1, 0]);
        bytes
    }

    #[test]
    fn a_loader_is_found_whole_behind_what_only_looks_like_one() {
        let loader = elf(2, 100);
        let outer = elf(3, 10);
        let text = [MAGIC, &[2], IDENTITY].concat();
        let program = [outer.as_slice(), &elf(3, 5), &text, &loader, b"rest"].concat();
        assert_eq!(KINDS[0].find(&program), Some(loader.as_slice()));
        assert_eq!(KINDS[1].find(&program), None, "of 32 bits there is none");
    }

    #[test]
    fn a_program_without_one_or_with_half_of_one_has_none() {
        let cut = elf(2, 100);
        let program = [elf(3, 10).as_slice(), &cut[..150]].concat();
        for bytes in [b"".as_slice(), b"#!/bin/sh\n", &elf(3, 10), &program] {
            assert_eq!(KINDS[0].find(bytes), None);
        }
        let mut endless = elf(2, 100);
        endless[40..48].fill(0xff);
        assert_eq!(KINDS[0].find(&[b"x".as_slice(), &endless].concat()), None);
    }
}
