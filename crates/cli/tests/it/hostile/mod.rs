//! Guests that mean harm. Whatever one does, the caller gets a typed error in
//! bounded time, the server stays up and its other sandboxes do not notice.
//!
//! Elsewhere: the network (`crates/providers/tests/it/oci_network.rs`), requests
//! that are wrong by themselves (`crates/server/tests/it/bad_input.rs`), the
//! agent's own socket (`crates/agent/tests/it/hostile.rs`), two sandboxes and
//! their limits on every runtime (checks S28, S30 and S70 to S73 of the suite).

mod agent;
mod exhaustion;
mod files;
mod kernel;
mod secrets;

use std::sync::Arc;

use stacyvm_api::{CreateRequest, ErrorCode};
use stacyvm_client::{Client, ClientError, SandboxClient};

use crate::support::{Server, create, output, small};

/// A server with a guest on it, and somebody else who must not notice.
struct Attack {
    server: Arc<Server>,
    client: Client,
    guest: SandboxClient,
    bystander: SandboxClient,
}

impl Attack {
    async fn by(guest: &CreateRequest) -> Self {
        let server = Server::shared().await;
        let client = server.client();
        let bystander = create(&client, &small()).await;
        output(&bystander, "echo undisturbed > file").await;
        let guest = create(&client, guest).await;
        Self { server, client, guest, bystander }
    }

    /// A guest of the host's own programs, for what busybox cannot do.
    async fn by_host_programs() -> Self {
        Self::by(&CreateRequest { image: Some("host".to_owned()), ..small() }).await
    }

    /// Runs Python text in the guest; its output.
    async fn python(&self, program: &str) -> String {
        output(&self.guest, &format!("python3 - <<'PYTHON'\n{program}\nPYTHON")).await
    }

    /// Nothing came of it, and the guest can be destroyed.
    async fn ends_well(self) {
        assert_eq!(output(&self.bystander, "cat file").await, "undisturbed");
        assert_eq!(self.client.ready().await.expect("an answer").status, "ready");
        self.guest.destroy().await.expect("destroyed");
        let gone = self.guest.get().await.expect_err("it is gone");
        assert_eq!(gone.code(), Some(ErrorCode::NotFound));
        self.bystander.destroy().await.expect("destroyed");
    }
}

/// The code of a call that had to fail.
fn refusal<T: std::fmt::Debug>(result: Result<T, ClientError>) -> ErrorCode {
    let error = result.expect_err("a refusal");
    error.code().unwrap_or_else(|| panic!("not an answer of the server: {error:?}"))
}
