//! Every command of the command line, against a real server.

mod copies;
mod errors;
mod execution;
mod images;
mod keys;
mod preview;
mod sandboxes;
mod terminal;

use std::sync::Arc;

use stacyvm_client::SandboxClient;

use crate::support::{Server, create, small};

/// A server, and a sandbox on it that goes with the test.
struct Fixture {
    server: Arc<Server>,
    sandbox: SandboxClient,
    id: String,
}

impl Fixture {
    async fn start() -> Self {
        let server = Server::shared().await;
        let sandbox = create(&server.client(), &small()).await;
        let id = sandbox.id().to_string();
        Self { server, sandbox, id }
    }

    async fn finish(self) {
        self.sandbox.destroy().await.expect("destroyed");
    }
}
