//! The HTTP API on the unix socket, and Prometheus metrics.
//!
//! `docs/openapi.json` describes every route; it is made of [`routes`], by `bridge-agent generate --openapi`.
//!
//! POST requests are for the operator: root, or the agent's own user, in the agent's own network namespace. A pod that
//! has the socket to lease ports cannot change enforcement.
//!
//! And the routes of the port pool, see [`leases`].

pub(crate) mod apply;
pub mod client;
mod connections;
mod error;
mod events;
mod explain;
mod group;
mod large;
pub(crate) mod leases;
mod metrics;
mod names;
mod openapi;
mod peer;
mod problem;
mod query;
mod routes;
mod socket;
mod suggest;

use std::{
    convert::Infallible,
    io::{self, Write as _},
    net::SocketAddr,
    os::unix::{
        fs::chown,
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    thread::JoinHandle,
    time::Duration,
};

use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, State},
    http::StatusCode,
    middleware,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use rustix::io::Errno;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize, Serializer as _};
use tokio::{
    io::unix::AsyncFd,
    sync::{
        broadcast::{self, error::RecvError},
        oneshot,
    },
};

pub(crate) use self::connections::Connections;
pub use self::error::Error;
pub use self::names::NameList;
pub(crate) use self::peer::Peer;
pub use self::problem::ErrorBody;
pub(crate) use self::problem::Problem;
use self::problem::{no_ebpf, no_engine, unreadable};
pub use self::{
    apply::Apply, events::Missed, explain::Ask, leases::MAX_BODY as MAX_LEASE_BODY, suggest::SuggestAnswer,
};
use self::{
    large::{Chunks, Turn},
    openapi::{Method, Operation, Routes},
    query::Query,
    socket::{Socket, is_socket, listen, listen_at, or_never},
};
use crate::{
    config::Api,
    datapath::{self, FlowFilter, FlowView, Maps, ReasonCount, RuleCount},
    routes::RouteEvent,
    state::{Event, Journal, Logged, ReloadError, Request, Shared, Status},
};

/// Pause between two looks at the sockets.
const AGAIN: Duration = Duration::from_secs(1);

/// Listening, but not serving yet.
#[derive(Debug)]
pub struct Server {
    socket: Socket,
    /// The listener, unless another file is in the place of the socket, or it cannot be made yet.
    listener: Option<UnixListener>,
    config: Api,
    /// The number of the group in `config`; unset, too, while the name service does not know it, as at boot.
    group: Arc<OnceLock<u32>>,
    /// The address for scrapers from elsewhere, and its listener, unless it cannot be bound yet.
    metrics: Option<(SocketAddr, Option<std::net::TcpListener>)>,
}

/// Served by a thread of its own: it shares its data with the run loop, and no answer waits for the run loop's current
/// work, which takes seconds with many rules. Dropping it ends the API and removes the socket.
#[derive(Debug)]
pub struct Served {
    stop: Option<oneshot::Sender<Infallible>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Served {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // It has reported its panic.
            drop(thread.join());
        }
    }
}

impl Server {
    /// Listens. A socket that cannot be made keeps the node neither open nor without an agent: it is tried again.
    ///
    /// # Errors
    ///
    /// [`Error::InUse`].
    pub fn bind(path: &Path, config: &Api) -> Result<Self, Error> {
        let group = group_of(config).unwrap_or_else(|error| {
            tracing::warn!(%error, "only root may use the socket; the agent tries again");
            None
        });
        if let Ok(stream) = UnixStream::connect(path) {
            let peer = rustix::net::sockopt::socket_peercred(&stream);
            let pid = peer.ok().map(|peer| peer.pid);
            // A child between fork and exec has the socket, too, also of an agent that has been killed.
            if pid.is_none_or(|pid| rustix::process::test_kill_process(pid) != Err(Errno::SRCH)) {
                let pid = pid.map(|pid| pid.as_raw_nonzero().get());
                return Err(Error::InUse { path: path.to_owned(), pid });
            }
        }
        let listener = listen_at(path, config, group);
        if let Err(error) = &listener {
            tracing::error!(%error, "the API is not served; the agent enforces, and tries again");
        }
        let socket = Socket(path.to_owned());
        let metrics = config.metrics.as_ref().map(|address| {
            // Its interface may come later: that keeps the node neither open nor without an agent.
            let bound = listen(address.0);
            if let Err(error) = &bound {
                tracing::warn!(%error, "no metrics are served there yet; the agent tries again");
            }
            (address.0, bound.ok())
        });
        let group = Arc::new(group.map(OnceLock::from).unwrap_or_default());
        Ok(Self { socket, listener: listener.ok(), config: config.clone(), group, metrics })
    }

    /// Begins to serve.
    ///
    /// # Errors
    ///
    /// [`Error::Serve`].
    pub fn start(self, shared: Shared) -> Result<Served, Error> {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Error::Serve)?;
        let (stop, stopped) = oneshot::channel();
        let serve = move || {
            runtime.block_on(async {
                tokio::select! {
                    () = self.serve_always(&shared) => {}
                    // Nothing is ever sent.
                    _ = stopped => {}
                }
            });
        };
        let thread = std::thread::Builder::new().name("api".into()).spawn(serve).map_err(Error::Serve)?;
        Ok(Served { stop: Some(stop), thread: Some(thread) })
    }

    /// Serves, and begins again after a failure.
    async fn serve_always(self, shared: &Shared) {
        const PAUSE: Duration = Duration::from_secs(1);
        loop {
            if let Err(error) = self.serve_once(shared.clone()).await {
                tracing::error!(%error, "the API cannot be served; the agent tries again");
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Serves until it is dropped, inside a tokio runtime.
    ///
    /// # Errors
    /// The sockets cannot be used with the runtime.
    pub async fn serve(self, shared: Shared) -> io::Result<()> {
        self.serve_once(shared).await
    }

    /// Listens again if another program has removed the socket, or the file in its place; `None` if it is there, or cannot
    /// be made.
    fn restore_socket(&self) -> Option<AsyncFd<UnixListener>> {
        let path = &self.socket.0;
        if is_socket(path).is_some() {
            return None;
        }
        let listener = listen_at(path, &self.config, self.group.get().copied()).ok();
        let listener = listener.and_then(|listener| socket::watch(listener).ok());
        match &listener {
            Some(_) => tracing::warn!(path = %path.display(), "the agent listens again, on a new socket"),
            None => tracing::debug!(path = %path.display(), "the socket cannot be made yet"),
        }
        listener
    }

    /// Makes another attempt to bind the address for scrapers.
    fn bind_metrics(&self) -> Option<tokio::net::TcpListener> {
        let (address, _) = self.metrics.as_ref()?;
        let bound = listen(*address).ok().and_then(|bound| tokio::net::TcpListener::from_std(bound).ok());
        if bound.is_some() {
            tracing::info!(%address, "metrics are served now");
        }
        bound
    }

    async fn serve_once(&self, shared: Shared) -> io::Result<()> {
        let listener = self.listener.as_ref().map(UnixListener::try_clone).transpose()?;
        let mut listener = listener.map(socket::watch).transpose()?;
        let bound = self.metrics.as_ref().and_then(|(_, listener)| listener.as_ref());
        let bound = bound.map(std::net::TcpListener::try_clone).transpose()?;
        let mut metrics = bound.map(tokio::net::TcpListener::from_std).transpose()?;
        let mut again = tokio::time::interval(AGAIN);
        if self.config.group.is_some() && self.group.get().is_none() {
            tokio::spawn(give_to_group(self.socket.0.clone(), self.config.clone(), Arc::clone(&self.group)));
        }
        let (api, clients) =
            (router(shared.clone()), Arc::new(Connections::new(Arc::clone(&shared.stalled_clients))));
        let of_metrics = Router::new().route("/metrics", get(metrics::serve)).with_state(shared.clone());
        // Scrapers from elsewhere have room of their own.
        let scrapers = Arc::new(Connections::new(Arc::clone(&shared.stalled_clients)));
        tokio::spawn(route_events(shared.route_events.subscribe(), shared.events.clone()));
        loop {
            tokio::select! {
                accepted = or_never(listener.as_ref().map(|listener| socket::accept(listener, &clients))) => match accepted {
                    Ok(stream) => {
                        if let Some(peer) = Peer::of(&stream, &shared) {
                            clients.serve(stream, Some(peer), &api);
                        }
                    }
                    Err(error) => pause(&error).await,
                },
                accepted = or_never(metrics.as_ref().map(|listener| listener.accept())) => match accepted {
                    Ok((stream, _)) => scrapers.serve(stream, None, &of_metrics),
                    Err(error) => pause(&error).await,
                },
                _ = again.tick() => {
                    if let Some(restored) = self.restore_socket() {
                        listener = Some(restored);
                    }
                    if metrics.is_none() {
                        metrics = self.bind_metrics();
                    }
                }
            }
        }
    }
}

/// Enters the events of routes into the journal, until the API ends.
async fn route_events(mut events: broadcast::Receiver<RouteEvent>, journal: Journal) {
    loop {
        match events.recv().await {
            Ok(event) => journal.publish(Event::Route(Logged::new(event))),
            Err(RecvError::Lagged(_)) => {}
            Err(RecvError::Closed) => return,
        }
    }
}

/// Waits before the next attempt to accept: an error such as ENFILE stays for a while.
pub(crate) async fn pause(error: &io::Error) {
    const PAUSE: Duration = Duration::from_millis(100);
    tracing::debug!(%error, "the listener cannot accept a connection");
    tokio::time::sleep(PAUSE).await;
}

/// Returns the number of the group that may use the socket.
fn group_of(config: &Api) -> Result<Option<u32>, Error> {
    let Some(group) = config.group.as_deref() else { return Ok(None) };
    match group::id(group) {
        Ok(Some(id)) => Ok(Some(id)),
        Ok(None) => Err(Error::NoGroup(group.to_owned())),
        Err(source) => Err(Error::Group { group: group.to_owned(), source }),
    }
}

/// Gives the socket to its group, as soon as the name service knows it.
async fn give_to_group(path: PathBuf, config: Api, known: Arc<OnceLock<u32>>) {
    const PAUSE: Duration = Duration::from_secs(10);
    loop {
        tokio::time::sleep(PAUSE).await;
        let (path, config) = (path.clone(), config.clone());
        let give = move || {
            let group = group_of(&config).ok().flatten()?;
            chown(&path, None, Some(group)).ok().map(|()| group)
        };
        // The name service may take its time.
        if let Ok(Some(group)) = tokio::task::spawn_blocking(give).await {
            known.get_or_init(|| group);
            tracing::info!(group, "the group may use the socket now");
            return;
        }
    }
}

/// Returns all routes with their documentation.
fn routes() -> Routes {
    let reloaded = Operation::new(Method::Post, "reload", "Reads the configuration file again")
        .error(StatusCode::CONFLICT, "A configuration is on trial")
        .error(StatusCode::UNPROCESSABLE_ENTITY, "The configuration is refused")
        .error(StatusCode::SERVICE_UNAVAILABLE, "The agent is stopping");
    let for_operators = Routes::default()
        .add("/v1/reload", reloaded, post(reload))
        .merge(apply::routes())
        .map(|router| router.layer(middleware::from_fn(peer::operators_only)))
        .each_fails(StatusCode::FORBIDDEN, "Only for root and the agent's own user");
    Routes::default()
        .add("/v1/status", Operation::get::<Status>("status", "Returns the state of the agent"), get(status))
        .add(
            "/v1/settled",
            Operation::new(Method::Get, "settled", "Answers when the agent has finished its current work"),
            get(settled),
        )
        .add(
            "/v1/flows",
            Operation::get::<FlowList>("flows", "Lists known flows")
                .query::<FlowQuery>()
                .needs_ebpf()
                .large(),
            get(flows),
        )
        .add(
            "/v1/rules",
            Operation::get::<Vec<RuleCount>>("rules", "Lists the active rules with their hits")
                .needs_an_engine()
                .large(),
            get(rules),
        )
        .add(
            "/v1/counters",
            Operation::get::<Vec<ReasonCount>>("counters", "Counts packets by direction and reason")
                .needs_an_engine()
                .large(),
            get(counters),
        )
        .add("/v1/events", events::operation(), get(events::events))
        .add("/v1/explain", explain::operation(), post(explain::explain))
        .add("/v1/suggest", suggest::operation(), get(suggest::suggest))
        .add(
            "/metrics",
            Operation::new(Method::Get, "metrics", "Returns metrics for Prometheus")
                .sends::<String>(StatusCode::OK, "application/openmetrics-text"),
            get(metrics::serve),
        )
        .merge(names::routes())
        .merge(routes::routes())
        .merge(for_operators)
        .merge(leases::routes())
}

/// Returns the OpenAPI document of this API.
#[must_use]
pub fn document() -> serde_json::Value {
    routes().document()
}

fn router(shared: Shared) -> Router {
    routes()
        .into_router()
        .method_not_allowed_fallback(async || {
            let text = "this path does not take this method; see docs/openapi.json";
            Problem::new(StatusCode::METHOD_NOT_ALLOWED, "method", text)
        })
        .fallback(async || {
            Problem::new(StatusCode::NOT_FOUND, "path", "there is no such path; see docs/openapi.json")
        })
        .layer(DefaultBodyLimit::max(leases::MAX_BODY))
        .with_state(shared)
}

impl From<datapath::Error> for Problem {
    fn from(error: datapath::Error) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "kernel", error.to_string())
    }
}

async fn status(State(shared): State<Shared>) -> Response {
    Json(shared.status()).into_response()
}

async fn settled(State(shared): State<Shared>) -> StatusCode {
    shared.settled().await;
    StatusCode::NO_CONTENT
}

/// How many flows are sent if no limit is given.
const FLOW_LIMIT: usize = 1000;

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct FlowQuery {
    /// The most flows to send; left out: 1000
    #[serde(default, deserialize_with = "query::number")]
    limit: Option<usize>,
    /// Only flows with this address, or with one in this network
    #[serde(default, deserialize_with = "query::network")]
    #[schemars(with = "Option<String>")]
    address: Option<ipnet::IpNet>,
    /// Only flows with this port
    #[serde(default, deserialize_with = "query::port")]
    #[schemars(range(min = 1))]
    port: Option<u16>,
    /// Only flows in this state
    state: Option<String>,
    /// Only flows of this protocol
    protocol: Option<String>,
}

/// Flows, and whether there are more.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct FlowList {
    /// As many as asked for.
    pub flows: Vec<FlowView>,
    /// How many match.
    pub total: usize,
}

async fn flows(
    State(shared): State<Shared>,
    Query(query): Query<FlowQuery>,
    turn: Turn,
) -> Result<Response, Problem> {
    let maps = shared.maps().ok_or_else(no_ebpf)?;
    let FlowQuery { limit, address, port, state, protocol } = query;
    let filter = FlowFilter { address, port, state, protocol }.checked()?;
    let limit = limit.unwrap_or(FLOW_LIMIT);
    let write = move |(maps, filter): (Arc<Maps>, FlowFilter), chunks: &mut Chunks| {
        let (mut total, mut result) = (0, chunks.write_all(b"{\"flows\":["));
        let read = maps.for_each_flow(&filter, |flow| {
            if total < limit && result.is_ok() {
                let comma: &[u8] = if total > 0 { b"," } else { b"" };
                result =
                    chunks.write_all(comma).and_then(|()| Ok(serde_json::to_writer(&mut *chunks, &flow)?));
            }
            total += 1;
        });
        read.map_err(io::Error::other)?;
        result.and_then(|()| write!(chunks, "],\"total\":{total}}}"))
    };
    turn.answer("application/json", move || Ok((maps, filter)), write).await
}

async fn rules(State(shared): State<Shared>, turn: Turn) -> Result<Response, Problem> {
    let read = move || -> Result<Box<dyn Iterator<Item = RuleCount> + Send>, Problem> {
        if let Some(maps) = shared.maps() {
            return Ok(Box::new(maps.each_rule_count()?));
        }
        let counts = shared.filter_counts().ok_or_else(no_engine)?;
        Ok(Box::new(counts.rules().map_err(unreadable)?.into_iter()))
    };
    turn.answer("application/json", read, |rules, chunks| {
        Ok(serde_json::Serializer::new(chunks).collect_seq(rules)?)
    })
    .await
}

async fn counters(State(shared): State<Shared>, turn: Turn) -> Result<Response, Problem> {
    turn.json(move || match shared.maps() {
        Some(maps) => Ok(maps.reason_counts()?),
        None => shared.filter_counts().ok_or_else(no_engine)?.reasons().map_err(unreadable),
    })
    .await
}

async fn reload(State(shared): State<Shared>) -> Result<StatusCode, Problem> {
    let (answer, result) = oneshot::channel();
    shared.requests.send(Request::Reload(answer)).await.map_err(|_| Problem::stopping())?;
    result.await.map_err(|_| Problem::stopping())??;
    Ok(StatusCode::NO_CONTENT)
}

impl From<ReloadError> for Problem {
    fn from(error: ReloadError) -> Self {
        let (status, code) = match &error {
            ReloadError::Config(_) => (StatusCode::UNPROCESSABLE_ENTITY, "config"),
            ReloadError::OnTrial(_) => (StatusCode::CONFLICT, "on-trial"),
            ReloadError::Refused(_) => (StatusCode::UNPROCESSABLE_ENTITY, "refused"),
        };
        Self::new(status, code, error.to_string())
    }
}
