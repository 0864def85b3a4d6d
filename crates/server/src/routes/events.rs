//! Events as server-sent events (http-api 8.3): unnamed, so that browsers'
//! `onmessage` gets them, with ids, so that a client can go on after a break.

use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use http::{HeaderMap, HeaderValue, header};
use serde::Deserialize;
use stacyvm_api::Event;
use stacyvm_engine::{EventItem, EventStream};
use tokio_util::sync::CancellationToken;

use crate::App;
use crate::error::ApiError;
use crate::extract::{From, Query};
use crate::routes::exec_stream::HEARTBEAT;

const HEARTBEAT_BLOCK: Bytes = Bytes::from_static(b": heartbeat\n\n");

#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(default)]
#[into_params(parameter_in = Query)]
pub(super) struct EventsQuery {
    /// Go on after this event, for clients that cannot send `Last-Event-ID`.
    after: Option<String>,
}

pub(super) async fn stream(
    State(app): State<App>,
    From(caller): From,
    headers: HeaderMap,
    Query(query): Query<EventsQuery>,
) -> Result<Response, ApiError> {
    let header = headers.get("last-event-id").and_then(|value| value.to_str().ok()).map(str::to_owned);
    // A browser that reconnects sends the header; the query is then old.
    let after = header.or(query.after).filter(|id| !id.is_empty());
    let events = app.engine.subscribe(&caller, after.as_deref())?;
    let mut response = Body::from_stream(blocks(events, app.closing.clone())).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

fn blocks(
    events: EventStream,
    closing: CancellationToken,
) -> impl Stream<Item = Result<Bytes, std::convert::Infallible>> + Send {
    stream::unfold((events, closing), |(mut events, closing)| async move {
        let block = tokio::select! {
            item = events.next() => match item? {
                EventItem::Event(event) => event_block(&event),
                EventItem::Missed { events } => format!(": {events} events are no longer kept\n\n").into(),
            },
            () = tokio::time::sleep(HEARTBEAT) => HEARTBEAT_BLOCK,
            () = closing.cancelled() => return None,
        };
        Some((Ok(block), (events, closing)))
    })
}

fn event_block(event: &Event) -> Bytes {
    let json = serde_json::to_string(event).unwrap_or_default();
    format!("id: {}\ndata: {json}\n\n", event.id).into()
}
