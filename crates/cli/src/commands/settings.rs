//! Options that say where a server's settings and data are; shared by every
//! command that works on them without a server.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use crate::commands::Context;
use crate::config::{self, Config, ConfigError, Environment, Given, Loaded};
use crate::data_dir::{self, Holder};

/// Where a server's settings and data are.
#[derive(Debug, Default, Args)]
pub(crate) struct PlaceArgs {
    /// Configuration file of the server
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Data directory of the server
    #[arg(long, value_name = "DIR")]
    pub(crate) data_dir: Option<PathBuf>,
}

/// Says which data directory a command without a server works on, where nobody
/// named one: the server that is meant may have another.
pub(crate) fn announce_data_dir(context: &Context, config: &Config, dir: &Path) {
    if config.top.data_dir.is_some() {
        return;
    }
    let used = match data_dir::holder(dir) {
        Some(Holder { pid: Some(pid) }) => format!("which the server with process {pid} uses"),
        Some(Holder { pid: None }) => "which a server uses".to_owned(),
        None => "which no server uses now".to_owned(),
    };
    context.output.note(&format!("data directory: {}, {used}; --data-dir or --config names another", dir.display()));
    if let Some(server) = &context.server {
        context.output.note(&format!("note: this works on files of this host, and does not ask the server {server}"));
    }
}

/// Settings that can be given on the command line, as `serve` takes them.
#[derive(Debug, Default, Args)]
pub(crate) struct SettingArgs {
    /// Configuration file
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Address to listen on; anything but loopback needs a key
    #[arg(long)]
    host: Option<String>,
    /// Port to listen on; 0 takes a free one
    #[arg(long)]
    port: Option<u16>,
    /// Directory of everything the server keeps
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// error, warn, info, debug or trace, or a filter such as info,stacyvm_engine=debug
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<String>,
    /// Form of the log
    #[arg(long, value_name = "FORMAT")]
    log_format: Option<LogFormatArg>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum LogFormatArg {
    Auto,
    Json,
    Pretty,
}

impl PlaceArgs {
    pub(crate) fn load(&self, environment: &Environment) -> Result<Loaded, ConfigError> {
        let given = self.data_dir.as_deref().map(given_data_dir);
        config::load_with(self.config.as_deref(), environment, given.as_slice())
    }

    /// [`Self::load`] for those who judge what they find.
    pub(crate) fn examine(&self, environment: &Environment) -> Result<Loaded, ConfigError> {
        let given = self.data_dir.as_deref().map(given_data_dir);
        config::examine(self.config.as_deref(), environment, given.as_slice())
    }

    /// The data directory that a server with these settings has. It need not
    /// exist.
    pub(crate) fn data_dir(loaded: &Loaded, environment: &Environment) -> anyhow::Result<PathBuf> {
        data_dir::resolve(loaded.config.top.data_dir.as_deref(), environment.home.as_deref())
    }
}

impl SettingArgs {
    /// The configuration with these options over it.
    pub(crate) fn load(&self, environment: &Environment) -> Result<Loaded, ConfigError> {
        config::load_with(self.config.as_deref(), environment, &self.given())
    }

    fn given(&self) -> Vec<Given> {
        let mut given = Vec::new();
        let mut add = |key, option, text: Option<String>| {
            given.extend(text.map(|text| Given { key, option, text }));
        };
        add("server.host", "--host", self.host.clone());
        add("server.port", "--port", self.port.map(|port| port.to_string()));
        add("logging.level", "--log-level", self.log_level.clone());
        let format = self.log_format.map(|format| match format {
            LogFormatArg::Auto => "auto",
            LogFormatArg::Json => "json",
            LogFormatArg::Pretty => "pretty",
        });
        add("logging.format", "--log-format", format.map(str::to_owned));
        given.extend(self.data_dir.as_deref().map(given_data_dir));
        given
    }
}

fn given_data_dir(path: &Path) -> Given {
    Given { key: "data_dir", option: "--data-dir", text: path.display().to_string() }
}
