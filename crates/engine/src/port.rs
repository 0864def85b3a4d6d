//! Who may open the previews of a sandbox's ports: kept in memory, written
//! through. What follows from it is the server's.

use std::time::Instant;

use stacyvm_api::{PortAccess, SandboxId, SandboxState};

use crate::record::Record;
use crate::shared::{Operation, Shared};
use crate::{Caller, EngineError};

/// Ports of one sandbox whose access somebody set.
const PORTS_MAX: usize = 1024;

impl Shared {
    pub(crate) async fn set_port_access(
        &self,
        caller: &Caller,
        id: &SandboxId,
        port: u16,
        access: PortAccess,
    ) -> Result<(), EngineError> {
        let started = Instant::now();
        let record = self.find(caller, id)?;
        let done = self.write_port_access(&record, port, access).await;
        self.log_operation(
            caller,
            &Operation {
                action: "port.access",
                sandbox: Some(id),
                provider: record.provider.name(),
                resource: &port.to_string(),
                error: done.as_ref().err(),
                took: started.elapsed(),
            },
        );
        done
    }

    /// Memory changes while the writer is held, so that both see changes in
    /// the same order.
    async fn write_port_access(&self, record: &Record, port: u16, access: PortAccess) -> Result<(), EngineError> {
        if port == 0 {
            return Err(EngineError::InvalidInput("there is no port 0".to_owned()));
        }
        {
            let set = record.port_access();
            if set.len() >= PORTS_MAX && !set.contains_key(&port) {
                return Err(EngineError::InvalidInput(format!(
                    "{PORTS_MAX} ports of this sandbox have settings already"
                )));
            }
        }
        let writer = self.store.save_port_access(&record.id, port, access).await?;
        record.port_access().insert(port, access);
        drop(writer);
        Ok(())
    }

    /// The access of a port that can be reached now.
    pub(crate) async fn reachable_port(&self, id: &SandboxId, port: u16) -> Result<Option<PortAccess>, EngineError> {
        let record = self.record(id).ok_or_else(|| EngineError::SandboxNotFound(id.clone()))?;
        self.look_again_if_paused(&record).await;
        record.check_usable()?;
        Ok(record.access_of(port))
    }
}

impl Record {
    pub(crate) fn access_of(&self, port: u16) -> Option<PortAccess> {
        self.port_access().get(&port).copied()
    }

    /// Whether its inside can be worked with now.
    pub(crate) fn check_usable(&self) -> Result<(), EngineError> {
        match self.state() {
            SandboxState::Running | SandboxState::Unhealthy => Ok(()),
            SandboxState::Destroying | SandboxState::Destroyed => Err(EngineError::SandboxNotFound(self.id.clone())),
            state @ (SandboxState::Creating | SandboxState::Paused | SandboxState::Error) => {
                let reason = self.sandbox().reason.clone();
                Err(EngineError::SandboxNotReady { id: self.id.clone(), state, reason })
            }
        }
    }
}
