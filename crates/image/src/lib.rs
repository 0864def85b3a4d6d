//! OCI images: pull, verify, cache, import, unpack.
//!
//! [`ImageStore`] keeps every image once, by content, and hands out [`Image`]s:
//! a stack of unpacked, read-only directories and what the image says about how
//! to run it. How they are mounted is the launcher's business; so is the `host`
//! image, which is not stored at all.
//!
//! Images are hostile input: registries, archives and layers may lie about
//! sizes, digests and names. Nothing unverified is unpacked, nothing unpacked
//! leaves its directory, and everything has a limit.

mod archive;
mod config;
mod digest;
mod error;
mod pull;
mod reference;
mod registry;
mod store;
mod unpack;

pub use archive::{ExportFormat, ImportOptions};
pub use config::{ImageConfig, Platform};
pub use digest::{Digest, InvalidDigest};
pub use error::{Cause, ImageError};
pub use reference::ImageReference;
pub use registry::Credentials;
pub use store::{DEFAULT_MAX_BYTES, GarbageReport, Image, ImageStore, ImageStoreOptions, ImageSummary, Lease};
pub use unpack::{LayerForm, LayerNotes, UnpackLimits};
