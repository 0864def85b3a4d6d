//! Any local runtime as a backend of the provider `custom`.
//!
//! One machine's `stacyvm backend serve` is a runtime of another machine's
//! `stacyvm serve`. It speaks the published protocol (`docs/custom-backend.md`)
//! with all its extensions, straight over a [`Provider`]: no engine and no
//! store, because what happens to a sandbox over time is the other side's to
//! decide. Only what nobody would ever free is freed here: sandboxes that
//! ended, and what no sandbox owns.
//!
//! [`Provider`]: stacyvm_sandbox::Provider

mod error;
mod guard;
mod order;
mod routes;
mod state;
mod utf8;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use stacyvm_sandbox::Provider;
use tokio::net::TcpListener;

pub use routes::ROUTES;

use state::App;

/// How often what ended is freed.
const TEND_INTERVAL: Duration = Duration::from_secs(30);

/// Bytes of the secret that agents' tokens are derived from.
pub const SECRET_BYTES: usize = 32;

#[derive(Clone)]
pub struct BackendOptions {
    /// What callers have to send as `X-API-Key`.
    pub key: Option<String>,
    /// Kept over restarts, or the sandboxes of before cannot be entered.
    pub secret: [u8; SECRET_BYTES],
    /// Life of sandboxes whose order names none.
    pub lifetime: Duration,
}

#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    #[error("{0} is reachable from other machines, and there is no key; set one, or listen on 127.0.0.1")]
    Open(SocketAddr),
    #[error("cannot listen on {address}")]
    Bind {
        address: SocketAddr,
        #[source]
        source: std::io::Error,
    },
    #[error("the backend ended unexpectedly")]
    Serve(#[source] std::io::Error),
}

/// A backend that listens.
pub struct Backend {
    listener: TcpListener,
    address: SocketAddr,
    app: App,
}

impl Backend {
    /// Nothing but loopback is listened on without a key.
    pub async fn bind(
        address: SocketAddr,
        provider: Arc<dyn Provider>,
        options: BackendOptions,
    ) -> Result<Self, BackendError> {
        if options.key.is_none() && !address.ip().is_loopback() {
            return Err(BackendError::Open(address));
        }
        let failed = |source| BackendError::Bind { address, source };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        Ok(Self { listener, address, app: App::new(provider, options) })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers until `end`. Sandboxes stay.
    pub async fn serve(self, end: impl Future<Output = ()>) -> Result<(), BackendError> {
        let router = routes::router(self.app.clone());
        let serve = axum::serve(self.listener, router).into_future();
        let tend = async {
            let mut ticks = tokio::time::interval(TEND_INTERVAL);
            loop {
                ticks.tick().await;
                self.app.tend().await;
            }
        };
        tokio::select! {
            ended = serve => ended.map_err(BackendError::Serve),
            () = tend => Ok(()),
            () = end => Ok(()),
        }
    }
}
