//! The server that is asked: one of our own, which can be restarted and broken,
//! or one that somebody else runs.

mod faulty;
mod own;

use std::time::Duration;

use stacyvm_client::{Client, ClientOptions};
use tokio_util::sync::CancellationToken;

pub(crate) use faulty::{Call, Fault, FaultyBackend, LEAK};
pub(crate) use own::OwnServer;

use crate::host::{run, tail};
use crate::{CertifyOptions, Target};

/// How long a server may take to be ready.
pub(crate) const START_LIMIT: Duration = Duration::from_mins(2);

/// How long a server that answers may say that it is not ready: a runtime that
/// is not there does not come by waiting.
const NOT_READY_LIMIT: Duration = Duration::from_secs(30);
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// A server that answers.
pub(crate) enum Subject {
    Own(Box<OwnServer>),
    Given { client: Client, url: String, api_key: Option<String>, restart: Option<String> },
}

impl Subject {
    /// Starts one, or reaches the given one. Says why not.
    pub(crate) async fn open(
        target: Target,
        options: &CertifyOptions,
        stop: &CancellationToken,
    ) -> Result<Self, String> {
        let Some(given) = &options.given else {
            return Ok(Self::Own(Box::new(OwnServer::start(target, options, stop).await?)));
        };
        let client = ClientOptions { api_key: given.api_key.clone(), ..ClientOptions::new(given.url.clone()) };
        let client = Client::new(&client).map_err(|error| error.to_string())?;
        client.live().await.map_err(|error| chain(&error))?;
        Ok(Self::Given {
            client,
            url: given.url.trim_end_matches('/').to_owned(),
            api_key: given.api_key.clone(),
            restart: options.restart_command.clone(),
        })
    }

    pub(crate) fn client(&self) -> Client {
        match self {
            Self::Own(server) => server.client.clone(),
            Self::Given { client, .. } => client.clone(),
        }
    }

    pub(crate) fn url(&self) -> &str {
        match self {
            Self::Own(server) => &server.url,
            Self::Given { url, .. } => url,
        }
    }

    pub(crate) fn api_key(&self) -> Option<&str> {
        match self {
            Self::Own(server) => Some(&server.api_key),
            Self::Given { api_key, .. } => api_key.as_deref(),
        }
    }

    pub(crate) fn own(&mut self) -> Option<&mut OwnServer> {
        match self {
            Self::Own(server) => Some(server),
            Self::Given { .. } => None,
        }
    }

    /// Restarts it and waits until it is ready; `None` where nobody said how.
    pub(crate) async fn restart(&mut self) -> Option<Result<(), String>> {
        match self {
            Self::Own(server) => {
                server.kill().await;
                Some(server.start_again().await)
            }
            Self::Given { client, restart, .. } => {
                let command = restart.as_ref()?;
                Some(restart_given(command, client).await)
            }
        }
    }

    /// Ends our own server; what it left, or said that is worth knowing.
    pub(crate) async fn close(self) -> Closed {
        match self {
            Self::Own(server) => server.close().await,
            Self::Given { .. } => Closed::default(),
        }
    }
}

/// What is known once our server has ended.
#[derive(Debug, Default)]
pub(crate) struct Closed {
    pub(crate) log: Option<String>,
    /// What it left on the host.
    pub(crate) left: Vec<String>,
}

async fn restart_given(command: &str, client: &Client) -> Result<(), String> {
    let mut shell = tokio::process::Command::new("sh");
    let ran = run(shell.args(["-c", command]), START_LIMIT).await?;
    if !ran.success {
        return Err(format!("`{command}` failed: {}", tail(&ran.output)));
    }
    wait_until_ready(client, || None).await
}

/// Waits until the server says that it is ready. `ended` says whether waiting
/// is pointless.
pub(crate) async fn wait_until_ready(client: &Client, mut ended: impl FnMut() -> Option<String>) -> Result<(), String> {
    let end = tokio::time::Instant::now() + START_LIMIT;
    let mut answered = None;
    loop {
        let why = match client.ready().await {
            Ok(readiness) if readiness.status == "ready" => return Ok(()),
            Ok(readiness) => {
                answered.get_or_insert_with(tokio::time::Instant::now);
                let error = readiness.providers.iter().find_map(|provider| provider.error.clone());
                format!("{}: {}", readiness.status, error.unwrap_or_default())
            }
            Err(error) => chain(&error),
        };
        if let Some(ended) = ended() {
            return Err(ended);
        }
        if answered.is_some_and(|since| since.elapsed() >= NOT_READY_LIMIT) {
            return Err(format!("not ready after {NOT_READY_LIMIT:?}: {why}"));
        }
        if tokio::time::Instant::now() >= end {
            return Err(format!("not ready after {START_LIMIT:?}: {why}"));
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// An error with its causes in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let said = inner.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        cause = inner.source();
    }
    text
}
