//! Requests that are answered before their body was read: no key, too large, no
//! such sandbox. Over HTTP/1.1 such a connection ends with the answer, and the
//! answer has to say so (RFC 9112 9.6): a client that believes it can go on using
//! it may lose its next request.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use bytes::Bytes;
use http::{HeaderValue, StatusCode, Version, header};
use http_body::{Frame, SizeHint};

/// Whether a request's body was read to its end.
pub(crate) struct BodyRead(Option<Arc<AtomicBool>>);

impl BodyRead {
    /// Watches the body, if there is one on which the connection depends.
    pub(crate) fn watch(request: &mut Request) -> Self {
        if request.version() >= Version::HTTP_2 || http_body::Body::is_end_stream(request.body()) {
            return Self(None);
        }
        let ended = Arc::new(AtomicBool::new(false));
        let body = std::mem::take(request.body_mut());
        *request.body_mut() = Body::new(Watched { body, ended: Arc::clone(&ended) });
        Self(Some(ended))
    }

    /// Says that the connection ends, if it does.
    pub(crate) fn announce_close(&self, response: &mut Response) {
        let unread = self.0.as_ref().is_some_and(|ended| !ended.load(Ordering::Acquire));
        if unread && response.status() != StatusCode::SWITCHING_PROTOCOLS {
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
    }
}

struct Watched {
    body: Body,
    ended: Arc<AtomicBool>,
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
            self.ended.store(true, Ordering::Release);
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
