//! The pool over HTTP/1.1 and JSON, on the agent's unix socket.
//!
//! A lease without `ttlMs` ends with the connection that asked for it, also when its client is killed.

use std::{convert::Infallible, io, sync::Arc, time::Duration};

use axum::{
    body::Body,
    extract::{ConnectInfo, FromRequestParts, Path},
    http::{StatusCode, header, request::Parts},
    response::{IntoResponse, Response},
    routing::{delete, get, post},
};
use futures_util::stream;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::broadcast::error::RecvError;

use super::{
    Peer, Problem,
    large::{Payload, Turn},
    openapi::{Method, Operation, Routes},
};
use crate::{
    config::{
        leaf::{Leaf as _, SocketAddress},
        whole_number,
    },
    pool::{
        Summary,
        service::{Holding, LeaseRequest, LeasedPort, PoolEvent, Service, Transport},
    },
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
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Acquire {
    /// Address and port, such as `192.168.31.67:443` or `[fd00::1]:443`.
    destination: String,
    #[serde(default)]
    protocol: Transport,
    /// Number of ports.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = MAX_COUNT))]
    count: u32,
    /// Milliseconds to wait for free ports.
    #[serde(default)]
    #[schemars(range(max = 60_000))]
    wait_ms: u64,
    /// Milliseconds until the lease ends; left out: when the connection to the agent does.
    #[schemars(range(min = 1, max = 86_400_000))]
    ttl_ms: Option<u64>,
}

fn one() -> u32 {
    1
}

/// Returns the routes. The pool may come and go with the configuration: it is looked up with each request.
pub(super) fn routes() -> Routes {
    let acquired = Operation::new(
        Method::Post,
        "acquire",
        "Leases source ports towards one destination: all that are asked for, or none. Without ttlMs a lease ends with \
         the connection that asked for it",
    )
    .answers::<Leased>(StatusCode::CREATED)
    .body::<Acquire>()
    .error(StatusCode::FORBIDDEN, "The client's network namespace is not known")
    .error(StatusCode::CONFLICT, "No port is free, or the pool refuses for another reason")
    .error(StatusCode::TOO_MANY_REQUESTS, "The quota or the share of the client is used up");
    let released = Operation::new(Method::Delete, "release", "Ends a lease; only its own user and root may")
        .parameter::<LeaseNumber>("id")
        .error(StatusCode::BAD_REQUEST, "The path has no number of a lease")
        .error(StatusCode::FORBIDDEN, "The lease is another user's");
    Routes::default()
        .add("/v1/leases", acquired, post(acquire))
        .add(
            "/v1/leases",
            Operation::get::<HeldPorts>("list", "Lists the ports in use, of all clients").large(),
            get(list),
        )
        .add(
            "/v1/leases/watch",
            Operation::new(Method::Get, "watch", "Sends changes of leases, a JSON object a line")
                .sends::<PoolEvent>(StatusCode::OK, "application/x-ndjson"),
            get(watch),
        )
        .add("/v1/leases/{id}", released, delete(release))
        .add(
            "/v1/pool",
            Operation::get::<Summary>("pool", "Returns ports, destinations and counters of the pool")
                .error(StatusCode::INTERNAL_SERVER_ERROR, "The kernel refuses"),
            get(summary),
        )
        .each_fails(StatusCode::NOT_FOUND, "The agent has no port pool, or the lease is not known")
}

/// The number of a lease.
#[derive(JsonSchema)]
#[schemars(inline, transparent)]
#[expect(dead_code, reason = "for its schema")]
struct LeaseNumber(#[schemars(range(min = 1))] u64);

/// Answer of `POST /v1/leases`.
#[derive(Serialize, JsonSchema)]
struct Leased {
    leases: Vec<LeasedPort>,
}

/// Answer of `GET /v1/leases`.
#[derive(Serialize, JsonSchema)]
struct HeldPorts {
    ports: Vec<Holding>,
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
    Ok((StatusCode::CREATED, axum::Json(Leased { leases })).into_response())
}

pub(crate) fn lease_request(body: &[u8]) -> Result<LeaseRequest, Problem> {
    let bad = |reason: String| Problem::new(StatusCode::BAD_REQUEST, "request", reason);
    let order: Acquire = serde_json::from_slice(body).map_err(|error| {
        bad(format!(
            "the body is not a lease request: {error}; for example {{\"destination\": \"192.168.31.67:443\"}}"
        ))
    })?;
    let destination = SocketAddress::parse(&order.destination);
    let destination = destination.map_err(|problem| bad(format!("destination: {problem}")))?.0;
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
    let id = whole_number(&id, 1).map_err(|problem| {
        let text = format!("{id:?} is not the number of a lease: {problem}");
        Problem::new(StatusCode::BAD_REQUEST, "request", text)
    })?;
    service.release(peer.client(), peer.is_operator(), id)?;
    Ok(StatusCode::NO_CONTENT)
}

async fn list(Pool(service): Pool, turn: Turn) -> Result<Response, Problem> {
    let failed =
        |error: io::Error| Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "kernel", error.to_string());
    turn.json(move || Ok(HeldPorts { ports: service.list().map_err(failed)? })).await
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
