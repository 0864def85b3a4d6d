//! Bodies on their way: frames as they come, in both directions, none kept.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio_util::sync::CancellationToken;

use super::pool::Lease;

/// A guest that says nothing to `Expect: 100-continue` gets the body after this
/// long (RFC 9110 10.1.1 leaves the span to the client).
const CONTINUE_PATIENCE: Duration = Duration::from_secs(1);

/// A guest whose head has come has this long to begin its body before the head
/// goes on alone: what has come already is read in far less.
const BEGIN_PATIENCE: Duration = Duration::from_millis(25);

type Waiting = Pin<Box<dyn Future<Output = ()> + Send>>;

/// How far a request's body has come.
#[derive(Debug, Default)]
pub(super) struct Progress {
    moved: AtomicBool,
    ended: AtomicBool,
}

impl Progress {
    /// Whether anything moved since the last time this was asked.
    pub(super) fn take_moved(&self) -> bool {
        self.moved.swap(false, Ordering::Relaxed)
    }

    pub(super) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }
}

/// When the body of a request with `Expect: 100-continue` may go out. The
/// browser is asked for it by its first reading, so that reading must wait for
/// the guest's consent.
#[derive(Debug, Clone, Default)]
pub(super) struct Consent {
    given: CancellationToken,
    answered: CancellationToken,
}

impl Consent {
    pub(super) fn give(&self) {
        self.given.cancel();
    }

    /// The guest has answered without it: the body never goes out.
    pub(super) fn settle(&self) {
        self.answered.cancel();
    }

    fn wait(&self) -> Waiting {
        let Self { given, answered } = self.clone();
        Box::pin(async move {
            tokio::select! {
                biased;
                () = given.cancelled() => {}
                () = answered.cancelled() => std::future::pending().await,
                () = tokio::time::sleep(CONTINUE_PATIENCE) => {}
            }
        })
    }
}

/// A request's body on its way to the guest.
pub(super) struct RequestBody {
    /// `None` where there is no body.
    incoming: Option<Incoming>,
    progress: Option<Arc<Progress>>,
    waiting: Option<Waiting>,
}

impl RequestBody {
    pub(super) fn new(incoming: Incoming, consent: Option<&Consent>) -> Self {
        if incoming.is_end_stream() {
            return Self::empty();
        }
        Self { incoming: Some(incoming), progress: Some(Arc::default()), waiting: consent.map(Consent::wait) }
    }

    pub(super) fn empty() -> Self {
        Self { incoming: None, progress: None, waiting: None }
    }

    /// `None` for a request without a body.
    pub(super) fn progress(&self) -> Option<Arc<Progress>> {
        self.progress.clone()
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        if let Some(waiting) = &mut self.waiting {
            ready!(waiting.as_mut().poll(context));
            self.waiting = None;
        }
        let Some(incoming) = &mut self.incoming else { return Poll::Ready(None) };
        let frame = ready!(Pin::new(incoming).poll_frame(context));
        if let Some(progress) = &self.progress {
            progress.moved.store(true, Ordering::Relaxed);
            if frame.is_none() || self.is_end_stream() {
                progress.ended.store(true, Ordering::Release);
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.as_ref().map_or_else(|| SizeHint::with_exact(0), Body::size_hint)
    }
}

/// A guest's answer on its way to the browser. At its end the connection it
/// came on is free for the next request; dropped before, the connection closes.
pub(super) struct GuestBody {
    incoming: Incoming,
    /// Read ahead of the rest.
    first: Option<Frame<Bytes>>,
    ended: bool,
    lease: Option<Lease>,
    /// Ends a stream without an end when the server does.
    closing: Option<Waiting>,
}

impl GuestBody {
    pub(super) fn new(incoming: Incoming, lease: Lease) -> Self {
        let mut body = Self { incoming, first: None, ended: false, lease: Some(lease), closing: None };
        body.release_at_end();
        body
    }

    /// Reads what has come of it already: while nothing was passed on, a body that
    /// cannot be read has an answer of its own.
    pub(super) async fn begin(&mut self) -> Result<(), hyper::Error> {
        let frame = std::future::poll_fn(|context| Pin::new(&mut *self).poll_frame(context));
        if let Ok(Some(frame)) = tokio::time::timeout(BEGIN_PATIENCE, frame).await {
            self.first = Some(frame?);
        }
        Ok(())
    }

    /// For streams that nobody expects to end by themselves.
    pub(super) fn ends_with(mut self, closing: &CancellationToken) -> Self {
        self.closing = Some(Box::pin(closing.clone().cancelled_owned()));
        self
    }

    fn release_at_end(&mut self) {
        if self.incoming.is_end_stream()
            && let Some(lease) = self.lease.take()
        {
            lease.park();
        }
    }
}

impl Body for GuestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(Ok(first)));
        }
        if self.ended {
            return Poll::Ready(None);
        }
        if let Some(closing) = &mut self.closing
            && closing.as_mut().poll(context).is_ready()
        {
            self.lease = None;
            return Poll::Ready(None);
        }
        let frame = ready!(Pin::new(&mut self.incoming).poll_frame(context));
        match &frame {
            None => {
                self.ended = true;
                if let Some(lease) = self.lease.take() {
                    lease.park();
                }
            }
            Some(Ok(_)) => self.release_at_end(),
            Some(Err(_)) => self.lease = None,
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.first.is_none() && (self.ended || self.incoming.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        match (&self.first, self.ended) {
            (Some(_), _) => SizeHint::new(),
            (None, true) => SizeHint::with_exact(0),
            (None, false) => self.incoming.size_hint(),
        }
    }
}
