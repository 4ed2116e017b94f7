//! The pool over HTTP/1.1 and JSON, on the agent's unix socket.
//!
//! ```text
//! POST   /v1/leases        {"destination": "192.168.31.67:443", "count": 1, "waitMs": 0, "ttlMs": 60000}
//! DELETE /v1/leases/{id}
//! GET    /v1/leases        ports in use, of all clients
//! GET    /v1/leases/watch  changes of leases, one JSON object a line
//! GET    /v1/pool          ports, destinations, counters
//! ```
//! A lease without `ttlMs` ends with the connection that asked for it, also when its client is killed.
//! docs/openapi.json describes all of it, and is tested against this server.

use std::{convert::Infallible, io, sync::Arc, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::{ConnectInfo, FromRequestParts, Path},
    http::{StatusCode, header, request::Parts},
    response::{IntoResponse, Response},
    routing::{delete, get, post},
};
use futures_util::stream;
use serde::Deserialize;
use serde_json::json;
use tokio::sync::broadcast::error::RecvError;

use super::{
    Peer, Problem,
    large::{Payload, Turn},
};
use crate::{
    pool::service::{LeaseRequest, Service, Transport},
    state::Shared,
};

/// Most bytes of a request's body.
pub const MAX_BODY: usize = 16 << 10;
/// Most ports of one request.
pub(super) const MAX_COUNT: u32 = 1024;
/// Longest wait for a port.
pub(super) const MAX_WAIT: Duration = Duration::from_secs(60);
/// Longest time of a lease.
pub(super) const MAX_TIME: Duration = Duration::from_secs(24 * 3600);

/// Body of `POST /v1/leases`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Acquire {
    destination: String,
    #[serde(default)]
    protocol: Transport,
    #[serde(default = "one")]
    count: u32,
    #[serde(default)]
    wait_ms: u64,
    ttl_ms: Option<u64>,
}

fn one() -> u32 {
    1
}

/// The routes. The pool may come and go with the configuration: it is looked up with each request.
pub(super) fn router() -> Router<Shared> {
    Router::new()
        .route("/v1/leases", post(acquire).get(list))
        .route("/v1/leases/watch", get(watch))
        .route("/v1/leases/{id}", delete(release))
        .route("/v1/pool", get(summary))
}

/// The pool, for as long as a request takes.
struct Pool(Arc<Service>);

impl FromRequestParts<Shared> for Pool {
    type Rejection = Problem;

    async fn from_request_parts(_: &mut Parts, shared: &Shared) -> Result<Self, Problem> {
        let text = "this agent has no port pool; add `portPool` to its configuration";
        shared.pool().map(Self).ok_or_else(|| Problem::new(StatusCode::NOT_FOUND, "no-pool", text))
    }
}

async fn acquire(
    Pool(service): Pool,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Payload(body): Payload,
) -> Result<Response, Problem> {
    let request = lease_request(&body)?;
    let leases = service.acquire(peer.client(), &request).await?;
    Ok((StatusCode::CREATED, axum::Json(json!({ "leases": leases }))).into_response())
}

pub(crate) fn lease_request(body: &[u8]) -> Result<LeaseRequest, Problem> {
    let bad = |reason: String| Problem::new(StatusCode::BAD_REQUEST, "request", reason);
    let order: Acquire = serde_json::from_slice(body).map_err(|error| {
        bad(format!(
            "the body is not a lease request: {error}; for example {{\"destination\": \"192.168.31.67:443\"}}"
        ))
    })?;
    let destination = order.destination.parse().map_err(|_| {
        bad(format!(
            "destination {:?} is not an address and a port, such as 192.168.31.67:443 or [fd00::1]:443",
            order.destination
        ))
    })?;
    if !(1..=MAX_COUNT).contains(&order.count) {
        return Err(bad(format!("count {} is not between 1 and {MAX_COUNT}", order.count)));
    }
    let wait = Duration::from_millis(order.wait_ms);
    if wait > MAX_WAIT {
        return Err(bad(format!("waitMs {} is above {}", order.wait_ms, MAX_WAIT.as_millis())));
    }
    let time = order.ttl_ms.map(Duration::from_millis);
    if time.is_some_and(|time| time.is_zero() || time > MAX_TIME) {
        return Err(bad(format!("ttlMs is not between 1 and {}", MAX_TIME.as_millis())));
    }
    Ok(LeaseRequest { destination, transport: order.protocol, count: order.count, wait, time })
}

async fn release(
    Pool(service): Pool,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Path(id): Path<String>,
) -> Result<StatusCode, Problem> {
    let id = id.parse().map_err(|_| {
        Problem::new(StatusCode::BAD_REQUEST, "request", format!("{id:?} is not the number of a lease"))
    })?;
    service.release(peer.client(), peer.is_operator(), id)?;
    Ok(StatusCode::NO_CONTENT)
}

async fn list(Pool(service): Pool, turn: Turn) -> Result<Response, Problem> {
    let failed =
        |error: io::Error| Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "kernel", error.to_string());
    turn.json(move || Ok(json!({ "ports": service.list().map_err(failed)? }))).await
}

async fn watch(Pool(service): Pool) -> Response {
    let events = stream::unfold(service.watch(), async |mut receiver| {
        let line = match receiver.recv().await {
            Ok(event) => serde_json::to_string(&event).unwrap_or_default(),
            Err(RecvError::Lagged(missed)) => json!({ "event": "missed", "count": missed }).to_string(),
            Err(RecvError::Closed) => return None,
        };
        Some((Ok::<_, Infallible>(line + "\n"), receiver))
    });
    ([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(events)).into_response()
}

async fn summary(Pool(service): Pool) -> Result<Response, Problem> {
    let failed = |text: String| Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "kernel", text);
    let summary = service.summary().map_err(|error| failed(error.to_string()))?;
    Ok(axum::Json(summary).into_response())
}
