//! Gathering what goes into a bundle; what cannot be gathered is listed.

use std::time::Duration;

use serde::Serialize;
use stacyvm_api::Timestamp;
use stacyvm_client::ClientError;
use stacyvm_engine::StoreFile;

use super::facts::{CheckFact, HostFact, Missing, Origin, ProblemFact, ServerFact, SettingFact, StoreFact};
use super::facts::{checks, problems};
use crate::check::Strictness;
use crate::commands::serve::database;
use crate::commands::settings::PlaceArgs;
use crate::commands::version::BUILD;
use crate::commands::{Context, doctor};
use crate::config::{self, Environment, Loaded};

/// How long a running server may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// The file's content.
#[derive(Debug, Serialize)]
pub(super) struct Bundle {
    #[serde(flatten)]
    origin: Origin,
    runtime: HostFact,
    config: Vec<SettingFact>,
    config_problems: Vec<ProblemFact>,
    config_lint: Vec<CheckFact>,
    doctor: Vec<CheckFact>,
    #[serde(skip_serializing_if = "Option::is_none")]
    store: Option<StoreFact>,
    #[serde(skip_serializing_if = "Option::is_none")]
    server: Option<ServerFact>,
    collection_errors: Vec<Missing>,
    /// How secrets were kept out, for whoever reads it.
    redactions: &'static str,
}

const REDACTIONS: &str = "by allow-list: numbers, switches, durations and words of the program itself; no text that \
                          anybody wrote";

impl Bundle {
    /// What could not be gathered.
    pub(super) fn missing(&self) -> &[Missing] {
        &self.collection_errors
    }
}

pub(super) async fn gather(context: &Context, place: &PlaceArgs, now: Timestamp) -> Bundle {
    let environment = Environment::of_this_process();
    let loaded = place.load(&environment);
    let mut missing = Vec::new();
    let doctor = if let Ok(diagnosis) = doctor::diagnose(context, &loaded, &environment, Strictness::Production).await {
        checks(diagnosis.checks)
    } else {
        missing.push(Missing { what: "doctor", why: "there is no data directory, or no server address" });
        Vec::new()
    };
    let store = match &loaded {
        Ok(loaded) => {
            store(loaded, &environment).await.map_err(|why| missing.push(Missing { what: "store", why })).ok()
        }
        Err(_) => None,
    };
    let server = server(context).await.map_err(|why| missing.push(Missing { what: "server", why })).ok();
    Bundle {
        origin: Origin { generated_at: now, version: BUILD.version, commit: BUILD.commit },
        runtime: HostFact::of_this(),
        config: loaded.iter().flat_map(|loaded| loaded.settings.iter()).map(SettingFact::new).collect(),
        config_problems: loaded.as_ref().err().map(problems).unwrap_or_default(),
        config_lint: checks(config::lint(&loaded, Strictness::Production)),
        doctor,
        store,
        server,
        collection_errors: missing,
        redactions: REDACTIONS,
    }
}

async fn store(loaded: &Loaded, environment: &Environment) -> Result<StoreFact, &'static str> {
    let dir = PlaceArgs::data_dir(loaded, environment).map_err(|_| "there is no data directory")?;
    let file = StoreFile::new(database(&loaded.config, &dir));
    if !file.path().is_file() {
        return Err("there is none yet");
    }
    let unreadable = "it cannot be read";
    let is_whole = file.damages().await.map_err(|_| unreadable)?.is_empty();
    let migrations = file.migrations().await.map_err(|_| unreadable)?;
    let statistics = file.statistics().await.map_err(|_| unreadable)?;
    Ok(StoreFact::new(statistics, &migrations, is_whole))
}

async fn server(context: &Context) -> Result<ServerFact, &'static str> {
    let client = context.client().map_err(|_| "its address cannot be used")?;
    match tokio::time::timeout(ANSWER_LIMIT, client.ready()).await {
        Ok(Ok(readiness)) => Ok(ServerFact::new(&readiness)),
        Ok(Err(ClientError::Api(_))) => Err("it refuses to say"),
        Ok(Err(_)) => Err("none answers"),
        Err(_) => Err("it does not answer in time"),
    }
}
