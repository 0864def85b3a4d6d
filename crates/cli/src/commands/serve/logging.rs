//! The server's log, on standard error.

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

use crate::config::LogFormat;
use crate::config::Logging;
use crate::failure::Advice;

/// What to write instead of what is none.
pub(crate) const FILTERS: &str = "use error, warn, info, debug or trace, or a filter such as info,stacyvm_engine=debug";

/// From here on events are logged.
pub(crate) fn start(settings: &Logging) -> anyhow::Result<()> {
    let filter = filter(&settings.level).map_err(|why| Advice::new(why, FILTERS))?;
    let pretty = match settings.format {
        LogFormat::Auto => std::io::stderr().is_terminal(),
        LogFormat::Json => false,
        LogFormat::Pretty => true,
    };
    let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    // By itself the library says on standard error what it cannot write there,
    // and panics when that fails too: a server outlives whoever read its log.
    let builder =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).log_internal_errors(false);
    // It fails only when a log was started before, and then there is one.
    let _ = if pretty {
        builder.with_ansi(colours).with_target(false).try_init()
    } else {
        builder.json().flatten_event(true).try_init()
    };
    Ok(())
}

/// A word alone would mean everything of the crate of that name, and so turn
/// off all there is: here it is a level.
pub(crate) fn filter(level: &str) -> Result<EnvFilter, String> {
    let words = level.split(',').map(str::trim);
    // The library takes a blank for `error`.
    let is_level = |word: &&str| !word.is_empty() && word.parse::<LevelFilter>().is_ok();
    let unknown = words.filter(|word| !word.contains(['=', '['])).find(|word| !is_level(word));
    match (unknown, EnvFilter::try_new(level)) {
        (None, Ok(filter)) => Ok(filter),
        (Some(word), _) => Err(format!("`{word}` is not a log level")),
        (None, Err(error)) => Err(format!("`{level}` is not a log filter: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_and_filters_are_understood_and_slips_are_not() {
        for good in ["info", "WARN", "off", "info,stacyvm_engine=debug", "stacyvm_engine=debug, warn"] {
            assert!(filter(good).is_ok(), "{good}");
        }
        for bad in ["loud", "", "info,stacyvm_engine", "stacyvm_engine=loud", "info,"] {
            let error = filter(bad).unwrap_err();
            assert!(error.contains("is not a log"), "{bad}: {error}");
        }
    }
}
