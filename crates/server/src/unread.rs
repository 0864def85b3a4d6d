//! Requests that are answered before their body was read: no key, too large, no
//! such sandbox. A small body is read after all, because a connection that is
//! closed with bytes still in it can lose the answer on its way (RFC 9112 9.6).
//! With a larger one the connection ends, over HTTP/1.1, and the answer has to say
//! so: a client that believes it can go on using it may lose its next request.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use bytes::Bytes;
use http::{HeaderValue, StatusCode, Version, header};
use http_body::{Frame, SizeHint};

/// What is read of a body that nobody wanted, and for how long.
const DRAINED_BYTES: usize = 64 * 1024;
const DRAIN_LIMIT: Duration = Duration::from_millis(250);

/// What became of a request's body.
pub(crate) struct BodyRead(Option<Arc<Mutex<Fate>>>);

enum Fate {
    /// Somebody may still read it.
    Held,
    Ended,
    /// Nobody will.
    Left(Body),
}

impl BodyRead {
    /// Watches the body, if there is one on which the connection depends.
    pub(crate) fn watch(request: &mut Request) -> Self {
        if request.version() >= Version::HTTP_2 || http_body::Body::is_end_stream(request.body()) {
            return Self(None);
        }
        let fate = Arc::new(Mutex::new(Fate::Held));
        let body = std::mem::take(request.body_mut());
        // Who asks whether to send it is told no by the answer.
        let drainable = !request.headers().contains_key(header::EXPECT)
            && http_body::Body::size_hint(&body).lower() <= DRAINED_BYTES as u64;
        *request.body_mut() = Body::new(Watched { body, fate: Arc::clone(&fate), drainable });
        Self(Some(fate))
    }

    /// Reads what was left, or says that the connection ends.
    pub(crate) async fn settle(self, response: &mut Response) {
        let Some(fate) = self.0 else { return };
        let fate = std::mem::replace(&mut *lock(&fate), Fate::Held);
        let ended = match fate {
            Fate::Ended => true,
            Fate::Held => false,
            Fate::Left(body) => drain(body).await,
        };
        if !ended && response.status() != StatusCode::SWITCHING_PROTOCOLS {
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
    }
}

/// Reads a body to its end, if that is near.
async fn drain(body: Body) -> bool {
    let read = axum::body::to_bytes(body, DRAINED_BYTES);
    matches!(tokio::time::timeout(DRAIN_LIMIT, read).await, Ok(Ok(_)))
}

fn lock(fate: &Mutex<Fate>) -> std::sync::MutexGuard<'_, Fate> {
    fate.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Watched {
    body: Body,
    fate: Arc<Mutex<Fate>>,
    drainable: bool,
}

impl Drop for Watched {
    fn drop(&mut self) {
        let mut fate = lock(&self.fate);
        if self.drainable && matches!(*fate, Fate::Held) {
            *fate = Fate::Left(std::mem::take(&mut self.body));
        }
    }
}

impl http_body::Body for Watched {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        if frame.is_none() || self.body.is_end_stream() {
            *lock(&self.fate) = Fate::Ended;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
