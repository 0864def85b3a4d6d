//! What every test here starts from: the real program in a data directory of
//! its own, ways to ask it things, and proof that nothing is left of it.

mod program;
mod registry;
mod server;
mod site;
mod terminal;
mod wait;

use std::path::{Path, PathBuf};

pub(crate) use program::{Ran, run};
pub(crate) use registry::Registry;
pub(crate) use server::{Server, create, output, script, sh, small};
pub(crate) use site::{Site, control_groups, make_image, pid_of};
pub(crate) use terminal::Terminal;
pub(crate) use wait::{PATIENCE, eventually, eventually_equal, within};

/// The image that every site has: `alpine:latest`, made from busybox.
pub(crate) const IMAGE: &str = "alpine:latest";

/// A file of this repository.
pub(crate) fn in_repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)
}
