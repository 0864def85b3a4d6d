//! `stacyvm backend`: a runtime of this machine for a StacyVM elsewhere.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use serde_json::json;
use stacyvm_backend::{Backend, BackendError, BackendOptions};
use stacyvm_providers::proot::Permission;
use stacyvm_sandbox::Provider;

use crate::commands::Context;
use crate::commands::serve::{
    Chosen, Signals, default_kind, is_custom, is_known, logging, open_one, open_providers, raise_open_files,
};
use crate::config::{self, Config, Environment, MAX_KEY_FILE_BYTES, read_small_file};
use crate::data_dir::{self, DataDirLock};
use crate::failure::Advice;
use crate::output::announce;

/// The key's variable: a key on the command line would be seen by everybody.
pub(crate) const KEY_VARIABLE: &str = "STACYVM_BACKEND_KEY";

/// Offer this machine's runtime to a StacyVM elsewhere
#[derive(Debug, Args)]
pub(crate) struct BackendArgs {
    #[command(subcommand)]
    command: BackendCommand,
}

#[derive(Debug, Subcommand)]
enum BackendCommand {
    Serve(ServeArgs),
}

/// Serve a runtime over the protocol of the provider `custom`
///
/// Another machine's `stacyvm serve` uses it with providers.custom.base_url and
/// providers.custom.api_key_file. It is that server's users and limits that
/// count: whoever has the key can do everything here that the runtime can. Put
/// TLS in front of it on a network that is not yours.
///
/// The key is that of --key-file or STACYVM_BACKEND_KEY. Only loopback is
/// listened on without one.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  stacyvm backend serve --listen 0.0.0.0:7425 --key-file /etc/stacyvm/backend.key
  stacyvm backend serve --provider mock")]
struct ServeArgs {
    /// Address or name, and port, to listen on; port 0 takes a free one
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:7425", value_parser = listen_address)]
    listen: SocketAddr,
    /// Provider to serve; the server's default unless given
    #[arg(long)]
    provider: Option<String>,
    /// File that holds the key that callers need
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,
    /// Configuration file, for the provider's settings
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Directory of everything that is kept; not that of a server
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
}

pub(crate) async fn run(context: &Context, args: BackendArgs) -> anyhow::Result<()> {
    let BackendCommand::Serve(args) = args.command;
    let environment = Environment::of_this_process();
    let config = config::load(args.config.as_deref(), &environment)?.config;
    local(args.provider.as_deref(), &config)?;
    logging::start(&config.logging)?;
    raise_open_files();
    let key = key(args.key_file.as_deref(), &environment)?;
    let chosen = args.data_dir.as_deref().or(config.top.data_dir.as_deref());
    let dir = data_dir::resolve(chosen, environment.home.as_deref())?;
    data_dir::create(&dir)?;
    let _lock = DataDirLock::take(&dir)?;
    let secret = data_dir::server_secret(&dir)?;
    let mut signals = Signals::listen()?;
    let shared_network = if key.is_some() { Permission::given() } else { Permission::default() };
    let provider = open(args.provider.as_deref(), &config, &dir, &environment, &shared_network).await?;
    let options = BackendOptions { key, secret, lifetime: config.defaults.ttl.get() };
    let served = serve(context, args.listen, Arc::clone(&provider), options, &mut signals).await;
    provider.shutdown().await;
    served
}

async fn serve(
    context: &Context,
    listen: SocketAddr,
    provider: Arc<dyn Provider>,
    options: BackendOptions,
    signals: &mut Signals,
) -> anyhow::Result<()> {
    let wants_key = options.key.is_some();
    let backend = match Backend::bind(listen, Arc::clone(&provider), options).await {
        Err(error @ BackendError::Open(_)) => {
            let fix = format!("write a key into a file and pass --key-file, or set {KEY_VARIABLE}");
            return Err(Advice::new(error.to_string(), fix).into());
        }
        bound => bound?,
    };
    let url = format!("http://{}", backend.address());
    if context.output.is_json() {
        let line = json!({ "listening": url, "provider": provider.name(), "auth": wants_key });
        announce(&format!("{line}\n"));
    } else {
        let callers = if wants_key { "callers need the key" } else { "no key needed, only this machine may call" };
        announce(&format!("StacyVM backend listens on {url}, provider {}, {callers}\n", provider.name()));
    }
    backend.serve(signals.first()).await?;
    Ok(())
}

async fn open(
    wanted: Option<&str>,
    config: &Config,
    dir: &Path,
    environment: &Environment,
    shared_network: &Permission,
) -> anyhow::Result<Arc<dyn Provider>> {
    if let Some(name) = wanted {
        return open_one(name, config, dir, environment, shared_network).await;
    }
    let Chosen { all, default, .. } = open_providers(config, dir, environment, shared_network.clone()).await?;
    let (mut served, others): (Vec<_>, Vec<_>) = all.into_iter().partition(|provider| provider.name() == default);
    for other in others {
        other.shutdown().await;
    }
    served.pop().context("the default provider is not there")
}

/// What a backend serves is of this machine: with the settings of a server that
/// uses a backend it would serve that one, and most likely itself.
fn local(wanted: Option<&str>, config: &Config) -> anyhow::Result<()> {
    const FIX: &str = "name a runtime of this machine: --provider oci, docker, proot or mock";
    if let Some(name) = wanted.filter(|name| !is_known(config, name)) {
        return Err(Advice::new(format!("there is no provider `{name}`"), FIX).into());
    }
    let (is_custom, whence) = match wanted {
        Some(name) => (is_custom(config, name), "--provider"),
        None => {
            (default_kind(config) == Some("custom"), "the default provider (STACYVM_PROVIDERS_DEFAULT, or the file)")
        }
    };
    if !is_custom {
        return Ok(());
    }
    let message = format!("{whence} is custom, which is another machine's runtime: a backend would serve itself");
    Err(Advice::new(message, FIX).into())
}

/// A name stands for the first address that it has.
fn listen_address(text: &str) -> Result<SocketAddr, String> {
    if let Ok(address) = text.parse() {
        return Ok(address);
    }
    if text.parse::<IpAddr>().is_ok_and(|address| address.is_ipv6()) {
        return Err(format!("the port is missing: write [{text}]:7425"));
    }
    let Some((host, port)) = text.rsplit_once(':') else {
        return Err(format!("the port is missing: write {text}:7425"));
    };
    let port: u16 = port.parse().map_err(|_| format!("`{port}` is not a port: write 0 to 65535"))?;
    if host.is_empty() {
        return Err(format!("the address is missing: write 127.0.0.1:{port}, or 0.0.0.0:{port} for every address"));
    }
    let mut addresses = (host, port).to_socket_addrs().map_err(|_| format!("the name {host} has no address here"))?;
    addresses.next().ok_or_else(|| format!("the name {host} has no address here"))
}

fn key(file: Option<&Path>, environment: &Environment) -> anyhow::Result<Option<String>> {
    let given = environment.get(KEY_VARIABLE).map(str::to_owned);
    let Some(path) = file else { return Ok(given.map(|key| key.trim().to_owned()).filter(|key| !key.is_empty())) };
    let text = read_small_file(path, MAX_KEY_FILE_BYTES).with_context(|| format!("cannot read {}", path.display()))?;
    let key = text.trim();
    if key.is_empty() {
        return Err(Advice::new(format!("{} is empty", path.display()), "write the key into it").into());
    }
    Ok(Some(key.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_address_lacks_is_named() {
        for (text, expected) in [("127.0.0.1:80", "127.0.0.1:80"), ("[::1]:0", "[::1]:0")] {
            assert_eq!(listen_address(text).unwrap().to_string(), expected);
        }
        assert!(listen_address("localhost:80").unwrap().ip().is_loopback());
        for (text, said) in [
            ("localhost", "write localhost:7425"),
            ("10.0.0.1", "write 10.0.0.1:7425"),
            ("::1", "write [::1]:7425"),
            (":80", "write 127.0.0.1:80"),
            ("localhost:x", "`x` is not a port"),
            ("localhost:70000", "`70000` is not a port"),
        ] {
            let refused = listen_address(text).unwrap_err();
            assert!(refused.contains(said), "{text}: {refused}");
        }
    }
}
