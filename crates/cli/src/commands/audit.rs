//! `stacyvm audit`: who changed what, and who was refused.

use clap::Args;
use stacyvm_api::{AuditQuery, AuditRecord};

use crate::commands::Context;
use crate::output::{self, Output, print};

/// Show the audit log, newest first
///
/// Every change and every refusal, with who made it. Needs a key with the scope
/// `admin`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  stacyvm audit
  stacyvm audit --actor key:ci --method DELETE
  stacyvm audit --status 401 --limit 500 --csv > refused.csv")]
pub(crate) struct AuditArgs {
    /// Calls at most: 1 to 500
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=500))]
    limit: u64,
    /// Only those of this caller: key:NAME, api_key, admin_key, anonymous
    #[arg(long)]
    actor: Option<String>,
    /// Only those with this method
    #[arg(long)]
    method: Option<String>,
    /// Only those with this text in the path
    #[arg(long)]
    path: Option<String>,
    /// Only those with this status: 100 to 599
    #[arg(long, value_parser = clap::value_parser!(u32).range(100..=599))]
    status: Option<u32>,
    /// Print a table for spreadsheets instead
    #[arg(long)]
    csv: bool,
}

pub(crate) async fn run(context: &Context, args: AuditArgs) -> anyhow::Result<()> {
    let query = AuditQuery {
        limit: Some(args.limit),
        actor: args.actor,
        method: args.method,
        path: args.path,
        status: args.status,
        ..AuditQuery::default()
    };
    let client = context.client()?;
    if args.csv {
        return print(&client.audit_csv(&query).await?);
    }
    let records = client.audit(&query).await?.items;
    context.output.show(&records, |records| table(context.output, records))
}

fn table(output: Output, records: &[AuditRecord]) -> String {
    if records.is_empty() {
        return "no calls\n".to_owned();
    }
    let rows = records.iter().map(|record| {
        vec![
            output::relative(record.created_at),
            record.actor.clone(),
            record.remote_addr.clone(),
            record.method.clone(),
            record.path.clone(),
            record.status.to_string(),
            record.request_id.clone(),
        ]
    });
    output.table(&["WHEN", "WHO", "FROM", "METHOD", "PATH", "STATUS", "REQUEST"], rows.collect())
}
