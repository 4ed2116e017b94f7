//! The agents of a cluster as one: each is asked through `kubectl exec`, and their answers are merged here.

mod events;
mod link;
mod nodes;

use std::sync::Arc;

use axum::{
    Json,
    http::StatusCode,
    response::{IntoResponse as _, Response},
};
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use http_body_util::Full;
use hyper::{Method, Request, header};
use serde_json::{Map, Value, json};
use tokio::sync::Semaphore;

use self::{
    events::Events,
    nodes::{Answer, Node, Nodes, PARALLEL, get},
};
use crate::{
    api::ErrorBody,
    kubectl::{Access, Agent},
    state::EventId,
};

/// Bytes of the answers of all nodes to a query.
const MAX_ANSWERS: usize = 16 << 20;
/// Flows of a node that are asked for at least, however many nodes there are.
const MIN_FLOWS: usize = 100;

/// All agents of a cluster.
#[derive(Debug)]
pub(super) struct Cluster {
    nodes: Arc<Nodes>,
    events: Arc<Events>,
    /// Queries whose answers are in memory: one at a time.
    turn: Semaphore,
}

impl Cluster {
    pub(super) fn new(access: Access) -> Arc<Self> {
        let nodes = Arc::new(Nodes::new(access));
        let events = Arc::new(Events::new(Arc::clone(&nodes)));
        Arc::new(Self { nodes, events, turn: Semaphore::new(1) })
    }

    /// Sends a query to every node; the answers are in order of nodes.
    async fn ask_all(&self, path: &str) -> Result<Vec<(Arc<Node>, Answer)>, String> {
        let nodes = self.nodes.list().await?;
        let request = get(&share(path, nodes.len()), &[])?;
        let most = MAX_ANSWERS / nodes.len().max(1);
        let answers = stream::iter(nodes).map(|node| {
            let request = &request;
            async move {
                let answer = node.ask(self.nodes.access(), request, most).await;
                (node, answer)
            }
        });
        Ok(answers.buffered(PARALLEL).collect().await)
    }

    /// Answers a query with the rows of all nodes, each with its node as `agent`.
    pub(super) async fn query(&self, path: &str) -> Response {
        let _turn = self.turn.acquire().await;
        let answers = match self.ask_all(path).await {
            Ok(answers) => answers,
            Err(error) => return unreachable(error),
        };
        if path == "/v1/status" {
            return self.status(answers).await;
        }
        let (mut values, mut refusal) = (Vec::new(), None);
        for (node, answer) in answers {
            match answer {
                Ok((StatusCode::OK, body)) => values.push((node.agent.node.clone(), body)),
                Ok((status, body)) => refusal = refusal.or(Some((status, body))),
                Err(error) => tracing::debug!(node = node.agent.node, error, "a node does not answer"),
            }
        }
        match refusal {
            Some((status, body)) if values.is_empty() => {
                return (status, [(header::CONTENT_TYPE, "application/json")], body).into_response();
            }
            _ if values.is_empty() => return unreachable("no node answers".to_owned()),
            _ => {}
        }
        let merged = tokio::task::spawn_blocking(move || merge(values).to_string()).await;
        match merged {
            Ok(text) => ([(header::CONTENT_TYPE, "application/json")], text).into_response(),
            Err(error) => unreachable(error.to_string()),
        }
    }

    async fn status(&self, answers: Vec<(Arc<Node>, Answer)>) -> Response {
        let row = |(node, answer): (Arc<Node>, Answer)| {
            let Agent { node, pod } = &node.agent;
            let status = answer.and_then(|(status, body)| match status {
                StatusCode::OK => serde_json::from_slice::<Value>(&body).map_err(|error| error.to_string()),
                refused => Err(format!("the agent answers {refused}")),
            });
            match status {
                Ok(status) => json!({ "node": node, "pod": pod, "status": status }),
                Err(error) => json!({ "node": node, "pod": pod, "error": error }),
            }
        };
        let problem = self.nodes.problem().await;
        let nodes: Vec<Value> = answers.into_iter().map(row).collect();
        Json(json!({ "nodes": nodes, "problem": problem })).into_response()
    }

    /// Asks the node that the question names as `agent`.
    pub(super) async fn explain(&self, question: &str) -> Response {
        let parsed = serde_json::from_str(question).ok().and_then(|question| match question {
            Value::Object(mut fields) => {
                fields.remove("agent").and_then(|agent| Some((agent.as_str()?.to_owned(), fields)))
            }
            _ => None,
        });
        let Some((name, fields)) = parsed else {
            let text = "the question names no node as `agent`".to_owned();
            return (StatusCode::BAD_REQUEST, Json(ErrorBody { code: "query".to_owned(), error: text }))
                .into_response();
        };
        let nodes = self.nodes.list().await.unwrap_or_default();
        let Some(node) = nodes.into_iter().find(|node| node.agent.node == name) else {
            return unreachable(format!("no agent runs on {name}"));
        };
        let body = Full::new(Bytes::from(Value::Object(fields).to_string()));
        let request = Request::builder().method(Method::POST).uri("/v1/explain");
        let request = request.header(header::HOST, "bridge").body(body).unwrap_or_default();
        match node.ask(self.nodes.access(), &request, MAX_ANSWERS).await {
            Ok((status, body)) => {
                (status, [(header::CONTENT_TYPE, "application/json")], body).into_response()
            }
            Err(error) => unreachable(format!("{name}: {error}")),
        }
    }

    pub(super) fn events(&self, last: Option<EventId>) -> Response {
        events::serve(&self.events, last)
    }
}

fn unreachable(error: String) -> Response {
    (StatusCode::BAD_GATEWAY, Json(ErrorBody { code: "cluster".to_owned(), error })).into_response()
}

/// Divides the limit of a query among the nodes.
fn share(path: &str, nodes: usize) -> String {
    let Some((path, query)) = path.split_once('?') else { return path.to_owned() };
    let part = |part: &str| match part.strip_prefix("limit=").and_then(|limit| limit.parse::<usize>().ok()) {
        Some(limit) => format!("limit={}", (limit / nodes.max(1)).max(MIN_FLOWS).min(limit)),
        None => part.to_owned(),
    };
    let query: Vec<String> = query.split('&').map(part).collect();
    format!("{path}?{}", query.join("&"))
}

/// Merges answers of one form: rows of arrays follow each other, numbers are summed, and of other values the first is taken.
fn merge(answers: Vec<(String, Bytes)>) -> Value {
    let mut merged = Value::Null;
    for (node, body) in answers {
        // An answer that is no JSON has no rows.
        let value = serde_json::from_slice(&body).unwrap_or_default();
        add(&mut merged, value, &node, true);
    }
    merged
}

fn add(merged: &mut Value, value: Value, node: &str, top: bool) {
    match (merged, value) {
        (merged @ Value::Null, Value::Array(rows)) => {
            *merged = rows.into_iter().map(|row| named(row, node)).collect()
        }
        (Value::Array(all), Value::Array(rows)) => all.extend(rows.into_iter().map(|row| named(row, node))),
        (merged @ (Value::Null | Value::Object(_)), Value::Object(fields)) if top => {
            if merged.is_null() {
                *merged = Value::Object(Map::new());
            }
            for (name, field) in fields {
                add(&mut merged[name.as_str()], field, node, false);
            }
        }
        (merged @ Value::Null, value) => *merged = value,
        (merged @ Value::Number(_), Value::Number(number)) => {
            let sum = merged.as_u64().zip(number.as_u64()).map(|(a, b)| a.saturating_add(b));
            if let Some(sum) = sum {
                *merged = sum.into();
            }
        }
        _ => {}
    }
}

fn named(mut row: Value, node: &str) -> Value {
    if let Value::Object(fields) = &mut row {
        fields.insert("agent".to_owned(), node.into());
    }
    row
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_nodes_follow_each_other_and_numbers_are_summed() {
        let merged = |a: &str, b: &str| {
            merge(vec![("a".into(), a.to_owned().into()), ("b".into(), b.to_owned().into())])
        };
        assert_eq!(
            merged(
                r#"{"flows": [{"x": 1}], "total": 7, "note": "n"}"#,
                r#"{"flows": [{"x": 2}], "total": 5}"#
            ),
            json!({"flows": [{"x": 1, "agent": "a"}, {"x": 2, "agent": "b"}], "total": 12, "note": "n"})
        );
        assert_eq!(merged("[{}]", "[{}, {}]").as_array().map(Vec::len), Some(3));
        assert_eq!(merged("oops", "[{}]"), json!([{"agent": "b"}]));
        assert_eq!(merged("[]", "[]"), json!([]));
    }

    #[test]
    fn nodes_share_the_limit_of_a_query() {
        assert_eq!(share("/v1/flows?limit=10000&port=1", 4), "/v1/flows?limit=2500&port=1");
        assert_eq!(share("/v1/flows?limit=10000", 1000), "/v1/flows?limit=100");
        assert_eq!(share("/v1/flows?limit=10", 4), "/v1/flows?limit=10");
        assert_eq!(share("/v1/status", 4), "/v1/status");
    }
}
