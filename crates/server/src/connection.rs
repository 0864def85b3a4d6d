//! Serving one connection: HTTP/1.1 and HTTP/2 by what the client speaks, and
//! who answers its requests.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::response::Response;
use http::Request;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::sync::CancellationToken;
use tower::Service;

use crate::App;
use crate::peer::Peer;
use crate::preview::{self, Arrival};

/// A connection that sends no request head for this long is closed; also the
/// longest a head may take (http-api 1: idle keep-alive 60 s).
const IDLE_TIMEOUT: Duration = Duration::from_mins(1);

/// HTTP/2: with the defaults, uploads are several times slower.
const H2_STREAM_WINDOW_BYTES: u32 = 1 << 20;
const H2_CONNECTION_WINDOW_BYTES: u32 = 4 << 20;
const H2_MAX_FRAME_BYTES: u32 = 256 << 10;
const H2_MAX_STREAMS: u32 = 1024;
const H2_KEEPALIVE: Duration = Duration::from_secs(30);

/// What a listener is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Surface {
    /// The API, and previews by host.
    Main,
    /// Previews by path, and nothing else.
    PreviewPaths,
}

/// Answers requests of one listener.
#[derive(Clone)]
pub(crate) struct Site {
    pub(crate) app: App,
    pub(crate) router: Router,
    pub(crate) surface: Surface,
}

impl Site {
    async fn answer(mut self, arrival: Arrival, mut request: Request<Incoming>) -> Response {
        if self.surface == Surface::PreviewPaths {
            return preview::by_path(&self.app, arrival, request).await;
        }
        if let Some(named) = self.app.previews.named(&request) {
            return preview::by_host(&self.app, named, arrival, request).await;
        }
        if let Some(refused) = preview::misnamed(&self.app, &request) {
            return refused;
        }
        request.extensions_mut().insert(Peer(arrival.peer));
        Service::call(&mut self.router, request).await.unwrap_or_else(|never| match never {})
    }
}

/// Until the client ends it; after `closing`, until what is open is answered;
/// after `cut`, not at all.
pub(crate) async fn serve<S>(stream: S, site: Arc<Site>, arrival: Arrival, cut: CancellationToken)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let closing = site.app.closing.clone();
    let service = service_fn(move |request: Request<Incoming>| {
        let site = Site::clone(&site);
        async move { Ok::<_, Infallible>(site.answer(arrival, request).await) }
    });
    let builder = builder();
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = closing.cancelled() => {
            connection.as_mut().graceful_shutdown();
            tokio::select! {
                result = connection.as_mut() => result,
                () = cut.cancelled() => return,
            }
        }
    };
    if let Err(error) = result {
        // Clients that go away mid-request are ordinary.
        tracing::debug!(%error, "a connection ended early");
    }
}

fn builder() -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(IDLE_TIMEOUT);
    builder
        .http2()
        .timer(TokioTimer::new())
        .initial_stream_window_size(H2_STREAM_WINDOW_BYTES)
        .initial_connection_window_size(H2_CONNECTION_WINDOW_BYTES)
        .max_frame_size(H2_MAX_FRAME_BYTES)
        .max_concurrent_streams(H2_MAX_STREAMS)
        .keep_alive_interval(H2_KEEPALIVE);
    builder
}
