//! Sandboxes started by another program: `runc`, `crun`, or whatever else
//! follows the OCI runtime specification.
//!
//! Only the launch is another one. Files, uids, network, groups, disk, agent and
//! record are what they are with the built-in launcher, and so are `create` and
//! `destroy` around them:
//!
//! ```text
//!  spawner ──fork──▶ stage (its own mount namespace)
//!                      tree of files ─ devices ─ names for the namespaces ─ config.json
//!                      ─ RUNTIME create ─ is it where it should be? ─ RUNTIME start ─ the agent runs
//!                      ─ init.json ─ (ends, and its mounts with it)
//! ```
//!
//! What the runtime itself keeps is in the sandbox's own directory. A sandbox is
//! ended by us, by its first process, whatever its runtime is or has become;
//! then the runtime is told to delete what it remembers.
//!
//! `binary` finds the program and refuses what cannot serve, `bundle` says what
//! it is told, `command` runs it, `launch` is the stage, `hierarchies` are the
//! control groups that such programs make besides ours.

mod binary;
mod bundle;
mod command;
mod hierarchies;
mod launch;

pub(super) use binary::Binary;
pub(super) use command::{Container, forget};
pub(super) use hierarchies::Hierarchies;
pub(super) use launch::launch;
