//! The body of a request.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};
use http_body_util::BodyExt as _;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::time::timeout;

use crate::Failure;

/// A body that nobody wants any more is still read for this long: a client that
/// is sending does not look for an answer, and a connection closed in its face
/// loses it.
const DRAIN_TIME: Duration = Duration::from_secs(20);

/// A request body of which the rest is read when its handler is done with it.
pub(crate) struct Upload {
    /// Until its end was seen.
    body: Option<Incoming>,
}

impl Upload {
    pub(crate) fn new(body: Incoming) -> Self {
        Self { body: Some(body).filter(|body| !body.is_end_stream()) }
    }

    /// What is sent, piece by piece.
    pub(crate) fn pieces(self) -> impl Stream<Item = Result<Bytes, Failure>> + Send + Unpin {
        self.into_data_stream()
            .map(|piece| piece.map_err(|error| Failure::InvalidArgument(format!("the upload broke off: {error}"))))
    }
}

impl Body for Upload {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let Some(body) = &mut self.body else { return Poll::Ready(None) };
        let frame = std::task::ready!(Pin::new(body).poll_frame(context));
        if !matches!(frame, Some(Ok(_))) {
            self.body = None;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(|| SizeHint::with_exact(0), Body::size_hint)
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        let Some(mut body) = self.body.take().filter(|body| !body.is_end_stream()) else { return };
        // The runtime is gone when the agent itself ends.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                let rest = async { while let Some(Ok(_)) = body.frame().await {} };
                let _ = timeout(DRAIN_TIME, rest).await;
            });
        }
    }
}
