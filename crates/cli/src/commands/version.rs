//! `stacyvm version`: of this program, and of the server where one answers.

use std::fmt::Write as _;

use clap::Args;
use serde::Serialize;
use stacyvm_api::Version;

use crate::commands::Context;

/// Show the version of this program and of the server
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  stacyvm version
  stacyvm version --json | jq -r .client.version")]
pub(crate) struct VersionArgs {}

#[derive(Debug, Serialize)]
struct Versions {
    client: Version,
    #[serde(skip_serializing_if = "Option::is_none")]
    server: Option<Version>,
}

pub(crate) async fn run(context: &Context, VersionArgs {}: &VersionArgs) -> anyhow::Result<()> {
    // A server is not needed to know one's own version.
    let server = context.client()?.version().await.ok();
    let versions = Versions { client: this(), server };
    context.output.show(&versions, |Versions { client, server }| {
        let mut page =
            format!("stacyvm {} ({}/{}, commit {})\n", client.version, client.os, client.arch, client.commit);
        if let Some(server) = server {
            let _ =
                writeln!(page, "server  {} ({}/{}, commit {})", server.version, server.os, server.arch, server.commit);
        }
        page
    })
}

/// Words of the build, known when it was made.
pub(crate) struct Build {
    pub(crate) version: &'static str,
    pub(crate) commit: &'static str,
}

pub(crate) const BUILD: Build = Build {
    version: env!("CARGO_PKG_VERSION"),
    commit: match option_env!("STACYVM_BUILD_COMMIT") {
        Some(commit) => commit,
        None => "unknown",
    },
};

/// What this binary is.
pub(crate) fn this() -> Version {
    Version {
        version: BUILD.version.to_owned(),
        commit: BUILD.commit.to_owned(),
        os: std::env::consts::OS.to_owned(),
        arch: std::env::consts::ARCH.to_owned(),
        envd_version: stacyvm_envd::ENVD_VERSION.to_owned(),
    }
}
