//! The events of all nodes as one stream.
//!
//! A follower per node resumes after the last event that it received, and enters events into one journal, from which each
//! browser reads at its own pace. Followers run while a browser looks.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use axum::response::{
    IntoResponse as _, Response, Sse,
    sse::{self, KeepAlive},
};
use bytes::{Buf as _, BytesMut};
use futures_util::stream;
use http_body_util::BodyExt as _;
use serde_json::Value;
use tokio::{
    task::JoinHandle,
    time::{sleep, timeout},
};

use super::{
    link::Link,
    nodes::{LIST_EVERY, Node, Nodes, get},
};
use crate::{
    kernel::lock::lock,
    kubectl::Agent,
    state::{EventId, Journal, Received, Start},
};

/// Events of the past that a node is asked for at first, and those that a browser gets.
const PAST: usize = 200;
const PAST_OF_ALL: usize = 1000;
/// Pause before a follower connects again.
const RETRY: Duration = Duration::from_secs(2);
/// Agents send a comment every 5 seconds: after this time without a byte the connection is lost.
const SILENCE: Duration = Duration::from_secs(15);
/// Bytes of one event; the agent's are smaller by far.
const MAX_EVENT: usize = 64 << 10;
/// Followers end this long after the last browser has gone.
const LINGER: Duration = Duration::from_secs(30);

/// An event of a node.
#[derive(Clone, Debug)]
struct Item {
    kind: &'static str,
    /// JSON with the node as `agent`.
    data: Arc<str>,
}

/// The events of all nodes.
#[derive(Debug)]
pub(super) struct Events {
    nodes: Arc<Nodes>,
    journal: Journal<Item>,
    watch: Mutex<Watch>,
}

impl Events {
    pub(super) fn new(nodes: Arc<Nodes>) -> Self {
        Self { nodes, journal: Journal::default(), watch: Mutex::default() }
    }
}

/// Browsers that look, and the task that keeps the followers.
#[derive(Debug, Default)]
struct Watch {
    viewers: usize,
    task: Option<JoinHandle<()>>,
}

/// A browser that looks, until it is dropped.
struct Viewer(Arc<Events>);

impl Viewer {
    fn new(events: &Arc<Events>) -> Self {
        let mut watch = lock(&events.watch);
        watch.viewers += 1;
        if watch.task.is_none() {
            watch.task = Some(tokio::spawn(follow_all(Arc::clone(events))));
        }
        Self(Arc::clone(events))
    }
}

impl Drop for Viewer {
    fn drop(&mut self) {
        lock(&self.0.watch).viewers -= 1;
    }
}

/// A follower of one node, until it is dropped.
struct Follower(JoinHandle<()>);

impl Drop for Follower {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Answers with the events of all nodes, resuming after `last`.
pub(super) fn serve(events: &Arc<Events>, last: Option<EventId>) -> Response {
    let start = last.map_or(Start::Last(PAST_OF_ALL), Start::After);
    let reader = events.journal.read(start);
    let stream = stream::unfold((reader, Viewer::new(events)), async |(mut reader, viewer)| {
        let event = sse::Event::default();
        let event = match reader.next().await {
            Received::Event(id, Item { kind, data }) => event.id(id.to_string()).event(kind).data(data),
            Received::Missed(missed) => event.event("missed").data(format!("{{\"missed\":{missed}}}")),
            Received::Restarted => event.event("restarted").data("{}"),
        };
        Some((Ok::<_, Infallible>(event), (reader, viewer)))
    });
    Sse::new(stream).keep_alive(KeepAlive::new().interval(Duration::from_secs(5))).into_response()
}

/// Keeps a follower for each node while a browser looks.
async fn follow_all(events: Arc<Events>) {
    let mut followers: BTreeMap<Agent, Follower> = BTreeMap::new();
    let mut watched = Instant::now();
    loop {
        // The error of the list is part of the status.
        let nodes = events.nodes.list().await.unwrap_or_default();
        followers.retain(|agent, _| nodes.iter().any(|node| node.agent == *agent));
        for node in nodes {
            let follow = || Follower(tokio::spawn(follow(Arc::clone(&events), Arc::clone(&node))));
            followers.entry(node.agent.clone()).or_insert_with(follow);
        }
        {
            let mut watch = lock(&events.watch);
            if watch.viewers > 0 {
                watched = Instant::now();
            } else if watched.elapsed() > LINGER {
                watch.task = None;
                return;
            }
        }
        sleep(LIST_EVERY).await;
    }
}

/// Follows one node, and connects again for ever.
async fn follow(events: Arc<Events>, node: Arc<Node>) {
    loop {
        if let Err(error) = follow_once(&events, &node).await {
            tracing::debug!(node = node.agent.node, error, "the events of a node broke off");
        }
        sleep(RETRY).await;
    }
}

async fn follow_once(events: &Events, node: &Node) -> Result<(), String> {
    let last = lock(&node.last_event).clone();
    let mut headers = vec![("accept", "text/event-stream")];
    headers.extend(last.as_deref().map(|last| ("last-event-id", last)));
    let request = get(&format!("/v1/events?last={PAST}"), &headers)?;
    let permit = events.nodes.starts.acquire().await;
    let link = Link::open(events.nodes.access(), &node.agent).await?;
    let (_link, response) = link.request(events.nodes.access(), request).await?;
    drop(permit);
    if !response.status().is_success() {
        return Err(format!("the agent answers {}", response.status()));
    }
    let mut body = response.into_body();
    let mut parser = Parser::default();
    loop {
        let frame = timeout(SILENCE, body.frame()).await.map_err(|_| "the agent is silent")?;
        let frame = frame.ok_or("the agent ended the stream")?.map_err(|error| error.to_string())?;
        let Some(data) = frame.data_ref() else { continue };
        parser.buffer.extend_from_slice(data);
        while let Some(event) = parser.next() {
            publish(events, node, event);
        }
        if parser.buffer.len() > MAX_EVENT {
            return Err("the agent sends an event without an end".to_owned());
        }
    }
}

fn publish(events: &Events, node: &Node, event: Event) {
    if event.id.is_some() {
        *lock(&node.last_event) = event.id;
    }
    let kind = match event.kind.as_str() {
        "verdict" => "verdict",
        "route" => "route",
        "missed" => "missed",
        _ => return,
    };
    if let Ok(Value::Object(mut fields)) = serde_json::from_str(&event.data) {
        fields.insert("agent".to_owned(), node.agent.node.clone().into());
        events.journal.publish(Item { kind, data: Value::Object(fields).to_string().into() });
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Event {
    id: Option<String>,
    kind: String,
    data: String,
}

/// Splits server-sent events of the agent, each of which has one line of data.
#[derive(Debug, Default)]
struct Parser {
    buffer: BytesMut,
}

impl Parser {
    /// Returns the next whole block, also one that is a comment.
    fn next(&mut self) -> Option<Event> {
        let end = self.buffer.windows(2).position(|two| two == b"\n\n")?;
        let block = self.buffer.split_to(end);
        self.buffer.advance(2);
        let mut event = Event::default();
        for line in String::from_utf8_lossy(&block).lines() {
            let (name, value) = line.split_once(':').unwrap_or((line, ""));
            let value = value.strip_prefix(' ').unwrap_or(value);
            match name {
                "id" => event.id = Some(value.to_owned()),
                "event" => value.clone_into(&mut event.kind),
                "data" => value.clone_into(&mut event.data),
                _ => {}
            }
        }
        Some(event)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_split_wherever_the_bytes_arrive() {
        let text = ": connected\nretry: 1000\n\nid: a-1\nevent: verdict\ndata: {\"x\": \"a: b\"}\n\nevent:missed\ndata:{}\n\nid: a";
        let expected = [
            Event::default(),
            Event { id: Some("a-1".into()), kind: "verdict".into(), data: "{\"x\": \"a: b\"}".into() },
            Event { id: None, kind: "missed".into(), data: "{}".into() },
        ];
        for size in 1..text.len() {
            let mut parser = Parser::default();
            let mut events = Vec::new();
            for part in text.as_bytes().chunks(size) {
                parser.buffer.extend_from_slice(part);
                events.extend(std::iter::from_fn(|| parser.next()));
            }
            assert_eq!(events, expected, "in parts of {size}");
            assert_eq!(&parser.buffer[..], b"id: a");
        }
    }
}
