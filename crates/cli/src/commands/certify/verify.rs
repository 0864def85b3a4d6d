//! `stacyvm certify verify`: is a report as it was made, and not too old?

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Args;
use serde_json::json;
use stacyvm_api::{Duration, Timestamp};

use crate::commands::Context;
use crate::config;
use crate::failure::Advice;

/// Check that a report was not changed, and is not too old
///
/// Looks at its hash, its age, and the hashes of the files beside it. What is
/// filled in by hand at its end is no change. The hash shows accidents and
/// edits in passing; it is no signature.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  stacyvm certify verify certification/oci.md
  stacyvm certify verify certification/oci.json --max-age 720h --json")]
pub(crate) struct VerifyArgs {
    /// Report of any format
    report: PathBuf,
    /// Longest time since it was made
    #[arg(long, value_name = "TIME", default_value = "2160h")]
    max_age: Duration,
}

/// A report has tens of thousands.
const MAX_REPORT_BYTES: u64 = 16 << 20;

pub(super) fn run(context: &Context, args: &VerifyArgs) -> anyhow::Result<ExitCode> {
    let path = &args.report;
    let text =
        config::read_small_file(path, MAX_REPORT_BYTES).with_context(|| format!("cannot read {}", path.display()))?;
    let again = "certify again: stacyvm certify TARGET --output PATH";
    let refuse = |error: stacyvm_certify::VerifyError| Advice::new(format!("{}: {error}", path.display()), again);
    let made = stacyvm_certify::verify(&text, args.max_age.get(), Timestamp::now()).map_err(refuse)?;
    let directory = path.parent().unwrap_or(Path::new("."));
    let files = stacyvm_certify::verify_attachments(&text, directory).map_err(refuse)?;
    let page = json!({ "generated_at": made, "attachments": files, "unchanged": true });
    context.output.show(&page, |_| {
        format!("{} is as it was made at {made}, and so are {files} files beside it\n", path.display())
    })?;
    Ok(ExitCode::SUCCESS)
}
