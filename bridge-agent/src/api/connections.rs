//! Connections of clients: how many there may be, and when the agent closes one.
//!
//! A client costs itself something and no other client anything. Each has a share of the connections, and operators have some of
//! their own. When there are too many, a new connection takes the place of an idle one of the client that has most: the one that is
//! idle for the longest time, and holds no lease. One whose request has not arrived yet is idle, too.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap},
    convert::Infallible,
    io,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::ConnectInfo,
};
use http_body_util::BodyExt as _;
use hyper::{
    Request,
    body::{Body as _, Frame, Incoming, SizeHint},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use rustix::process::{Resource, getrlimit};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{Notify, Semaphore},
};
use tower::Service as _;

use super::{Peer, peer::Name};

/// Connections of clients that are no operators.
const MAX_CONNECTIONS: usize = 512;
/// Connections that operators have beside these.
const RESERVED: usize = 32;
/// Connections of one client.
const MAX_PER_CLIENT: usize = 128;
/// A client with all its connections gets another one in the place of one that is idle for this time: to refuse costs less.
const ROOM: Duration = Duration::from_millis(500);
/// A connection whose first request is not complete after this time is closed.
const FIRST_REQUEST: Duration = Duration::from_secs(10);
/// A connection without a request and without a lease is closed after this time.
const IDLE: Duration = Duration::from_secs(60);
/// A client that takes no byte of an answer for this time is disconnected.
const STALLED: Duration = Duration::from_secs(10);
/// Pause between two looks at a connection.
const LOOK: Duration = Duration::from_secs(1);
/// Bytes of a request's head, and of the buffers of a connection.
const BUFFER: usize = 16 << 10;

/// A connection as the others see it.
#[derive(Debug)]
struct Connection {
    /// `None`: of the metrics port, whose clients have no name.
    peer: Option<Peer>,
    progress: Mutex<Progress>,
    in_flight: AtomicUsize,
    /// Whether the body of the request in flight has not arrived yet.
    is_arriving: AtomicBool,
    close: Notify,
}

#[derive(Debug)]
struct Progress {
    /// Since when no whole request is in flight.
    idle_since: Instant,
    requests: u64,
    /// Since when the client takes no byte.
    stalled_since: Option<Instant>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic while the lock was held leaves whole values.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Connection {
    fn new(peer: Option<Peer>) -> Self {
        let progress = Progress { idle_since: Instant::now(), requests: 0, stalled_since: None };
        Self {
            peer,
            progress: Mutex::new(progress),
            in_flight: AtomicUsize::new(0),
            is_arriving: AtomicBool::new(false),
            close: Notify::new(),
        }
    }

    fn holds_leases(&self) -> bool {
        self.peer.as_ref().is_some_and(Peer::holds_leases)
    }

    /// Since when it could be closed for another one.
    fn idle_since(&self) -> Option<Instant> {
        let waits = self.in_flight.load(Ordering::Relaxed) == 0 || self.is_arriving.load(Ordering::Relaxed);
        let idle = waits && !self.holds_leases();
        idle.then(|| lock(&self.progress).idle_since)
    }

    fn has_request(&self) -> bool {
        self.in_flight.load(Ordering::Relaxed) > 0
    }

    /// Whether the client is too slow.
    fn is_overdue(&self) -> bool {
        let (idle_since, first, stalled_since) = {
            let progress = lock(&self.progress);
            (progress.idle_since, progress.requests == 0, progress.stalled_since)
        };
        if self.has_request() {
            return stalled_since.is_some_and(|since| since.elapsed() >= STALLED);
        }
        let most = if first { FIRST_REQUEST } else { IDLE };
        idle_since.elapsed() >= most && !self.holds_leases()
    }
}

/// A request in flight, until its answer is sent.
struct InFlight(Arc<Connection>);

impl InFlight {
    fn begin(connection: &Arc<Connection>, arriving: bool) -> Self {
        let mut progress = lock(&connection.progress);
        progress.requests += 1;
        // The client has done something.
        progress.idle_since = Instant::now();
        drop(progress);
        connection.is_arriving.store(arriving, Ordering::Relaxed);
        connection.in_flight.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(connection))
    }

    /// Returns its argument: a closure that calls it keeps the request in flight.
    fn pass<T>(&self, frame: T) -> T {
        frame
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        lock(&self.0.progress).idle_since = Instant::now();
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Large answers that may be in the making at a time: each class of clients has its own, so that none waits for another class.
#[derive(Clone, Debug)]
pub(super) struct LargeAnswers(pub(super) Arc<Semaphore>);

impl Default for LargeAnswers {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(1)))
    }
}

/// A client that has a share of the connections: whether it is an operator, and its name; the metrics port knows none.
type Client = (bool, Option<Name>);

/// Connections by client.
#[derive(Debug, Default)]
struct Admitted {
    clients: HashMap<Client, BTreeMap<u64, Arc<Connection>>>,
    /// Clients with all their connections, and when the first of these may make room for another one.
    full: HashMap<Client, Instant>,
    /// Of all clients.
    all: usize,
    /// Of those that are no operators.
    others: usize,
    next: u64,
}

/// All connections of a socket.
#[derive(Debug)]
pub(crate) struct Connections {
    admitted: Mutex<Admitted>,
    of_operators: LargeAnswers,
    of_others: LargeAnswers,
    stalled: Arc<AtomicU64>,
}

/// A connection in the list of all, until it is dropped.
struct Listed {
    connections: Arc<Connections>,
    client: Client,
    id: u64,
    connection: Arc<Connection>,
}

impl Drop for Listed {
    fn drop(&mut self) {
        lock(&self.connections.admitted).remove(&self.client, self.id);
    }
}

impl Connections {
    /// `stalled`: counts clients that took no byte.
    pub(crate) fn new(stalled: Arc<AtomicU64>) -> Self {
        Self {
            admitted: Mutex::default(),
            of_operators: LargeAnswers::default(),
            of_others: LargeAnswers::default(),
            stalled,
        }
    }

    /// Whether a client has all its connections, and none that makes room for another one. A look-up: a client that connects all
    /// the time fills the queue of the listener, in which others wait behind it.
    pub(super) fn is_full(&self, name: Name) -> bool {
        lock(&self.admitted).full.get(&(false, Some(name))).is_some_and(|until| Instant::now() < *until)
    }

    /// Takes a connection in, if there is room for it or room can be made.
    fn admit(self: &Arc<Self>, peer: Option<Peer>) -> Option<Listed> {
        let operator = peer.as_ref().is_some_and(Peer::is_operator);
        let client = (operator, peer.as_ref().map(|peer| peer.name().clone()));
        // Pods need descriptors, too: the connections, with two each, have a quarter of them at most.
        let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX) / 8;
        let most = MAX_CONNECTIONS.min(usize::try_from(descriptors).unwrap_or(usize::MAX));
        let mut admitted = lock(&self.admitted);
        if !operator {
            if admitted.clients.get(&client).is_some_and(|own| own.len() >= MAX_PER_CLIENT)
                && admitted.evict_of(&client, ROOM).is_none()
            {
                admitted.note_full(client);
                return None;
            }
            if admitted.others >= most {
                admitted.evict(|(operator, _)| !operator)?;
            }
        }
        if admitted.all >= most + RESERVED {
            admitted.evict(|(other, _)| operator || !other)?;
        }
        let id = admitted.next;
        let connection = Arc::new(Connection::new(peer));
        admitted.insert(client.clone(), Arc::clone(&connection));
        drop(admitted);
        Some(Listed { connections: Arc::clone(self), client, id, connection })
    }

    /// Serves a connection until one side ends it. `peer`: the client, if it has a name.
    pub(crate) fn serve<S>(self: &Arc<Self>, stream: S, peer: Option<Peer>, router: &Router)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let Some(listed) = self.admit(peer.clone()) else {
            tracing::debug!("the API refuses a connection: too many are in use");
            return;
        };
        let large = match &peer {
            Some(peer) if peer.is_operator() => self.of_operators.clone(),
            _ => self.of_others.clone(),
        };
        let (connection, router) = (Arc::clone(&listed.connection), router.clone());
        let handle = move |request: Request<Incoming>| {
            let in_flight = InFlight::begin(&connection, !request.body().is_end_stream());
            let (mut router, connection) = (router.clone(), Arc::clone(&connection));
            let mut request = request.map(|body| Body::new(Arriving { body, connection }));
            request.extensions_mut().insert(large.clone());
            if let Some(peer) = &peer {
                request.extensions_mut().insert(ConnectInfo(peer.clone()));
            }
            async move {
                let response = router.call(request).await?;
                // It is in flight until its body is sent.
                Ok::<_, Infallible>(response.map(|body| body.map_frame(move |frame| in_flight.pass(frame))))
            }
        };
        let stalled = Arc::clone(&self.stalled);
        let stream = Watched { stream, connection: Arc::clone(&listed.connection) };
        tokio::spawn(async move {
            let mut served = std::pin::pin!(
                http1::Builder::new()
                    .header_read_timeout(None)
                    .max_buf_size(BUFFER)
                    .serve_connection(TokioIo::new(stream), service_fn(handle))
            );
            let mut look = tokio::time::interval(LOOK);
            loop {
                tokio::select! {
                    ended = &mut served => {
                        if let Err(error) = ended {
                            tracing::debug!(%error, "a connection of the API broke");
                        }
                        return;
                    }
                    () = listed.connection.close.notified() => return,
                    _ = look.tick() => if listed.connection.is_overdue() {
                        if listed.connection.has_request() {
                            stalled.fetch_add(1, Ordering::Relaxed);
                        }
                        return;
                    }
                }
            }
        });
    }
}

impl Admitted {
    fn insert(&mut self, client: Client, connection: Arc<Connection>) {
        self.all += 1;
        self.others += usize::from(!client.0);
        self.clients.entry(client).or_default().insert(self.next, connection);
        self.next += 1;
    }

    /// Removes a connection, unless it is not there any more.
    fn remove(&mut self, client: &Client, id: u64) -> Option<Arc<Connection>> {
        let own = self.clients.get_mut(client)?;
        let connection = own.remove(&id)?;
        self.full.remove(client);
        if own.is_empty() {
            self.clients.remove(client);
        }
        self.all -= 1;
        self.others -= usize::from(!client.0);
        Some(connection)
    }

    /// Notes that a client has all its connections. None is idle for [`ROOM`], so none is before this time, unless it ends.
    fn note_full(&mut self, client: Client) {
        let own = self.clients.get(&client).into_iter().flat_map(BTreeMap::values);
        let first = own.filter_map(|connection| connection.idle_since()).min();
        // One that is busy now is idle for that time at the earliest after it.
        self.full.insert(client, first.unwrap_or_else(Instant::now) + ROOM);
    }

    /// Closes a connection of the client that has most of these and any idle; `None` if none is idle.
    fn evict(&mut self, of: impl Fn(&Client) -> bool) -> Option<()> {
        let clients = self.clients.iter().filter(|(client, _)| of(client));
        let mut clients: Vec<_> = clients.map(|(client, own)| (Reverse(own.len()), client.clone())).collect();
        clients.sort_unstable_by_key(|(count, _)| *count);
        clients.into_iter().find_map(|(_, client)| self.evict_of(&client, Duration::ZERO))
    }

    /// Closes the connection of a client that is idle for the longest time; `None` if none is idle for `least`.
    fn evict_of(&mut self, client: &Client, least: Duration) -> Option<()> {
        let own = self.clients.get(client)?.iter();
        let idle = own.filter_map(|(id, connection)| Some((connection.idle_since()?, *id))).min();
        let (_, id) = idle.filter(|(since, _)| since.elapsed() >= least)?;
        self.remove(client, id)?.close.notify_one();
        Some(())
    }
}

/// The body of a request, on its way.
struct Arriving {
    body: Incoming,
    connection: Arc<Connection>,
}

impl hyper::body::Body for Arriving {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        if frame.is_none() || self.body.is_end_stream() {
            self.connection.is_arriving.store(false, Ordering::Relaxed);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Notes when the client takes no bytes.
struct Watched<S> {
    stream: S,
    connection: Arc<Connection>,
}

impl<S> Watched<S> {
    fn note(&self, pending: bool) {
        let stalled = &mut lock(&self.connection.progress).stalled_since;
        *stalled = if pending { stalled.or_else(|| Some(Instant::now())) } else { None };
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.note(written.is_pending());
        Poll::Ready(ready!(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
