//! A command's output as lines of JSON (http-api 8.1).
//!
//! The published form has exactly two keys per line and says nothing about the
//! end; clients that ask for more get offsets, gaps and a last line `exit`. The
//! exit code also travels in the trailer `X-Exit-Code`, which those who don't
//! ask never see.

use std::time::Duration;

use axum::extract::State;
use axum::response::Response;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use http::{HeaderMap, HeaderValue, header};
use http_body::Frame;
use serde::Deserialize;
use stacyvm_api::{ContentEncoding, ErrorCode, SandboxId, StreamChunk};
use stacyvm_engine::{EngineError, ExecEvent, ExecExit, ExecStream, OutputChannel, RunningExec};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::App;
use crate::error::ApiError;
use crate::extract::{Exec, From, Query};
use crate::reply::{HEARTBEAT_LINE, line, ndjson};
use crate::utf8::Utf8Decoder;

/// A blank line goes out after this much silence. The published Python SDK
/// gives up after 30 s without a byte.
pub(crate) const HEARTBEAT: Duration = Duration::from_secs(15);

const EXIT_CODE_TRAILER: &str = "x-exit-code";

/// What a line may hold beyond the two published keys.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct ChunkForm {
    /// The exact bytes in `data_b64` instead of text in `data`.
    pub(crate) base64: bool,
    /// Offsets, gaps and the exit line.
    pub(crate) extended: bool,
}

#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(default)]
#[into_params(parameter_in = Query)]
pub(super) struct AttachQuery {
    /// Bytes of output already seen.
    offset: u64,
    /// `base64` for the exact bytes in `data_b64`.
    encoding: Option<ContentEncoding>,
}

pub(super) async fn attach(
    State(app): State<App>,
    From(caller): From,
    Exec(id, exec_id): Exec,
    Query(query): Query<AttachQuery>,
) -> Result<Response, ApiError> {
    let running = app.engine.attach_exec(&caller, &id, &exec_id, query.offset).await?;
    let form = ChunkForm { base64: query.encoding == Some(ContentEncoding::Base64), extended: true };
    Ok(respond(&app, &id, running, form))
}

/// The head goes out at once; the lines follow as the command writes.
pub(super) fn respond(app: &App, id: &SandboxId, running: RunningExec, form: ChunkForm) -> Response {
    let exec_id = HeaderValue::from_str(running.exec_id.as_str());
    let lines = Lines {
        events: running.stream,
        writer: ChunkWriter::new(id, form),
        closing: app.closing.clone(),
        last_write: Instant::now(),
        ended: false,
    };
    let mut response = ndjson(lines.into_frames());
    let headers = response.headers_mut();
    headers.insert(header::TRAILER, HeaderValue::from_static("X-Exit-Code"));
    if let Ok(exec_id) = exec_id {
        headers.insert("x-exec-id", exec_id);
    }
    response
}

struct Lines {
    events: ExecStream,
    writer: ChunkWriter,
    closing: CancellationToken,
    last_write: Instant,
    ended: bool,
}

impl Lines {
    fn into_frames(self) -> impl Stream<Item = Frame<Bytes>> + Send {
        stream::unfold(self, |mut lines| async move {
            let frames = lines.next().await?;
            Some((stream::iter(frames), lines))
        })
        .flatten()
    }

    /// The next frames; dropping the stream leaves the command running.
    async fn next(&mut self) -> Option<Vec<Frame<Bytes>>> {
        while !self.ended {
            let event = tokio::select! {
                event = self.events.next() => event,
                () = tokio::time::sleep_until(self.last_write + HEARTBEAT) => {
                    self.last_write = Instant::now();
                    return Some(vec![Frame::data(HEARTBEAT_LINE)]);
                }
                () = self.closing.cancelled() => return None,
            };
            let mut frames = Vec::new();
            match event {
                Some(Ok(ExecEvent::Exited(exit))) => {
                    self.ended = true;
                    frames.extend(self.writer.exited(&exit).map(Frame::data));
                    let trailers: HeaderMap =
                        [(EXIT_CODE_TRAILER.parse().ok()?, exit.exit_code.into())].into_iter().collect();
                    frames.push(Frame::trailers(trailers));
                }
                Some(Ok(event)) => frames.extend(self.writer.event(event).map(Frame::data)),
                Some(Err(error)) => {
                    self.ended = true;
                    frames.extend(self.writer.failed(&error).map(Frame::data));
                }
                None => self.ended = true,
            }
            if !frames.is_empty() {
                self.last_write = Instant::now();
                return Some(frames);
            }
        }
        None
    }
}

/// Turns events into lines. Without I/O, so that every case can be tested.
pub(crate) struct ChunkWriter {
    sandbox_id: String,
    form: ChunkForm,
    stdout: Utf8Decoder,
    stderr: Utf8Decoder,
    offset: u64,
    /// Lost bytes to report with the next line.
    dropped: u64,
}

impl ChunkWriter {
    pub(crate) fn new(id: &SandboxId, form: ChunkForm) -> Self {
        Self {
            sandbox_id: id.to_string(),
            form,
            stdout: Utf8Decoder::default(),
            stderr: Utf8Decoder::default(),
            offset: 0,
            dropped: 0,
        }
    }

    /// The line for one event before the last, if it makes one.
    pub(crate) fn event(&mut self, event: ExecEvent) -> Option<Bytes> {
        match event {
            ExecEvent::Output { channel, data, offset } => {
                self.offset = offset;
                self.output(channel, &data)
            }
            ExecEvent::Dropped { bytes, offset } => {
                self.offset = offset;
                if self.form.extended {
                    self.dropped += bytes;
                    return None;
                }
                let text = format!("[{bytes} bytes of output were lost because they were not read in time]\n");
                Some(self.chunk("stderr", text))
            }
            ExecEvent::Keepalive | ExecEvent::Exited(_) => None,
        }
    }

    /// The lines that end a stream.
    pub(crate) fn exited(&mut self, exit: &ExecExit) -> impl Iterator<Item = Bytes> {
        let mut lines = self.tails();
        let timed_out = exit.error == Some(ErrorCode::Timeout);
        if timed_out {
            lines.push(self.chunk("stderr", format!("exec timeout: {}", self.sandbox_id)));
        }
        if self.form.extended {
            lines.push(line(&StreamChunk {
                stream: "exit".to_owned(),
                exit_code: Some(exit.exit_code),
                duration: Some(exit.duration.into()),
                error: exit.error,
                offset: Some(self.offset),
                dropped: self.take_dropped(),
                ..StreamChunk::default()
            }));
        }
        lines.into_iter()
    }

    /// The lines of a stream that was cut off. It has no `exit` line: how the
    /// command ended is not known.
    pub(crate) fn failed(&mut self, error: &EngineError) -> impl Iterator<Item = Bytes> {
        let mut lines = self.tails();
        let mut chunk =
            StreamChunk { stream: "stderr".to_owned(), data: format!("{error}\n"), ..StreamChunk::default() };
        if self.form.extended {
            chunk.error = Some(error.code());
            chunk.dropped = self.take_dropped();
        }
        lines.push(line(&chunk));
        lines.into_iter()
    }

    fn output(&mut self, channel: OutputChannel, data: &[u8]) -> Option<Bytes> {
        let (name, decoder) = match channel {
            OutputChannel::Stdout | OutputChannel::Terminal => ("stdout", &mut self.stdout),
            OutputChannel::Stderr => ("stderr", &mut self.stderr),
        };
        if self.form.base64 {
            let mut chunk = StreamChunk { stream: name.to_owned(), ..StreamChunk::default() };
            chunk.data_b64 = Some(BASE64.encode(data));
            return Some(self.extend(chunk));
        }
        let text = decoder.push(data).into_owned();
        // Whoever goes on from here must get a held back character's beginning
        // again.
        self.offset -= decoder.pending_len().min(self.offset);
        (!text.is_empty()).then(|| self.chunk(name, text))
    }

    /// Characters that were begun and never finished.
    fn tails(&mut self) -> Vec<Bytes> {
        let tails = [("stdout", self.stdout.finish()), ("stderr", self.stderr.finish())];
        tails.into_iter().filter_map(|(name, tail)| Some(self.chunk(name, tail?))).collect()
    }

    fn chunk(&mut self, name: &str, data: String) -> Bytes {
        self.extend(StreamChunk { stream: name.to_owned(), data, ..StreamChunk::default() })
    }

    fn extend(&mut self, mut chunk: StreamChunk) -> Bytes {
        if self.form.extended {
            chunk.offset = Some(self.offset);
            chunk.dropped = self.take_dropped();
        }
        line(&chunk)
    }

    fn take_dropped(&mut self) -> Option<u64> {
        let dropped = std::mem::take(&mut self.dropped);
        (dropped > 0).then_some(dropped)
    }
}
