//! The image store against real files, a real registry and hostile input.
//!
//! Needs the packages of `scripts/test-packages.txt`; a missing one is a
//! failure that names it.

mod archives;
mod build;
mod layers;
mod pulls;
mod registry;
mod store;
mod support;
