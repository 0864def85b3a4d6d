//! `stacyvm key`: API keys, on a server or in the data directory of one that is
//! not running.

use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde_json::json;
use stacyvm_api::{ApiKey, ApiKeyQuery, ApiKeyRequest, CreatedApiKey, Duration, KeyRevokeQuery, KeyScope, OwnerId};
use stacyvm_client::Client;
use stacyvm_engine::{Keys, LastAdminKey, RevokedKeys};

use crate::commands::Context;
use crate::commands::serve::database;
use crate::config::{self, Environment};
use crate::data_dir::{self, DataDirLock};
use crate::failure::Advice;
use crate::output::{self, Output, print};

/// Who makes keys without a server, in the listing.
const OFFLINE: &str = "command_line";

/// Make, list and revoke API keys
///
/// Asks the server, which needs a key with the scope `admin`. With `--data-dir`
/// the keys are changed in place, without a server: that is how the first one
/// is made.
#[derive(Debug, Args)]
pub(crate) struct KeyArgs {
    #[command(subcommand)]
    command: KeyCommand,
    /// Data directory of a server that is not running
    #[arg(long, global = true, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Configuration file of that server
    #[arg(long, global = true, value_name = "FILE", requires = "data_dir")]
    config: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum KeyCommand {
    Create(CreateArgs),
    /// List keys, newest first
    #[command(
        visible_alias = "ls",
        after_help = "Examples:
  stacyvm key list
  stacyvm key list --revoked --json"
    )]
    List {
        /// Revoked keys too
        #[arg(long)]
        revoked: bool,
    },
    #[command(visible_alias = "rm")]
    Revoke(RevokeArgs),
}

/// Make a key and print it, this once
///
/// The key goes to standard output, what there is to know about it to standard
/// error. Scopes do not include each other: `read` looks, `api` changes, `admin`
/// makes keys and reads the audit log.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  stacyvm key create ci
  stacyvm key create dashboard --scope read --ttl 720h
  stacyvm key create alice --owner alice@example.com
  export STACYVM_API_KEY=$(stacyvm key create admin --scope read --scope api --scope admin --data-dir ./data)")]
struct CreateArgs {
    /// What to call it: letters, digits and . _ - @
    name: String,
    /// What it may do: read, api, admin (repeatable); read and api unless given
    #[arg(long, value_name = "SCOPE")]
    scope: Vec<KeyScope>,
    /// How long it is valid; until it is revoked unless given
    #[arg(long, value_name = "TIME")]
    ttl: Option<Duration>,
    /// Whom everything done with it is accounted to
    #[arg(long, value_name = "OWNER")]
    owner: Option<OwnerId>,
}

/// Revoke keys: they stop working at once, with what is under way
///
/// The last key with the scope `admin` is kept unless --force is given: without
/// it, keys can only be made in the data directory of the stopped server.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  stacyvm key revoke ci
  stacyvm key revoke key-7c1v8b3n5q6w4f9k2m0x")]
struct RevokeArgs {
    /// Names or ids
    #[arg(required = true, value_name = "KEY")]
    keys: Vec<String>,
    /// Also the last key that can make and revoke keys
    #[arg(long)]
    force: bool,
}

/// Where the keys are.
enum Place {
    Server(Client),
    /// The lock keeps servers away until the end.
    Directory {
        keys: Keys,
        administered: Administered,
        _lock: DataDirLock,
    },
}

/// Whether a configured key opens the admin routes of the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Administered {
    ByConfiguredKey,
    ByStoredKeysOnly,
}

pub(crate) async fn run(context: &Context, args: KeyArgs) -> anyhow::Result<()> {
    let place = match &args.data_dir {
        Some(dir) => Place::open(dir, args.config.as_deref()).await?,
        None => Place::Server(context.client()?),
    };
    let done = match args.command {
        KeyCommand::Create(args) => create(context.output, &place, args).await,
        KeyCommand::List { revoked } => {
            let keys = place.list(revoked).await;
            keys.and_then(|keys| context.output.show(&keys, |keys| table(context.output, keys)))
        }
        KeyCommand::Revoke(args) => {
            revoke(context.output, &place, &args.keys, KeyRevokeQuery { force: args.force }).await
        }
    };
    place.close().await?;
    done
}

async fn create(output: Output, place: &Place, args: CreateArgs) -> anyhow::Result<()> {
    let request = ApiKeyRequest {
        name: args.name,
        scopes: (!args.scope.is_empty()).then_some(args.scope),
        ttl: args.ttl,
        owner_id: args.owner,
    };
    let CreatedApiKey { about, key } = &place.create(request).await?;
    if output.is_json() {
        return output::json_line(&CreatedApiKey { about: about.clone(), key: key.clone() });
    }
    print(&format!("{key}\n"))?;
    let expires =
        about.expires_at.map_or_else(|| "never expires".to_owned(), |at| format!("expires {}", output::relative(at)));
    output.note(&format!("made key {} ({}), {}, {expires}; it is shown only now", about.name, about.id, scopes(about)));
    // Where it went into a variable or a file, it is not written a second time.
    let shown = if std::io::stdout().is_terminal() { key } else { "<the key>" };
    output.note(&format!("use it: export STACYVM_API_KEY={shown}"));
    Ok(())
}

async fn revoke(output: Output, place: &Place, wanted: &[String], query: KeyRevokeQuery) -> anyhow::Result<()> {
    let keys = place.list(false).await?;
    let mut found = Vec::with_capacity(wanted.len());
    for text in wanted {
        let key = keys.iter().find(|key| key.name == *text || key.id.as_str() == text);
        // It may be a key itself, which is not repeated.
        found.push(key.ok_or_else(|| {
            Advice::new("there is no valid key of such a name or id", "`stacyvm key list` shows the names")
        })?);
    }
    for key in found {
        place.revoke(key, &query).await?;
        output.show(&json!({ "revoked": key.id }), |_| format!("revoked {}\n", key.name))?;
    }
    Ok(())
}

impl Place {
    async fn open(dir: &Path, config: Option<&Path>) -> anyhow::Result<Self> {
        let environment = Environment::of_this_process();
        let config = config::load(config, &environment)?.config;
        let dir = data_dir::resolve(Some(dir), environment.home.as_deref())?;
        data_dir::create(&dir)?;
        let lock = DataDirLock::take(&dir)?;
        let auth = &config.auth;
        let configured = auth.admin_api_key.is_some() || (auth.api_key.is_some() && auth.admin_fallback_enabled);
        let administered = if configured { Administered::ByConfiguredKey } else { Administered::ByStoredKeysOnly };
        let keys = Keys::open(&database(&config, &dir)).await?;
        Ok(Self::Directory { keys, administered, _lock: lock })
    }

    async fn create(&self, request: ApiKeyRequest) -> anyhow::Result<CreatedApiKey> {
        match self {
            Self::Server(client) => Ok(client.create_key(&request).await?),
            Self::Directory { keys, administered, .. } => {
                let administers = request.scopes.as_ref().is_some_and(|scopes| scopes.contains(&KeyScope::Admin));
                let alone = *administered == Administered::ByStoredKeysOnly && !keys.any_usable(Some(KeyScope::Admin));
                if alone && !administers {
                    let hint = "add `--scope admin`, or make a key for administration first";
                    return Err(Advice::new("the first key must have the scope admin", hint).into());
                }
                Ok(keys.create(OFFLINE, request).await?)
            }
        }
    }

    async fn list(&self, revoked: bool) -> anyhow::Result<Vec<ApiKey>> {
        match self {
            Self::Server(client) => Ok(client.keys(&ApiKeyQuery { revoked }).await?),
            Self::Directory { keys, .. } => {
                Ok(keys.list(if revoked { RevokedKeys::Included } else { RevokedKeys::LeftOut }).await?)
            }
        }
    }

    async fn revoke(&self, key: &ApiKey, query: &KeyRevokeQuery) -> anyhow::Result<()> {
        match self {
            Self::Server(client) => Ok(client.revoke_key(&key.id, query).await?),
            Self::Directory { keys, administered, .. } => {
                let may_go = query.force || *administered == Administered::ByConfiguredKey;
                let last_admin = if may_go { LastAdminKey::Revoked } else { LastAdminKey::Kept };
                Ok(keys.revoke(&key.id, last_admin).await?)
            }
        }
    }

    async fn close(self) -> anyhow::Result<()> {
        match self {
            Self::Server(_) => Ok(()),
            Self::Directory { keys, .. } => Ok(keys.close().await?),
        }
    }
}

fn table(output: Output, keys: &[ApiKey]) -> String {
    if keys.is_empty() {
        return "no keys\n".to_owned();
    }
    let ago = |at: Option<stacyvm_api::Timestamp>, none: &str| at.map_or_else(|| none.to_owned(), output::relative);
    let rows = keys.iter().map(|key| {
        let ends = match (key.revoked_at, key.expires_at) {
            (Some(at), _) => format!("revoked {}", output::relative(at)),
            (None, ends) => ago(ends, "never"),
        };
        vec![
            key.id.to_string(),
            key.name.clone(),
            format!("{}…", key.prefix),
            scopes(key),
            key.owner_id.as_ref().map_or_else(|| "-".to_owned(), ToString::to_string),
            output::relative(key.created_at),
            ago(key.last_used_at, "never"),
            ends,
        ]
    });
    output.table(&["ID", "NAME", "KEY", "SCOPES", "OWNER", "CREATED", "USED", "EXPIRES"], rows.collect())
}

fn scopes(key: &ApiKey) -> String {
    key.scopes.iter().map(|scope| scope.as_str()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(name: &str, scopes: &[KeyScope]) -> ApiKeyRequest {
        ApiKeyRequest { name: name.to_owned(), scopes: Some(scopes.to_vec()), ..ApiKeyRequest::default() }
    }

    #[tokio::test]
    async fn keys_are_made_and_revoked_without_a_server() {
        let dir = tempfile::tempdir().unwrap();
        let place = Place::open(dir.path(), None).await.unwrap();
        let early = place.create(request("ci", &[KeyScope::Read])).await.unwrap_err();
        assert!(early.to_string().contains("scope admin"), "{early}");
        let made = place.create(request("root", &[KeyScope::Admin])).await.unwrap();
        place.create(request("ci", &[KeyScope::Read])).await.unwrap();
        let second = Place::open(dir.path(), None).await.err().expect("one at a time");
        assert!(second.to_string().contains("uses the data directory"), "{second}");

        let output = Output::new(crate::output::Form::Human);
        let (root, force) = (["root".to_owned()], KeyRevokeQuery { force: true });
        let kept = revoke(output, &place, &root, KeyRevokeQuery::default()).await.unwrap_err();
        assert!(kept.to_string().contains("last key"), "{kept}");
        revoke(output, &place, &root, force.clone()).await.unwrap();
        let error = revoke(output, &place, std::slice::from_ref(&made.key), force).await.unwrap_err();
        assert!(!crate::failure::Report::new(&error).text().contains(&made.key[4..]), "a key is not repeated");
        let names: Vec<_> = place.list(false).await.unwrap().into_iter().map(|key| key.name).collect();
        assert_eq!(names, ["ci"]);
        place.close().await.unwrap();

        let place = Place::open(dir.path(), None).await.unwrap();
        assert_eq!(place.list(true).await.unwrap().len(), 2, "it is kept");
    }
}
