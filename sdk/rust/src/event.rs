//! The server's events, with going on after the last one seen.

use std::time::Duration;

use reqwest::Method;
use reqwest::header::{ACCEPT, HeaderName, HeaderValue};
use stacyvm_api::Event;

use crate::lines::Lines;
use crate::{Client, ClientError};

const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

/// Attempts to reach a server again that went away, and the pause before the
/// first of them; every further pause is twice as long.
const RECONNECT_ATTEMPTS: u32 = 6;
const RECONNECT_PAUSE: Duration = Duration::from_millis(250);

/// Where to begin.
#[derive(Debug, Clone, Default)]
pub struct EventsOptions {
    /// Id of the last event that is known already. Without it, only events from
    /// now on are sent.
    pub after: Option<String>,
}

/// Events as they happen. When the connection breaks it is made again, and
/// events missed meanwhile follow from the server's history.
#[derive(Debug)]
pub struct EventStream {
    client: Client,
    last_id: Option<String>,
    lines: Option<Lines>,
}

impl Client {
    pub async fn events(&self, options: &EventsOptions) -> Result<EventStream, ClientError> {
        let mut stream = EventStream { client: self.clone(), last_id: options.after.clone(), lines: None };
        stream.connect().await?;
        Ok(stream)
    }
}

impl EventStream {
    /// The next event. Fails only when the server stays away or refuses.
    pub async fn next(&mut self) -> Result<Event, ClientError> {
        loop {
            if self.lines.is_none() {
                self.reconnect().await?;
            }
            match self.read().await {
                Ok(Some(event)) => {
                    self.last_id = Some(event.id.clone());
                    return Ok(event);
                }
                Ok(None) | Err(ClientError::Transport { .. }) => self.lines = None,
                Err(error) => return Err(error),
            }
        }
    }

    /// Reads one event; `None` at the end of the connection. The server sends
    /// each as one `data:` line with the id inside.
    async fn read(&mut self) -> Result<Option<Event>, ClientError> {
        let Some(lines) = &mut self.lines else { return Ok(None) };
        while let Some(line) = lines.next().await? {
            let Some(data) = line.strip_prefix(b"data:") else { continue };
            let event =
                serde_json::from_slice(data).map_err(|error| ClientError::Protocol(format!("an event: {error}")))?;
            return Ok(Some(event));
        }
        Ok(None)
    }

    async fn reconnect(&mut self) -> Result<(), ClientError> {
        let mut pause = RECONNECT_PAUSE;
        for _ in 1..RECONNECT_ATTEMPTS {
            match self.connect().await {
                Err(ClientError::Connect { .. } | ClientError::Transport { .. }) => {}
                answer => return answer,
            }
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
        self.connect().await
    }

    async fn connect(&mut self) -> Result<(), ClientError> {
        let mut request = self
            .client
            .request(Method::GET, &["events"])?
            .header(ACCEPT, HeaderValue::from_static("text/event-stream"));
        if let Some(id) = &self.last_id {
            request = request.header(LAST_EVENT_ID, id);
        }
        let response = self.client.send(request).await?;
        self.lines = Some(Lines::new(self.client.server().to_owned(), response));
        Ok(())
    }
}
