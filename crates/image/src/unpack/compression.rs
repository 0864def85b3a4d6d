//! How a layer is compressed, told from its first bytes rather than from what
//! a manifest claims: tools disagree about media types, bytes do not lie.

use std::io::{self, BufReader, Read};

use flate2::read::MultiGzDecoder;

use crate::ImageError;

/// Enough to tell every format below apart.
const MAGIC_BYTES: usize = 6;
/// Window of a zstd frame, as a power of two: libzstd's own default limit
/// (128 MiB), so that a frame cannot ask for gigabytes of memory.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;
const READ_BUFFER_BYTES: usize = 128 * 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Compression {
    /// The OCI media type of a layer compressed like this.
    pub(crate) fn layer_media_type(self) -> oci_spec::image::MediaType {
        match self {
            Self::None => oci_spec::image::MediaType::ImageLayer,
            Self::Gzip => oci_spec::image::MediaType::ImageLayerGzip,
            Self::Zstd => oci_spec::image::MediaType::ImageLayerZstd,
        }
    }

    fn of(magic: &[u8]) -> Result<Self, ImageError> {
        let unsupported = |name: &str| Err(ImageError::Unsupported { what: format!("{name} compression") });
        match magic {
            [0x1f, 0x8b, ..] => Ok(Self::Gzip),
            // A frame, or a skippable frame before it.
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Ok(Self::Zstd),
            [b'B', b'Z', b'h', ..] => unsupported("bzip2"),
            [0xfd, b'7', b'z', b'X', b'Z', 0x00] => unsupported("xz"),
            _ => Ok(Self::None),
        }
    }
}

/// The plain bytes behind `input`, and how they were compressed.
pub(crate) fn decompress<'a>(
    mut input: impl Read + Send + 'a,
) -> Result<(Compression, Box<dyn Read + Send + 'a>), ImageError> {
    let mut magic = Vec::with_capacity(MAGIC_BYTES);
    let failed = |error: io::Error| ImageError::storage("read an image", "", error);
    input.by_ref().take(MAGIC_BYTES as u64).read_to_end(&mut magic).map_err(failed)?;
    let compression = Compression::of(&magic)?;
    let whole = BufReader::with_capacity(READ_BUFFER_BYTES, io::Cursor::new(magic).chain(input));
    let reader: Box<dyn Read + Send + 'a> = match compression {
        Compression::None => Box::new(whole),
        Compression::Gzip => Box::new(MultiGzDecoder::new(whole)),
        Compression::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(whole).map_err(failed)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG_MAX).map_err(failed)?;
            Box::new(decoder)
        }
    };
    Ok((compression, reader))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn plain(bytes: &[u8]) -> (Compression, Vec<u8>) {
        let (compression, mut reader) = decompress(bytes).unwrap();
        let mut content = Vec::new();
        reader.read_to_end(&mut content).unwrap();
        (compression, content)
    }

    #[test]
    fn every_format_is_told_from_its_bytes() {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(b"hello").unwrap();
        let gzip = gzip.finish().unwrap();
        let zstd = zstd::encode_all(b"hello".as_slice(), 1).unwrap();
        assert_eq!(plain(b"hello"), (Compression::None, b"hello".to_vec()));
        assert_eq!(plain(b""), (Compression::None, Vec::new()));
        assert_eq!(plain(&gzip), (Compression::Gzip, b"hello".to_vec()));
        assert_eq!(plain(&gzip.repeat(2)), (Compression::Gzip, b"hellohello".to_vec()));
        assert_eq!(plain(&zstd), (Compression::Zstd, b"hello".to_vec()));
        assert!(matches!(decompress(b"\xfd7zXZ\0".as_slice()), Err(ImageError::Unsupported { .. })));
    }
}
