//! The process that forks sandboxes, and the server's side of it.
//!
//! ```text
//!   server (many threads) ── SEQPACKET, JSON + descriptors ── spawner (one thread)
//!                                                               │ clone3
//!                                                               ▼
//!                                                    init of one sandbox ─ exec ─ agent
//! ```

mod client;
mod main;
mod packet;
pub(super) mod protocol;

pub use client::SpawnerCommand;
pub(super) use client::{CallError, Spawner};
pub use main::spawner_main;
