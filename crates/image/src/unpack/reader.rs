//! A tar stream, entry by entry, with every length bounded.
//!
//! The `tar` crate reads headers for us, but its iterator takes long names and
//! extended headers whole into memory however large a hostile archive says
//! they are, and splits extended records at newlines, which breaks binary
//! attributes. So the walk from header to header is ours.
//!
//! Formats: ustar, GNU (long names), PAX (names, sizes, owners, times,
//! `SCHILY.xattr.*`). Sparse entries are refused: no container tool writes them.

use std::io::{self, Read};

use tar::{EntryType, Header};

const BLOCK_BYTES: usize = 512;
/// The kernel's `PATH_MAX`: nothing longer can be opened in one call.
pub(crate) const MAX_NAME_BYTES: usize = 4096;
/// Extended headers carry names and attributes; an attribute value is at most
/// 64 KiB on Linux (`XATTR_SIZE_MAX`), so this leaves room for a dozen.
const MAX_EXTENSION_BYTES: u64 = 1 << 20;
/// Attributes of one entry.
const MAX_XATTRS: usize = 64;
/// uid and gid of all ones mean "unchanged" to the kernel.
const MAX_ID: u64 = u32::MAX as u64 - 1;

#[derive(Debug, thiserror::Error)]
pub(crate) enum TarError {
    #[error("{reason}")]
    Malformed { entry: String, reason: String },
    #[error(transparent)]
    Io(#[from] io::Error),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EntryKind {
    File,
    Directory,
    Symlink,
    HardLink,
    Fifo,
    /// Block or character.
    Device,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TarEntry {
    pub(crate) kind: EntryKind,
    /// As in the archive: may be absolute, hold `..` or any other trick.
    pub(crate) name: Vec<u8>,
    pub(crate) link: Vec<u8>,
    /// Permission bits with setuid, setgid and sticky.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime_seconds: i64,
    pub(crate) mtime_nanos: u32,
    pub(crate) size: u64,
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl TarEntry {
    /// The name for messages.
    pub(crate) fn display_name(&self) -> String {
        display(&self.name)
    }
}

pub(crate) fn display(name: &[u8]) -> String {
    let shown = String::from_utf8_lossy(&name[..name.len().min(200)]);
    shown.chars().flat_map(char::escape_debug).collect()
}

pub(crate) struct TarReader<R> {
    input: R,
    /// Content of the current entry not yet read, and what pads it to a block.
    unread: u64,
    padding: u64,
    global: Extensions,
    headers: u64,
    max_headers: u64,
}

impl<R: Read> TarReader<R> {
    /// `max_entries` bounds headers of every kind, extended ones too.
    pub(crate) fn new(input: R, max_entries: u64) -> Self {
        Self { input, unread: 0, padding: 0, global: Extensions::default(), headers: 0, max_headers: max_entries }
    }

    pub(crate) fn into_input(self) -> R {
        self.input
    }

    /// The next entry that stands for a file; `None` at the end of the archive.
    pub(crate) fn next_entry(&mut self) -> Result<Option<TarEntry>, TarError> {
        let mut local = Extensions::default();
        let mut long_name = None;
        let mut long_link = None;
        loop {
            self.skip_content()?;
            let Some(header) = self.read_header()? else { return Ok(None) };
            let kind = header.entry_type();
            let size = header.entry_size().map_err(|_| malformed(&header, "unreadable size"))?;
            match kind {
                EntryType::XHeader => {
                    if local.seen {
                        return Err(malformed(&header, "two extended headers for one entry"));
                    }
                    local = Extensions::parse(&self.read_extension(&header, size)?)?;
                }
                EntryType::XGlobalHeader => {
                    let content = self.read_extension(&header, size)?;
                    self.global.merge(&Extensions::parse(&content)?);
                }
                EntryType::GNULongName => long_name = Some(self.read_long_name(&header, size)?),
                EntryType::GNULongLink => long_link = Some(self.read_long_name(&header, size)?),
                // A volume label.
                _ if kind.as_byte() == b'V' => self.begin_content(size),
                _ => {
                    let extensions = self.global.overlaid_with(local);
                    let entry = build_entry(&header, size, extensions, long_name, long_link)?;
                    self.begin_content(content_size(entry.kind, entry.size));
                    return Ok(Some(entry));
                }
            }
        }
    }

    fn read_header(&mut self) -> Result<Option<Header>, TarError> {
        let mut header = Header::new_old();
        let mut filled = 0;
        while filled < BLOCK_BYTES {
            match self.input.read(&mut header.as_mut_bytes()[filled..]) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(truncated().into()),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        if header.as_bytes().iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        self.headers += 1;
        if self.headers > self.max_headers {
            return Err(TarError::Malformed {
                entry: display(&header.path_bytes()),
                reason: format!("more than {} entries", self.max_headers),
            });
        }
        if !checksum_matches(&header) {
            return Err(TarError::Malformed { entry: String::new(), reason: "not a tar header".into() });
        }
        Ok(Some(header))
    }

    fn read_long_name(&mut self, header: &Header, size: u64) -> Result<Vec<u8>, TarError> {
        if size > MAX_NAME_BYTES as u64 + 1 {
            return Err(malformed(header, format!("name longer than {MAX_NAME_BYTES} bytes")));
        }
        let mut name = self.read_extension(header, size)?;
        if let Some(end) = name.iter().position(|byte| *byte == 0) {
            name.truncate(end);
        }
        Ok(name)
    }

    fn read_extension(&mut self, header: &Header, size: u64) -> Result<Vec<u8>, TarError> {
        if size > MAX_EXTENSION_BYTES {
            return Err(malformed(header, format!("extended header larger than {MAX_EXTENSION_BYTES} bytes")));
        }
        self.begin_content(size);
        let mut content = vec![0; size as usize];
        self.read_exact(&mut content)?;
        Ok(content)
    }

    fn begin_content(&mut self, size: u64) {
        self.unread = size;
        let block = BLOCK_BYTES as u64;
        self.padding = (block - size % block) % block;
    }

    fn skip_content(&mut self) -> Result<(), TarError> {
        let total = self.unread.saturating_add(self.padding);
        self.unread = 0;
        self.padding = 0;
        let skipped = io::copy(&mut self.input.by_ref().take(total), &mut io::sink())?;
        // The padding of the last entry may be missing; its content may not.
        if skipped < total { Err(truncated().into()) } else { Ok(()) }
    }
}

/// Reads the current entry's content.
impl<R: Read> Read for TarReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = (buffer.len() as u64).min(self.unread) as usize;
        if wanted == 0 {
            return Ok(0);
        }
        let count = self.input.read(&mut buffer[..wanted])?;
        if count == 0 {
            return Err(truncated());
        }
        self.unread -= count as u64;
        Ok(count)
    }
}

fn truncated() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the archive ends in the middle of an entry")
}

fn malformed(header: &Header, reason: impl Into<String>) -> TarError {
    TarError::Malformed { entry: display(&header.path_bytes()), reason: reason.into() }
}

/// The checksum counts the checksum field itself as spaces. Old writers summed
/// signed bytes; both are accepted, as everywhere.
fn checksum_matches(header: &Header) -> bool {
    const FIELD: std::ops::Range<usize> = 148..156;
    let Ok(stated) = header.cksum() else { return false };
    let mut unsigned = 0u32;
    let mut signed = 0i32;
    for (index, byte) in header.as_bytes().iter().enumerate() {
        let byte = if FIELD.contains(&index) { b' ' } else { *byte };
        unsigned += u32::from(byte);
        signed += i32::from(byte.cast_signed());
    }
    stated == unsigned || i64::from(stated) == i64::from(signed)
}

fn content_size(kind: EntryKind, size: u64) -> u64 {
    match kind {
        EntryKind::File => size,
        // Their size field says something else, or nothing; no content follows.
        EntryKind::Directory | EntryKind::Symlink | EntryKind::HardLink | EntryKind::Fifo | EntryKind::Device => 0,
    }
}

fn build_entry(
    header: &Header,
    header_size: u64,
    extensions: Extensions,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
) -> Result<TarEntry, TarError> {
    let bad = |field: &'static str| malformed(header, format!("unreadable {field}"));
    let fields = header.as_old();
    let name = extensions.path.or(long_name).unwrap_or_else(|| header.path_bytes().into_owned());
    if name.len() > MAX_NAME_BYTES {
        return Err(malformed(header, format!("name longer than {MAX_NAME_BYTES} bytes")));
    }
    let link = extensions
        .linkpath
        .or(long_link)
        .or_else(|| header.link_name_bytes().map(std::borrow::Cow::into_owned))
        .unwrap_or_default();
    if link.len() > MAX_NAME_BYTES {
        return Err(malformed(header, format!("link target longer than {MAX_NAME_BYTES} bytes")));
    }
    let kind = match header.entry_type() {
        // Before ustar, a directory was a file whose name ends in a slash.
        EntryType::Regular | EntryType::Continuous if name.ends_with(b"/") => EntryKind::Directory,
        EntryType::Regular | EntryType::Continuous => EntryKind::File,
        EntryType::Directory => EntryKind::Directory,
        EntryType::Symlink => EntryKind::Symlink,
        EntryType::Link => EntryKind::HardLink,
        EntryType::Fifo => EntryKind::Fifo,
        EntryType::Char | EntryType::Block => EntryKind::Device,
        EntryType::GNUSparse => return Err(sparse(header)),
        other => return Err(malformed(header, format!("unknown entry type {:?}", char::from(other.as_byte())))),
    };
    if extensions.sparse {
        return Err(sparse(header));
    }
    let uid = match extensions.uid {
        Some(uid) => uid,
        None => or_blank(header.uid(), &fields.uid).ok_or_else(|| bad("owner"))?,
    };
    let gid = match extensions.gid {
        Some(gid) => gid,
        None => or_blank(header.gid(), &fields.gid).ok_or_else(|| bad("group"))?,
    };
    if uid > MAX_ID || gid > MAX_ID {
        return Err(malformed(header, "owner out of range"));
    }
    let (mtime_seconds, mtime_nanos) = match extensions.mtime {
        Some(mtime) => mtime,
        None => (header.mtime().map_or(0, |mtime| i64::try_from(mtime).unwrap_or(0)), 0),
    };
    Ok(TarEntry {
        kind,
        name,
        link,
        mode: or_blank(header.mode(), &fields.mode).ok_or_else(|| bad("mode"))? & 0o7777,
        uid: uid as u32,
        gid: gid as u32,
        mtime_seconds,
        mtime_nanos,
        size: extensions.size.unwrap_or(header_size),
        xattrs: extensions.xattrs,
    })
}

/// Writers leave out what they do not know: a blank field means zero.
fn or_blank<T: Default>(value: io::Result<T>, field: &[u8]) -> Option<T> {
    let is_blank = field.iter().all(|byte| matches!(byte, 0 | b' '));
    value.ok().or_else(|| is_blank.then(T::default))
}

fn sparse(header: &Header) -> TarError {
    malformed(header, "sparse entries are not supported; write the archive without --sparse")
}

/// Records of an extended header that we use.
#[derive(Debug, Clone, Default)]
struct Extensions {
    seen: bool,
    path: Option<Vec<u8>>,
    linkpath: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<(i64, u32)>,
    sparse: bool,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Extensions {
    /// Records are `LENGTH KEY=VALUE\n`, the length counting all of it; values
    /// may hold any byte (POSIX pax, "Extended Header").
    fn parse(content: &[u8]) -> Result<Self, TarError> {
        let mut found = Self { seen: true, ..Self::default() };
        let mut rest = content;
        // Some writers pad with NULs.
        while rest.first().is_some_and(|byte| *byte != 0) {
            let (key, value, after) = split_record(rest).ok_or_else(bad_record)?;
            found.take(key, value)?;
            rest = after;
        }
        Ok(found)
    }

    fn take(&mut self, key: &[u8], value: &[u8]) -> Result<(), TarError> {
        let number =
            || std::str::from_utf8(value).ok().and_then(|text| text.parse::<u64>().ok()).ok_or_else(bad_record);
        // An empty value takes back what a global header said; the entry's own
        // header then counts.
        match key {
            b"path" => self.path = name_value(value),
            b"linkpath" => self.linkpath = name_value(value),
            b"size" if !value.is_empty() => self.size = Some(number()?),
            b"uid" if !value.is_empty() => self.uid = Some(number()?),
            b"gid" if !value.is_empty() => self.gid = Some(number()?),
            b"mtime" if !value.is_empty() => self.mtime = Some(parse_time(value).ok_or_else(bad_record)?),
            _ if key.starts_with(b"GNU.sparse.") => self.sparse = true,
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.".as_slice()) {
                    if self.xattrs.len() >= MAX_XATTRS {
                        return Err(TarError::Malformed {
                            entry: String::new(),
                            reason: format!("more than {MAX_XATTRS} extended attributes"),
                        });
                    }
                    self.xattrs.push((name.to_vec(), value.to_vec()));
                }
            }
        }
        Ok(())
    }

    /// Global headers add up; only what makes sense for many entries is kept.
    fn merge(&mut self, newer: &Self) {
        self.uid = newer.uid.or(self.uid);
        self.gid = newer.gid.or(self.gid);
        self.mtime = newer.mtime.or(self.mtime);
    }

    fn overlaid_with(&self, local: Self) -> Self {
        Self { uid: local.uid.or(self.uid), gid: local.gid.or(self.gid), mtime: local.mtime.or(self.mtime), ..local }
    }
}

fn name_value(value: &[u8]) -> Option<Vec<u8>> {
    (!value.is_empty()).then(|| value.to_vec())
}

fn bad_record() -> TarError {
    TarError::Malformed { entry: String::new(), reason: "unreadable extended header".into() }
}

fn split_record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = bytes.iter().take(20).position(|byte| *byte == b' ')?;
    let length: usize = std::str::from_utf8(&bytes[..space]).ok()?.parse().ok()?;
    if length <= space + 1 || length > bytes.len() || bytes[length - 1] != b'\n' {
        return None;
    }
    let record = &bytes[space + 1..length - 1];
    let equals = record.iter().position(|byte| *byte == b'=')?;
    Some((&record[..equals], &record[equals + 1..], &bytes[length..]))
}

/// Seconds with an optional fraction, as `1700000000.123456789`.
fn parse_time(value: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(value).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let digits: String = fraction.chars().chain(std::iter::repeat('0')).take(9).collect();
    let nanos: u32 = digits.parse().ok()?;
    // Before 1970, the fraction still counts away from zero.
    if whole.starts_with('-') && nanos > 0 {
        return Some((seconds.checked_sub(1)?, 1_000_000_000 - nanos));
    }
    Some((seconds, nanos))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(kind: EntryType, name: &str, size: u64) -> Vec<u8> {
        let mut header = Header::new_ustar();
        header.set_path(name).unwrap();
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_mode(0o4755);
        header.set_uid(7);
        header.set_gid(8);
        header.set_mtime(9);
        header.set_cksum();
        header.as_bytes().to_vec()
    }

    fn padded(mut content: Vec<u8>) -> Vec<u8> {
        content.resize(content.len().next_multiple_of(BLOCK_BYTES), 0);
        content
    }

    fn record(key: &str, value: &[u8]) -> Vec<u8> {
        let rest = key.len() + value.len() + 3;
        let mut length = rest + 1;
        while length != rest + length.to_string().len() {
            length = rest + length.to_string().len();
        }
        [length.to_string().as_bytes(), b" ", key.as_bytes(), b"=", value, b"\n"].concat()
    }

    fn first(bytes: Vec<u8>) -> Result<Option<TarEntry>, TarError> {
        TarReader::new(io::Cursor::new(bytes), 10).next_entry()
    }

    #[test]
    fn extended_records_override_the_header() {
        let records = [
            record("path", b"long/na\xffme"),
            record("mtime", b"12.5"),
            record("uid", b"70000"),
            record("SCHILY.xattr.user.a", b"line\nbreak=\0"),
        ]
        .concat();
        let archive = [
            header(EntryType::XHeader, "x", records.len() as u64),
            padded(records),
            header(EntryType::Regular, "short", 3),
            padded(b"abc".to_vec()),
            vec![0; 1024],
        ]
        .concat();
        let mut reader = TarReader::new(io::Cursor::new(archive), 10);
        let entry = reader.next_entry().unwrap().unwrap();
        assert_eq!(entry.name, b"long/na\xffme");
        assert_eq!((entry.mtime_seconds, entry.mtime_nanos), (12, 500_000_000));
        assert_eq!((entry.uid, entry.gid, entry.mode), (70_000, 8, 0o4755));
        assert_eq!(entry.xattrs, vec![(b"user.a".to_vec(), b"line\nbreak=\0".to_vec())]);
        let mut content = Vec::new();
        reader.read_to_end(&mut content).unwrap();
        assert_eq!(content, b"abc");
        assert_eq!(reader.next_entry().unwrap(), None);
    }

    #[test]
    fn an_extended_size_moves_the_next_header() {
        // Parsers that disagree here can be shown different entries.
        let records = record("size", b"512");
        let inner = header(EntryType::Regular, "hidden", 0);
        let archive = [
            header(EntryType::XHeader, "x", records.len() as u64),
            padded(records),
            header(EntryType::Regular, "outer", 0),
            inner.clone(),
            header(EntryType::Regular, "next", 0),
        ]
        .concat();
        let mut reader = TarReader::new(io::Cursor::new(archive), 10);
        let outer = reader.next_entry().unwrap().unwrap();
        assert_eq!((outer.name.as_slice(), outer.size), (b"outer".as_slice(), 512));
        let mut content = Vec::new();
        reader.read_to_end(&mut content).unwrap();
        assert_eq!(content, inner);
        assert_eq!(reader.next_entry().unwrap().unwrap().name, b"next");
    }

    #[test]
    fn lengths_are_bounded_before_anything_is_read() {
        let huge = u64::from(u32::MAX);
        for kind in [EntryType::XHeader, EntryType::XGlobalHeader, EntryType::GNULongName, EntryType::GNULongLink] {
            let error = first(header(kind, "x", huge)).unwrap_err();
            assert!(
                matches!(&error, TarError::Malformed { reason, .. } if reason.contains("larger") || reason.contains("longer")),
                "{error}"
            );
        }
        let many = header(EntryType::Regular, "x", 0).repeat(11);
        let mut reader = TarReader::new(io::Cursor::new(many), 10);
        let failure = (0..11).find_map(|_| reader.next_entry().err()).unwrap();
        assert!(failure.to_string().contains("more than 10 entries"), "{failure}");
    }

    #[test]
    fn damage_is_an_error() {
        let mut broken = header(EntryType::Regular, "x", 0);
        broken[0] = b'y';
        assert!(first(broken).is_err());
        assert!(first(header(EntryType::Regular, "x", 0)[..100].to_vec()).is_err());
        let mut cut = TarReader::new(io::Cursor::new(header(EntryType::Regular, "x", 10)), 10);
        cut.next_entry().unwrap();
        assert!(cut.next_entry().is_err());
        assert!(first(header(EntryType::GNUSparse, "x", 0)).is_err());
        for records in ["9999 path=x\n", "path=x\n", "5 a=b", "0 a=b\n", "-1 a=b\n", "12 size=pear\n"] {
            let archive = [header(EntryType::XHeader, "x", records.len() as u64), padded(records.into())].concat();
            assert!(first(archive).is_err(), "{records:?}");
        }
    }

    #[test]
    fn times_before_the_epoch() {
        assert_eq!(parse_time(b"-1.25"), Some((-2, 750_000_000)));
        assert_eq!(parse_time(b"-1"), Some((-1, 0)));
        assert_eq!(parse_time(b"1.x"), None);
    }
}
