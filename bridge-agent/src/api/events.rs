//! `GET /v1/events`: verdicts and route events, as they happen.
//!
//! With `Accept: text/event-stream` as server-sent events, whose ids let a client resume; else a JSON object per line.

use std::{convert::Infallible, time::Duration};

use axum::{
    body::Body,
    extract::State,
    http::{HeaderMap, StatusCode, header},
    response::{
        IntoResponse as _, Response, Sse,
        sse::{self, KeepAlive},
    },
};
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};
use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::openapi::{Method, Operation};
use super::problem::{Problem, no_ebpf};
use super::query::{self, Query};
use crate::{
    datapath::{Verdict, VerdictFilter},
    routes::RouteEvent,
    state::{Event, EventId, Received, Shared, Start},
};

/// Header of a client that resumes.
const LAST_EVENT_ID: &str = "last-event-id";
/// Pause before a client connects again.
const RETRY: Duration = Duration::from_secs(1);
/// Time without an event after which a comment is sent: the client notices a dead agent, and the agent a dead client.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct EventQuery {
    /// Only verdicts of this kind
    pub(super) verdict: Option<String>,
    /// Only packets with this address, or with one in this network
    #[serde(default, deserialize_with = "query::network")]
    #[schemars(with = "Option<String>")]
    pub(super) address: Option<IpNet>,
    /// Only packets with this port
    #[serde(default, deserialize_with = "query::port")]
    #[schemars(range(min = 1))]
    pub(super) port: Option<u16>,
    /// Start with the last events that the agent still has, at most this many.
    #[serde(default, deserialize_with = "query::number")]
    pub(super) last: Option<usize>,
}

/// In the place of events that a client was too slow to take.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct Missed {
    /// Number of these events.
    pub missed: u64,
}

/// A line of `GET /v1/events`, or the data of a server-sent event.
#[derive(JsonSchema)]
#[schemars(untagged)]
#[expect(dead_code, reason = "for its schema")]
enum EventLine {
    Verdict(Box<Verdict>),
    Route(RouteEvent),
    Missed(Missed),
}

pub(super) fn operation() -> Operation {
    Operation::new(
        Method::Get,
        "events",
        "Sends verdicts and route events as they happen, a JSON object a line; with `Accept: text/event-stream` as \
         server-sent events, which a client resumes with Last-Event-ID",
    )
    .sends::<EventLine>(StatusCode::OK, "application/x-ndjson")
    .sends::<EventLine>(StatusCode::OK, "text/event-stream")
    .query::<EventQuery>()
    .error(StatusCode::CONFLICT, "The agent neither enforces by eBPF nor looks after routes")
}

pub(super) async fn events(
    State(shared): State<Shared>,
    Query(query): Query<EventQuery>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    if shared.maps().is_none() && shared.routes().is_none() {
        return Err(no_ebpf());
    }
    let EventQuery { verdict, address, port, last } = query;
    let filter = VerdictFilter { verdict, address, port }.checked()?;
    let mut start = Start::Last(last.unwrap_or(0));
    if let Some(id) = headers.get(LAST_EVENT_ID) {
        start = Start::After(resume(id.to_str().unwrap_or_default())?);
    }
    let received = received(&shared, start, filter);
    if accepts(&headers, "text/event-stream") {
        let events = stream::once(async { sse::Event::default().retry(RETRY).comment("connected") })
            .chain(received.map(server_sent))
            .map(Ok::<_, Infallible>);
        let keep_alive = KeepAlive::new().interval(KEEP_ALIVE);
        return Ok(Sse::new(events).keep_alive(keep_alive).into_response());
    }
    let lines = received.filter_map(async |received| Some(Ok::<_, Infallible>(line(received)?)));
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response())
}

/// Whether a client accepts a media type by its name.
pub(super) fn accepts(headers: &HeaderMap, kind: &str) -> bool {
    headers.get_all(header::ACCEPT).iter().any(|value| names(value.to_str(), kind))
}

/// Whether an `Accept` header names a media type.
fn names<E>(accept: Result<&str, E>, kind: &str) -> bool {
    let mut types = accept.unwrap_or_default().split(',');
    types.any(|one| one.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case(kind))
}

fn resume(id: &str) -> Result<EventId, Problem> {
    id.parse().map_err(|error| Problem::new(StatusCode::BAD_REQUEST, "last-event-id", format!("{error}")))
}

/// The events that the filter selects. A filter names fields that only verdicts have, so that it leaves route events out.
fn received(shared: &Shared, start: Start, filter: VerdictFilter) -> impl Stream<Item = Received> + use<> {
    let all = filter == VerdictFilter::default();
    stream::unfold((shared.events.read(start), filter), move |(mut reader, filter)| async move {
        loop {
            let received = reader.next().await;
            let selected = match &received {
                Received::Event(_, Event::Verdict(verdict)) => filter.matches(verdict),
                Received::Event(_, Event::Route(_)) => all,
                Received::Missed(_) | Received::Restarted => true,
            };
            if selected {
                return Some((received, (reader, filter)));
            }
        }
    })
}

fn server_sent(received: Received) -> sse::Event {
    let event = sse::Event::default();
    match received {
        Received::Event(id, Event::Verdict(verdict)) => {
            event.id(id.to_string()).event("verdict").data(verdict.json())
        }
        Received::Event(id, Event::Route(route)) => {
            event.id(id.to_string()).event("route").data(route.json())
        }
        Received::Missed(missed) => event.event("missed").data(json(&Missed { missed })),
        Received::Restarted => event.event("restarted").data("{}"),
    }
}

fn line(received: Received) -> Option<Bytes> {
    let mut line = match received {
        Received::Event(_, Event::Verdict(verdict)) => verdict.json().to_owned(),
        Received::Event(_, Event::Route(event)) => event.json().to_owned(),
        Received::Missed(missed) => json(&Missed { missed }),
        Received::Restarted => return None,
    };
    line.push('\n');
    Some(line.into())
}

/// None of the types can fail to be serialized.
fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accept_headers_are_lists() {
        let names = |accept| names(Ok::<_, ()>(accept), "text/event-stream");
        for accept in
            ["text/event-stream", "application/json, Text/Event-Stream;q=0.5", "text/event-stream ;x=1"]
        {
            assert!(names(accept), "{accept}");
        }
        for accept in ["", "*/*", "text/html", "text/event-streams"] {
            assert!(!names(accept), "{accept}");
        }
    }
}
