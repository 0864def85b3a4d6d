//! The contract every runtime has to pass.
//!
//! One list of checks, each with an id, that asserts on content. The same
//! checks run against a provider in this process ([`ProviderTarget`]) and
//! against a running server over its REST API ([`ServerTarget`]); both hand out
//! [`stacyvm_sandbox::Session`]s, so that no check knows which one it talks to.
//!
//! ```text
//! run(target, options) ─► for each check: Context ─► Target ─► Session
//!                                          │ frees what the check made
//!                                          └► CheckReport ─► Report ─► text, JSON, JUnit, Markdown
//! ```
//!
//! A check passes, fails, or is skipped; it is skipped only when the target
//! itself says that it lacks what the check needs. Checks use `sh` and the
//! applets of busybox, nothing else: that is what `alpine:latest` has.

mod census;
mod check;
mod checks;
mod context;
mod output;
mod pattern;
mod render;
mod report;
mod suite;
mod target;

pub use census::{Census, CensusScope, processes as census_processes};
pub use check::{Ability, Check, Checked, Failure};
pub use checks::all as checks;
pub use context::{Context, Subject};
pub use render::{Format, escaped_markdown};
pub use report::{CheckReport, Report, Status, Summary};
pub use suite::{Observer, RunOptions, SelectError, run};
pub use target::{Order, ProviderTarget, SandboxView, ServerTarget, Target, TargetError, lack_of};
