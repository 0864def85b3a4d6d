//! Lines out of a streamed body, with a bound on their length.

use bytes::BytesMut;
use reqwest::Response;

use crate::ClientError;
use crate::client::transport;

/// Longest line accepted: the server's own chunks are far smaller, and an
/// endless line must not fill the memory.
const MAX_LINE_BYTES: usize = 16 * 1024 * 1024;

/// Reads a response body line by line.
#[derive(Debug)]
pub(crate) struct Lines {
    server: String,
    response: Response,
    buffer: BytesMut,
    /// Bytes of `buffer` already known to hold no line end.
    searched: usize,
    ended: bool,
}

impl Lines {
    pub(crate) fn new(server: String, response: Response) -> Self {
        Self { server, response, buffer: BytesMut::new(), searched: 0, ended: false }
    }

    /// The next line without its line end, or `None` at the end of the body.
    pub(crate) async fn next(&mut self) -> Result<Option<BytesMut>, ClientError> {
        loop {
            if let Some(at) = self.buffer[self.searched..].iter().position(|byte| *byte == b'\n') {
                let mut line = self.buffer.split_to(self.searched + at + 1);
                line.truncate(line.len() - 1);
                if line.ends_with(b"\r") {
                    line.truncate(line.len() - 1);
                }
                self.searched = 0;
                return Ok(Some(line));
            }
            self.searched = self.buffer.len();
            if self.ended {
                let rest = self.buffer.split();
                self.searched = 0;
                return Ok((!rest.is_empty()).then_some(rest));
            }
            if self.buffer.len() > MAX_LINE_BYTES {
                return Err(ClientError::Protocol(format!("a line is longer than {MAX_LINE_BYTES} bytes")));
            }
            match self.response.chunk().await.map_err(|error| transport(&self.server, error))? {
                Some(chunk) => self.buffer.extend_from_slice(&chunk),
                None => self.ended = true,
            }
        }
    }
}
