//! Evidence that a runtime on a host is fit for production.
//!
//! An operator names a target; every row of the published matrix that is about
//! it is looked at and lands in a report, which is text, JSON or Markdown, has a
//! sign-off section and a hash.
//!
//! ```text
//! Target ─► rows it has to pass ─┐
//! host checks, settings ─────────┼─► Run ─► Report ─► text, JSON, Markdown ─► verify
//! a server of our own, or a URL ─┘    └► files beside it (contract suite, smoke, log)
//! ```
//!
//! Three rules keep it honest. A row that nobody looked at is `UNAVAILABLE`, and
//! a report with one is no pass. What proves which runtime made a sandbox is
//! looked at from inside and outside, so that runc is never certified as gVisor.
//! And what this version cannot run is said plainly, with the host's part of it
//! still checked.
//!
//! `target` says what there is, `row` what it has to pass, `rows` how each row is
//! looked at, `server` what is asked, `host` what is looked at beside it,
//! `report` what comes out.

mod host;
mod options;
mod report;
mod row;
mod rows;
mod run;
mod server;
mod target;

pub use options::{CertifyOptions, GivenServer, HostCheck, KeySource, RuntimeSettings};
pub use report::{
    Attachment, Format, HostFacts, Measured, Outcome, Report, Signoff, Status, VerifyError, verify, verify_attachments,
};
pub use row::{Kind, Row, rows_of};
pub use run::{Certified, Observer, certify};
pub use target::Target;
