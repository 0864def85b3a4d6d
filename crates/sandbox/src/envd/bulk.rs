//! Files, trees and dialed ports: plain HTTP/1.1, each on its own connection.
//!
//! Such a connection needs no windows, so a large body moves as fast as the
//! stream below it and holds nothing up.

use std::convert::Infallible;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, ready};
use std::time::Duration;

use base64::Engine as _;
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body::Frame;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Empty, Limited, StreamBody};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use stacyvm_api::Timestamp;
use stacyvm_envd::agent::Reason;
use stacyvm_envd::http::{self as paths, ErrorBody, FileHeader};
use tokio::time::{Instant, sleep_until, timeout};

use super::error::{from_reason, from_transport, malformed};
use super::transport::Transport;
use crate::{AgentIo, ByteStream, DialTarget, EntryKind, FileContent, FileEntry, SessionError, WriteOptions};

/// The body of a failure, at most.
const MAX_FAILURE_BYTES: usize = 64 << 10;

/// Headers of an answer, at most.
const MAX_HEADER_BYTES: usize = 64 << 10;

/// Until an answer begins, when nothing is sent.
const ANSWER_TIME: Duration = Duration::from_mins(1);

/// An agent that takes nothing of an upload for this long, although there is
/// more, or that does not answer this long after all of it, has stopped.
const STALL_TIME: Duration = Duration::from_mins(2);

/// An agent that has its turn of an upload for this long is asked whether it lives.
const TURN_TIME: Duration = Duration::from_secs(5);

type RequestBody = UnsyncBoxBody<Bytes, Interrupted>;

/// Makes such requests.
#[derive(Clone, Copy)]
pub(super) struct Bulk<'a> {
    pub transport: &'a Transport,
    pub token: &'a HeaderValue,
}

impl Bulk<'_> {
    /// A file's bytes, or `None` when the range lies behind its end.
    pub(super) async fn read(self, path: &str, range: Option<Range<u64>>) -> Result<Option<FileContent>, SessionError> {
        if range.as_ref().is_some_and(|range| range.start >= range.end) {
            return Ok(None);
        }
        let mut request = self.request(Method::GET, paths::FILES, &[(paths::PATH, path)], empty())?;
        if let Some(range) = &range {
            let value = format!("bytes={}-{}", range.start, range.end - 1);
            request.headers_mut().insert(header::RANGE, value.try_into().map_err(|_| malformed("a range"))?);
        }
        let response = self.answer(request).await?;
        if response.status() == StatusCode::RANGE_NOT_SATISFIABLE {
            return Ok(None);
        }
        let response = checked("read a file", response).await?;
        let entry = entry(response.headers())?;
        let range = match (response.status(), range) {
            (StatusCode::PARTIAL_CONTENT, Some(wanted)) => wanted.start..wanted.end.min(entry.size),
            _ => 0..entry.size,
        };
        if content_length(response.headers()) != range.end.checked_sub(range.start) {
            return Err(malformed("a length that does not fit its range"));
        }
        Ok(Some(FileContent { entry, range, stream: self.body(response) }))
    }

    pub(super) async fn write(
        self,
        path: &str,
        content: ByteStream,
        options: WriteOptions,
    ) -> Result<FileEntry, SessionError> {
        let mode = options.mode.map(|mode| format!("{mode:o}"));
        let mut query = vec![(paths::PATH, path)];
        query.extend(mode.as_deref().map(|mode| (paths::MODE, mode)));
        query.extend(options.user.as_deref().map(|user| (paths::USERNAME, user)));
        let response = self.upload("write a file", Method::POST, paths::FILES, &query, content).await?;
        entry(response.headers())
    }

    pub(super) async fn archive(self, path: &str) -> Result<ByteStream, SessionError> {
        let request = self.request(Method::GET, paths::ARCHIVE, &[(paths::PATH, path)], empty())?;
        let response = self.answer(request).await?;
        Ok(self.body(checked("pack a tree", response).await?))
    }

    pub(super) async fn extract(self, path: &str, archive: ByteStream) -> Result<(), SessionError> {
        let query = [(paths::PATH, path)];
        self.upload("unpack a tree", Method::PUT, paths::ARCHIVE, &query, archive).await.map(drop)
    }

    pub(super) async fn dial(self, dialed: DialTarget) -> Result<Box<dyn AgentIo>, SessionError> {
        let port;
        let query = match &dialed {
            DialTarget::Port(number) => {
                port = number.to_string();
                (paths::PORT, port.as_str())
            }
            DialTarget::Unix(path) => (paths::UNIX, path.as_str()),
        };
        let mut request = self.request(Method::GET, paths::DIAL, &[query], empty())?;
        request.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        request.headers_mut().insert(header::UPGRADE, HeaderValue::from_static(paths::DIAL_PROTOCOL));
        let response = self.answer(request).await?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            checked("dial a port", response).await?;
            return Err(malformed("dialed without a stream"));
        }
        let upgraded = hyper::upgrade::on(response).await.map_err(broken)?;
        Ok(Box::new(TokioIo::new(upgraded)))
    }

    /// Sends a body; takes as long as its source does, but not as long as a
    /// stopped agent would.
    async fn upload(
        self,
        operation: &'static str,
        method: Method,
        path: &str,
        query: &[(&str, &str)],
        content: ByteStream,
    ) -> Result<Response<Incoming>, SessionError> {
        let (cause, pace) = (Arc::new(Mutex::new(None)), Arc::new(Pace::default()));
        let body = streamed(content, Arc::clone(&cause), Arc::clone(&pace));
        let request = self.request(method, path, query, body)?;
        // Octets whatever they are: only a form would be looked into.
        let (mut parts, body) = request.into_parts();
        parts.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        let sent = tokio::select! {
            sent = self.send(Request::from_parts(parts, body)) => sent,
            stopped = self.stops(&pace) => Err(stopped),
        };
        // What interrupted the source explains the failure better than anything.
        let interrupted = cause.lock().unwrap_or_else(PoisonError::into_inner).take();
        match (sent, interrupted) {
            (_, Some(cause)) => Err(cause),
            (sent, None) => checked(operation, sent?).await,
        }
    }

    /// Resolves once the agent is given up during an upload.
    async fn stops(self, pace: &Pace) -> SessionError {
        pace.stalls(TURN_TIME).await;
        let not_taken = async {
            pace.stalls(STALL_TIME).await;
            Err(SessionError::Unavailable(Some("the upload is no longer taken".into())))
        };
        let Err(stopped) = self.transport.while_alive::<Infallible>(not_taken).await;
        stopped
    }

    /// The answer to a request without a body.
    async fn answer(self, request: Request<RequestBody>) -> Result<Response<Incoming>, SessionError> {
        match timeout(ANSWER_TIME, self.transport.while_alive(Box::pin(self.send(request)))).await {
            Ok(answer) => answer,
            Err(_) => Err(SessionError::Unavailable(Some("no answer in time".into()))),
        }
    }

    async fn send(self, request: Request<RequestBody>) -> Result<Response<Incoming>, SessionError> {
        let stream = self.transport.open().await.map_err(|error| {
            let cause = error.to_string().into();
            from_transport(&error, Some(cause))
        })?;
        let handshake = hyper::client::conn::http1::Builder::new()
            .max_header_size(MAX_HEADER_BYTES)
            .handshake(TokioIo::new(stream));
        let (mut sender, connection) = handshake.await.map_err(broken)?;
        // Ends with its request: when the answer is read or dropped.
        tokio::spawn(connection.with_upgrades());
        match sender.send_request(request).await {
            Ok(response) => Ok(response),
            Err(error) => Err(self.transport.judge(broken(error)).await),
        }
    }

    fn request(
        self,
        method: Method,
        path: &str,
        query: &[(&str, &str)],
        body: RequestBody,
    ) -> Result<Request<RequestBody>, SessionError> {
        Request::builder()
            .method(method)
            .uri(target(path, query))
            .header(header::HOST, "agent")
            .header(paths::TOKEN_HEADER, self.token)
            .body(body)
            .map_err(|_| SessionError::InvalidArgument("the path is too long".to_owned()))
    }

    fn body(self, response: Response<Incoming>) -> ByteStream {
        let transport = self.transport.clone();
        let pieces = Some(response.into_body().into_data_stream());
        // An error ends the stream.
        Box::pin(stream::unfold((pieces, transport), |(pieces, transport)| async move {
            let mut pieces = pieces?;
            match pieces.next().await? {
                Ok(piece) => Some((Ok(piece), (Some(pieces), transport))),
                Err(error) => Some((Err(transport.judge(broken(error)).await), (None, transport))),
            }
        }))
    }
}

/// The source of an upload failed; its cause is kept beside it.
#[derive(Debug, thiserror::Error)]
#[error("the upload was interrupted")]
struct Interrupted;

/// Turns a failure's body into an error.
async fn checked(operation: &'static str, response: Response<Incoming>) -> Result<Response<Incoming>, SessionError> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let body = Limited::new(response.into_body(), MAX_FAILURE_BYTES).collect();
    let body = timeout(ANSWER_TIME, body).await.map_err(|_| malformed("a failure without an end"))?;
    let bytes = body.map_err(|_| malformed("a failure that is too long"))?.to_bytes();
    let failure: ErrorBody = serde_json::from_slice(&bytes).unwrap_or_default();
    match Reason::from_number(failure.reason) {
        Some(Reason::REASON_UNSPECIFIED) | None if status == StatusCode::UNAUTHORIZED => {
            Err(malformed("the token is not accepted"))
        }
        reason => Err(from_reason(operation, reason, &failure.message, &failure.subject)),
    }
}

fn target(path: &str, query: &[(&str, &str)]) -> String {
    let mut serializer = form_urlencoded::Serializer::new(format!("{path}?"));
    serializer.extend_pairs(query);
    serializer.finish()
}

fn empty() -> RequestBody {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

/// Who an upload waits for.
#[derive(Debug, Clone, Copy)]
enum Waits {
    ForTheSource,
    ForTheAgent { since: Instant },
}

/// Whose turn it is in an upload.
struct Pace(Mutex<Waits>);

impl Default for Pace {
    fn default() -> Self {
        Self(Mutex::new(Waits::ForTheAgent { since: Instant::now() }))
    }
}

impl Pace {
    fn set(&self, waits: Waits) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = waits;
    }

    /// Resolves once the agent has had its turn for `too_long`.
    async fn stalls(&self, too_long: Duration) {
        loop {
            let waits = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let since = match waits {
                Waits::ForTheAgent { since } if since.elapsed() >= too_long => return,
                Waits::ForTheAgent { since } => since,
                Waits::ForTheSource => Instant::now(),
            };
            sleep_until(since + too_long).await;
        }
    }
}

/// Keeps what interrupts the source, and whose turn it is.
fn streamed(mut content: ByteStream, cause: Arc<Mutex<Option<SessionError>>>, pace: Arc<Pace>) -> RequestBody {
    let frames = stream::poll_fn(move |context| {
        pace.set(Waits::ForTheSource);
        let piece = ready!(content.poll_next_unpin(context));
        pace.set(Waits::ForTheAgent { since: Instant::now() });
        Poll::Ready(piece.map(|piece| match piece {
            Ok(piece) => Ok(Frame::data(piece)),
            Err(error) => {
                *cause.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                Err(Interrupted)
            }
        }))
    });
    StreamBody::new(frames).boxed_unsync()
}

fn content_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

fn entry(headers: &HeaderMap) -> Result<FileEntry, SessionError> {
    let described = headers.get(paths::ENTRY_HEADER).ok_or_else(|| malformed("no file description"))?;
    let json = base64::engine::general_purpose::STANDARD
        .decode(described.as_bytes())
        .map_err(|_| malformed("a file description"))?;
    let described: FileHeader = serde_json::from_slice(&json).map_err(|_| malformed("a file description"))?;
    let name = described.path.rsplit('/').next().unwrap_or_default().to_owned();
    Ok(FileEntry {
        name,
        path: described.path,
        kind: EntryKind::File,
        size: described.size,
        mode: described.mode & 0o7777,
        owner: described.owner,
        group: described.group,
        modified_at: Timestamp::from_unix_ms(described.modified_unix_ms),
        symlink_target: None,
    })
}

fn broken(error: hyper::Error) -> SessionError {
    SessionError::Unavailable(Some(Box::new(error)))
}

#[cfg(test)]
mod tests {
    use std::io;

    use async_trait::async_trait;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::sync::mpsc;

    use super::*;
    use crate::AgentChannel;

    /// Leads to an agent that takes what fits into a small pipe, and at most
    /// says that it lives.
    struct Stopped {
        held: mpsc::UnboundedSender<tokio::io::DuplexStream>,
        says_it_lives: bool,
    }

    impl Stopped {
        fn transport(says_it_lives: bool) -> (Transport, mpsc::UnboundedReceiver<tokio::io::DuplexStream>) {
            let (held, streams) = mpsc::unbounded_channel();
            (Transport::new(Arc::new(Self { held, says_it_lives })), streams)
        }
    }

    #[async_trait]
    impl AgentChannel for Stopped {
        async fn open(&self) -> io::Result<Box<dyn AgentIo>> {
            let (ours, mut theirs) = tokio::io::duplex(1024);
            let (held, says_it_lives) = (self.held.clone(), self.says_it_lives);
            tokio::spawn(async move {
                let mut begin = [0; 12];
                let _ = theirs.read_exact(&mut begin).await;
                if says_it_lives && &begin == b"GET /health " {
                    let _ = theirs.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await;
                }
                // Somebody has to hold the other end.
                let _ = held.send(theirs);
            });
            Ok(Box::new(ours))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_upload_waits_for_its_source_but_not_for_a_stopped_agent() {
        let token = HeaderValue::from_static("t");
        for (says_it_lives, patience) in [(false, TURN_TIME..STALL_TIME / 2), (true, STALL_TIME..STALL_TIME * 3)] {
            let (transport, _held) = Stopped::transport(says_it_lives);
            let bulk = Bulk { transport: &transport, token: &token };
            let started = Instant::now();
            let slow = stream::once(async {
                tokio::time::sleep(STALL_TIME * 10).await;
                Ok(Bytes::from(vec![7; 100_000]))
            });
            let written = bulk.write("/file", Box::pin(slow), WriteOptions::default()).await;
            assert!(matches!(written, Err(SessionError::Unavailable(_))), "{written:?}");
            let waited = started.elapsed().saturating_sub(STALL_TIME * 10);
            assert!(patience.contains(&waited), "lives: {says_it_lives}, {waited:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_is_waited_for_while_the_agent_lives() {
        let token = HeaderValue::from_static("t");
        for (says_it_lives, waited) in [(false, ANSWER_TIME / 4), (true, ANSWER_TIME)] {
            let (transport, _held) = Stopped::transport(says_it_lives);
            let started = Instant::now();
            let read = Bulk { transport: &transport, token: &token }.read("/file", None).await;
            assert!(matches!(read.map(drop), Err(SessionError::Unavailable(_))), "lives: {says_it_lives}");
            assert_eq!(started.elapsed().as_secs(), waited.as_secs(), "lives: {says_it_lives}");
        }
    }
}
