//! The runtimes StacyVM can put a sandbox on.

pub mod custom;
pub mod docker;
pub mod mock;
pub mod oci;
pub mod proot;

mod host;
mod process;
