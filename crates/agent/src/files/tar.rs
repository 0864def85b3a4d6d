//! The tar format: headers out, entries in.
//!
//! Written here because the agent's memory must stay bounded whatever an archive
//! claims (libraries read a long name of any length into memory), and because an
//! archive is streamed in short steps through a single thread. Reads ustar, GNU
//! long names and pax paths; writes ustar with GNU long names.

use bytes::{Buf as _, Bytes, BytesMut};
use futures_util::{Stream, StreamExt as _};

use crate::Failure;

pub(crate) const BLOCK_BYTES: usize = 512;

/// A name, or the pax records of one entry.
const MAX_EXTENSION_BYTES: u64 = 64 << 10;

/// Longest path or link target, as `PATH_MAX`.
const MAX_NAME_BYTES: usize = 4096;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TarKind {
    File,
    Directory,
    Symlink,
    HardLink,
    Fifo,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TarHeader {
    pub path: Vec<u8>,
    pub kind: TarKind,
    /// Target of a link; empty otherwise.
    pub link: Vec<u8>,
    /// Bytes of content behind the header.
    pub size: u64,
    /// Permission bits only.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub modified_seconds: i64,
}

impl TarHeader {
    /// The header as it stands in an archive, long names before it.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut encoded = Vec::with_capacity(BLOCK_BYTES);
        for (name, kind) in [(&self.link, b'K'), (&self.path, b'L')] {
            if name.len() > 100 {
                encoded.extend(block(b"././@LongLink", b"", kind, &[0, 0, 0, name.len() as u64 + 1, 0]));
                encoded.extend_from_slice(name);
                encoded.push(0);
                encoded.resize(encoded.len().next_multiple_of(BLOCK_BYTES), 0);
            }
        }
        let kind = match self.kind {
            TarKind::File => b'0',
            TarKind::HardLink => b'1',
            TarKind::Symlink => b'2',
            TarKind::Directory => b'5',
            TarKind::Fifo => b'6',
        };
        let modified = u64::try_from(self.modified_seconds).unwrap_or(0);
        let numbers = [self.mode.into(), self.uid.into(), self.gid.into(), self.size, modified];
        encoded.extend(block(&self.path, &self.link, kind, &numbers));
        encoded
    }
}

/// Two zero blocks.
pub(crate) const END: [u8; 2 * BLOCK_BYTES] = [0; 2 * BLOCK_BYTES];

/// Zeros after content of this length.
pub(crate) fn padding(size: u64) -> usize {
    (size.next_multiple_of(BLOCK_BYTES as u64) - size) as usize
}

/// `[mode, uid, gid, size, mtime]` in their places.
fn block(path: &[u8], link: &[u8], kind: u8, numbers: &[u64; 5]) -> [u8; BLOCK_BYTES] {
    let mut block = [0u8; BLOCK_BYTES];
    let put = |block: &mut [u8; BLOCK_BYTES], at: usize, room: usize, text: &[u8]| {
        let length = text.len().min(room);
        block[at..at + length].copy_from_slice(&text[..length]);
    };
    put(&mut block, 0, 100, path);
    put(&mut block, 157, 100, link);
    for (&number, (at, room)) in numbers.iter().zip([(100, 8), (108, 8), (116, 8), (124, 12), (136, 12)]) {
        let octal = format!("{number:0width$o}\0", width = room - 1);
        if octal.len() == room {
            put(&mut block, at, room, octal.as_bytes());
        } else {
            // Too large for octal digits: base 256, marked by the first bit.
            put(&mut block, at + room - 8, 8, &number.to_be_bytes());
            block[at] |= 0x80;
        }
    }
    block[156] = kind;
    put(&mut block, 257, 8, b"ustar\x0000");
    let sum = checksum(&block);
    put(&mut block, 148, 8, format!("{sum:06o}\0 ").as_bytes());
    block
}

/// Over the header with spaces in place of the sum itself.
fn checksum(block: &[u8]) -> u32 {
    block.iter().enumerate().map(|(at, &byte)| if (148..156).contains(&at) { 32 } else { u32::from(byte) }).sum()
}

/// Reads entries from a stream of bytes.
pub(crate) struct TarReader<S> {
    input: S,
    buffer: BytesMut,
    /// Content of the current entry that was not taken yet.
    left: u64,
    /// Zeros behind it.
    padding: u64,
}

impl<S: Stream<Item = Result<Bytes, Failure>> + Unpin> TarReader<S> {
    pub(crate) fn new(input: S) -> Self {
        Self { input, buffer: BytesMut::new(), left: 0, padding: 0 }
    }

    /// The next entry; what was left of the one before is skipped.
    pub(crate) async fn next(&mut self) -> Result<Option<TarHeader>, Failure> {
        self.skip(self.left + self.padding).await?;
        (self.left, self.padding) = (0, 0);
        let mut extended = Extended::default();
        loop {
            if !self.fill(BLOCK_BYTES).await? {
                return if self.buffer.is_empty() { Ok(None) } else { Err(invalid("it is cut off")) };
            }
            let block = self.buffer.split_to(BLOCK_BYTES);
            if block.iter().all(|&byte| byte == 0) {
                return Ok(None);
            }
            let raw = RawHeader::parse(&block)?;
            match raw.kind {
                b'L' | b'K' | b'x' => {
                    let content = self.extension(raw.size).await?;
                    extended.add(raw.kind, &content)?;
                }
                // Defaults for all entries: none of them concerns us.
                b'g' => self.skip(raw.size + padding(raw.size) as u64).await?,
                _ => {
                    let header = extended.apply(raw)?;
                    self.left = header.size;
                    self.padding = padding(header.size) as u64;
                    return Ok(Some(header));
                }
            }
        }
    }

    /// The next piece of the current entry's content.
    pub(crate) async fn content(&mut self) -> Result<Option<Bytes>, Failure> {
        if self.left == 0 {
            return Ok(None);
        }
        if !self.fill(1).await? {
            return Err(invalid("it is cut off"));
        }
        let length = (self.buffer.len() as u64).min(self.left) as usize;
        self.left -= length as u64;
        Ok(Some(self.buffer.split_to(length).freeze()))
    }

    async fn extension(&mut self, size: u64) -> Result<Vec<u8>, Failure> {
        if size > MAX_EXTENSION_BYTES {
            return Err(invalid("a name is too long"));
        }
        let whole = size as usize + padding(size);
        if !self.fill(whole).await? {
            return Err(invalid("it is cut off"));
        }
        let mut content = self.buffer.split_to(whole).to_vec();
        content.truncate(size as usize);
        Ok(content)
    }

    async fn skip(&mut self, mut count: u64) -> Result<(), Failure> {
        while count > 0 {
            if !self.fill(1).await? {
                return Err(invalid("it is cut off"));
            }
            let step = (self.buffer.len() as u64).min(count);
            self.buffer.advance(step as usize);
            count -= step;
        }
        Ok(())
    }

    /// Whether this many bytes are there; false at the end of the input.
    async fn fill(&mut self, count: usize) -> Result<bool, Failure> {
        while self.buffer.len() < count {
            match self.input.next().await {
                // The usual case costs no copy.
                Some(Ok(piece)) if self.buffer.is_empty() => self.buffer = piece.into(),
                Some(Ok(piece)) => self.buffer.extend_from_slice(&piece),
                Some(Err(error)) => return Err(error),
                None => return Ok(false),
            }
        }
        Ok(true)
    }
}

struct RawHeader {
    path: Vec<u8>,
    link: Vec<u8>,
    kind: u8,
    size: u64,
    mode: u32,
    uid: u32,
    gid: u32,
    modified_seconds: i64,
}

impl RawHeader {
    fn parse(block: &[u8]) -> Result<Self, Failure> {
        if number(&block[148..156]) != Some(u64::from(checksum(block))) {
            return Err(invalid("a header is damaged"));
        }
        let mut path = text(&block[..100]);
        let prefix = text(&block[345..500]);
        // GNU's variant uses the prefix field for other things.
        if &block[257..263] == b"ustar\0" && !prefix.is_empty() {
            path = [prefix, vec![b'/'], path].concat();
        }
        let small = |range: std::ops::Range<usize>| number(&block[range]).map(|number| number as u32);
        Ok(Self {
            path,
            link: text(&block[157..257]),
            kind: block[156],
            size: number(&block[124..136]).ok_or_else(|| invalid("a size is damaged"))?,
            mode: small(100..108).unwrap_or(0o644) & 0o7777,
            uid: small(108..116).unwrap_or(0),
            gid: small(116..124).unwrap_or(0),
            modified_seconds: number(&block[136..148]).and_then(|seconds| i64::try_from(seconds).ok()).unwrap_or(0),
        })
    }
}

/// What entries before the header say about it.
#[derive(Default)]
struct Extended {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
}

impl Extended {
    fn add(&mut self, kind: u8, content: &[u8]) -> Result<(), Failure> {
        match kind {
            b'L' => self.path = Some(text(content)),
            b'K' => self.link = Some(text(content)),
            _ => {
                let mut rest = content;
                while !rest.is_empty() {
                    let (key, value);
                    (key, value, rest) = pax_record(rest).ok_or_else(|| invalid("a pax record is damaged"))?;
                    match key {
                        b"path" => self.path = Some(value.to_vec()),
                        b"linkpath" => self.link = Some(value.to_vec()),
                        b"size" => {
                            let digits = std::str::from_utf8(value).ok().and_then(|digits| digits.parse().ok());
                            self.size = Some(digits.ok_or_else(|| invalid("a size is damaged"))?);
                        }
                        key if key.starts_with(b"GNU.sparse.") => {
                            return Err(invalid("sparse files are not supported"));
                        }
                        _ => {}
                    }
                }
            }
        }
        Ok(())
    }

    fn apply(self, raw: RawHeader) -> Result<TarHeader, Failure> {
        let path = self.path.unwrap_or(raw.path);
        let kind = match raw.kind {
            // Old archives mark a directory by its name only.
            b'0' | 0 | b'7' if path.ends_with(b"/") => TarKind::Directory,
            b'0' | 0 | b'7' => TarKind::File,
            b'1' => TarKind::HardLink,
            b'2' => TarKind::Symlink,
            b'5' => TarKind::Directory,
            b'6' => TarKind::Fifo,
            b'3' | b'4' => return Err(invalid("it contains a device")),
            b'S' => return Err(invalid("sparse files are not supported")),
            _ => return Err(invalid("it contains an entry of an unknown kind")),
        };
        let link = self.link.unwrap_or(raw.link);
        if path.len() > MAX_NAME_BYTES || link.len() > MAX_NAME_BYTES {
            return Err(invalid("a name is too long"));
        }
        if path.contains(&0) || link.contains(&0) {
            return Err(invalid("a name contains a zero byte"));
        }
        // Others may state a size too, but no content follows theirs.
        let has_content = matches!(raw.kind, b'0' | 0 | b'7');
        let size = if has_content { self.size.unwrap_or(raw.size) } else { 0 };
        if size > i64::MAX as u64 {
            return Err(invalid("a size is damaged"));
        }
        Ok(TarHeader {
            path,
            kind,
            link,
            size,
            mode: raw.mode,
            uid: raw.uid,
            gid: raw.gid,
            modified_seconds: raw.modified_seconds,
        })
    }
}

/// `LENGTH KEY=VALUE\n`, the length including itself.
fn pax_record(records: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = records.iter().position(|&byte| byte == b' ')?;
    let length: usize = std::str::from_utf8(&records[..space]).ok()?.parse().ok()?;
    let record = records.get(space + 1..length)?.strip_suffix(b"\n")?;
    let equals = record.iter().position(|&byte| byte == b'=')?;
    Some((&record[..equals], &record[equals + 1..], &records[length..]))
}

fn text(field: &[u8]) -> Vec<u8> {
    field.split(|&byte| byte == 0).next().unwrap_or_default().to_vec()
}

/// Octal digits, or base 256 when the first bit is set.
fn number(field: &[u8]) -> Option<u64> {
    if field.first()? & 0x80 != 0 {
        let (first, rest) = field.split_first()?;
        return rest
            .iter()
            .try_fold(u64::from(first & 0x7f), |number, &byte| number.checked_mul(256)?.checked_add(u64::from(byte)));
    }
    let digits = std::str::from_utf8(field).ok()?.trim_matches(|c: char| c == '\0' || c == ' ');
    if digits.is_empty() { Some(0) } else { u64::from_str_radix(digits, 8).ok() }
}

fn invalid(what: &str) -> Failure {
    Failure::InvalidArgument(format!("the archive cannot be unpacked: {what}"))
}

#[cfg(test)]
mod tests {
    use futures_util::stream;

    use super::*;

    fn header(path: &str, size: u64) -> TarHeader {
        TarHeader {
            path: path.as_bytes().to_vec(),
            kind: TarKind::File,
            link: Vec::new(),
            size,
            mode: 0o640,
            uid: 1000,
            gid: 3_000_000,
            modified_seconds: 1_700_000_000,
        }
    }

    /// Reads an archive in pieces of every size given.
    async fn read(archive: &[u8], piece: usize) -> Result<Vec<(TarHeader, Vec<u8>)>, Failure> {
        let pieces: Vec<_> = archive.chunks(piece).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
        let mut reader = TarReader::new(stream::iter(pieces));
        let mut entries = Vec::new();
        while let Some(header) = reader.next().await? {
            let mut content = Vec::new();
            while let Some(piece) = reader.content().await? {
                content.extend_from_slice(&piece);
            }
            entries.push((header, content));
        }
        Ok(entries)
    }

    #[tokio::test]
    async fn what_is_written_is_read_however_it_is_cut() {
        let long = header(&"long/".repeat(60), 3);
        let link =
            TarHeader { kind: TarKind::Symlink, link: "t".repeat(150).into_bytes(), size: 0, ..header("link", 0) };
        let mut archive = long.encode();
        archive.extend_from_slice(b"abc");
        archive.resize(archive.len() + padding(3), 0);
        archive.extend(link.encode());
        archive.extend(header("empty", 0).encode());
        archive.extend(END);
        for piece in [1, 7, 511, 512, 513, 1 << 20] {
            let entries = read(&archive, piece).await.expect("a good archive");
            assert_eq!(entries.len(), 3);
            // A name that ends with a slash is a directory's, whatever its kind.
            assert_eq!(entries[0].0, TarHeader { kind: TarKind::Directory, ..long.clone() });
            assert_eq!(entries[1], (link.clone(), Vec::new()));
            assert_eq!(entries[2].0, header("empty", 0));
        }
    }

    #[tokio::test]
    async fn numbers_beyond_octal_survive() {
        let large = header("large", 1 << 40);
        let encoded = large.encode();
        let mut reader = TarReader::new(stream::iter([Ok(Bytes::from(encoded))]));
        assert_eq!(reader.next().await.expect("a good header"), Some(large));
        assert!(reader.content().await.is_err(), "the content is missing");
    }

    #[tokio::test]
    async fn hostile_archives_are_errors() {
        let good = header("a", 0).encode();
        let mut damaged = good.clone();
        damaged[0] ^= 1;
        let device = block(b"dev", b"", b'3', &[0; 5]).to_vec();
        let endless = block(b"././@LongLink", b"", b'L', &[0, 0, 0, 1 << 40, 0]).to_vec();
        for archive in [damaged, device, endless, good[..100].to_vec()] {
            assert!(matches!(read(&archive, 4096).await, Err(Failure::InvalidArgument(_))));
        }
        assert!(read(&[], 1).await.expect("an empty archive").is_empty());
    }

    #[test]
    fn pax_records_are_cut_out_exactly() {
        assert_eq!(pax_record(b"12 path=abc\nrest"), Some((&b"path"[..], &b"abc"[..], &b"rest"[..])));
        assert_eq!(pax_record(b"99 path=abc\n"), None);
        assert_eq!(pax_record(b"0 x"), None);
        assert_eq!(pax_record(b"3 =\n"), None);
    }
}
