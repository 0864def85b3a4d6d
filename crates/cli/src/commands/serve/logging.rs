//! The server's log, on standard error.

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;

use crate::config::LogFormat;
use crate::config::Logging;
use crate::failure::Advice;

/// From here on events are logged.
pub(super) fn start(settings: &Logging) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&settings.level).map_err(|error| {
        Advice::new(
            format!("`{}` is not a log level: {error}", settings.level),
            "use error, warn, info, debug or trace",
        )
    })?;
    let pretty = match settings.format {
        LogFormat::Auto => std::io::stderr().is_terminal(),
        LogFormat::Json => false,
        LogFormat::Pretty => true,
    };
    let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // It fails only when a log was started before, and then there is one.
    let _ = if pretty {
        builder.with_ansi(colours).with_target(false).try_init()
    } else {
        builder.json().flatten_event(true).try_init()
    };
    Ok(())
}
