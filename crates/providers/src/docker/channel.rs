//! The way to one sandbox's agent: its own socket where that can be reached,
//! the bridge everywhere else.

use std::io;
use std::sync::Arc;

use async_trait::async_trait;
use stacyvm_sandbox::{AgentChannel, AgentIo};

use super::direct::Direct;
use super::server::Server;
use super::{bridge, endings};

pub(super) struct DockerChannel {
    server: Arc<Server>,
    container: String,
    direct: Option<Direct>,
}

impl DockerChannel {
    /// `pid` is what the daemon says of the container's first process.
    pub(super) async fn new(server: Arc<Server>, container: String, pid: i64) -> Self {
        let direct = if server.daemon.endpoint.is_local() { reachable(pid, &container).await } else { None };
        Self { server, container, direct }
    }

    async fn bridge(&self) -> io::Result<Box<dyn AgentIo>> {
        let (server, container) = (Arc::clone(&self.server), self.container.clone());
        let ended = async move { endings::container_ended(&server, &container).await };
        bridge::open(&self.server.daemon, &self.container, ended).await
    }
}

/// Tried once: with a runtime that puts a kernel between us and the agent there
/// is no such socket.
async fn reachable(pid: i64, container: &str) -> Option<Direct> {
    let direct = Direct::find(pid, container).ok()?;
    match direct.open().await {
        Ok(_) => Some(direct),
        Err(error) => {
            tracing::debug!(container, %error, "its agent is reached through the daemon");
            None
        }
    }
}

#[async_trait]
impl AgentChannel for DockerChannel {
    async fn open(&self) -> io::Result<Box<dyn AgentIo>> {
        let Some(direct) = &self.direct else { return self.bridge().await };
        match direct.open().await {
            Ok(stream) => Ok(Box::new(stream)),
            Err(_) if direct.has_ended()? => Err(io::ErrorKind::NotFound.into()),
            // A guest may have removed the socket's file; then the bridge, which
            // comes by the same path, says whether anything is left.
            Err(_) => self.bridge().await,
        }
    }
}
