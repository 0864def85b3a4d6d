//! The engine over the mock provider: whole lives of sandboxes, with crashes
//! and failures in between.

mod access;
mod ends;
mod events;
mod execs;
mod harness;
mod life;
mod limits;
mod ports;
mod recovery;
mod templates;
