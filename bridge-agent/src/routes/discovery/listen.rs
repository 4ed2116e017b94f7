//! The host's side of discovery.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, broadcast, watch};
use tokio::task::{AbortHandle, JoinSet};

use super::message::{Announcement, Answer, Key, Message, Status, Token};
use super::registry::{Entry, Registry, Rules};
use super::{ExchangeError, clock, receive, send, state, within};
use crate::kernel::backoff::Backoff;
use crate::kernel::lock::lock;
use crate::routes::event::{EventKind, RouteEvent};
use crate::routes::model::{DesiredRoute, SourceKind};
use crate::routes::prefix_map::host;
use crate::routes::sources::{Publisher, Source, SourceError};
use crate::routes::status::{Fate, Snapshot};

/// Connections served at a time. One more takes the place of one that has not announced anything yet.
const CONNECTIONS: usize = 256;
/// Announcements of one source that are processed at a time.
const CONNECTIONS_OF_SOURCE: usize = CONNECTIONS / 4;
/// From accepting a connection to its announcement.
const PATIENCE: Duration = Duration::from_secs(5);
/// For the kernel to have the route.
const ROUTE: Duration = Duration::from_secs(3);
/// For the pod to answer the check.
const CHECK: Duration = Duration::from_secs(3);
/// Between two warnings about messages that are not authentic: anybody can send them.
const WARNINGS: Duration = Duration::from_secs(10);

/// How to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// `[::]` takes IPv4 too.
    pub listen: SocketAddr,
    /// Shared with the pods.
    pub key: Key,
    /// What is believed.
    pub rules: Rules,
    /// Whether a pod must be reached through its new route before it counts. Without, anybody who holds the key
    /// can claim any address in `rules.pods`.
    pub check: bool,
    /// Where entries outlive a restart.
    pub state: Option<PathBuf>,
}

/// Counts since the start.
#[derive(Debug, Default)]
pub struct DiscoveryCounters {
    /// Announcements that led to a route.
    pub accepted: AtomicU64,
    /// Authentic announcements that did not.
    pub refused: AtomicU64,
    /// Connections that brought no authentic announcement.
    pub unauthentic: AtomicU64,
    /// Entries that were not renewed.
    pub expired: AtomicU64,
}

/// Takes announcements and publishes a route to each pod.
pub struct Listener {
    /// `None`: the address cannot be bound yet.
    socket: Option<TcpListener>,
    shared: Arc<Shared>,
}

struct Shared {
    options: Mutex<Arc<Options>>,
    registry: Mutex<Registry>,
    status: watch::Receiver<Arc<Snapshot>>,
    events: broadcast::Sender<RouteEvent>,
    counters: Arc<DiscoveryCounters>,
    renewed: Notify,
    warned: Mutex<Option<Instant>>,
    /// Why the address cannot be bound.
    failure: Mutex<Option<String>>,
}

/// The routes to the pods that an earlier run had saved and that have not expired.
#[must_use]
pub fn saved_routes(path: &std::path::Path, rules: &Rules) -> Vec<DesiredRoute> {
    let mut registry = Registry::default();
    match state::load(path, rules.max_lifetime) {
        Ok(entries) => {
            registry.restore(entries);
            registry.forget_outside(&rules.pods);
        }
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "discovery: what was known cannot be read")
        }
    }
    registry.routes()
}

impl DiscoveryCounters {
    /// Name and value of each, for metrics.
    #[must_use]
    pub fn read(&self) -> [(&'static str, u64); 4] {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        [
            ("accepted", get(&self.accepted)),
            ("refused", get(&self.refused)),
            ("unauthentic", get(&self.unauthentic)),
            ("expired", get(&self.expired)),
        ]
    }
}

/// Reads the state of a running [`Listener`], and changes its options.
#[derive(Clone)]
pub struct Handle {
    shared: Arc<Shared>,
}

impl Handle {
    /// Other options, but for the address. Pods that the new rules do not believe are forgotten.
    pub fn adopt(&self, options: Options, publisher: &Publisher) {
        let pods = options.rules.pods.clone();
        *lock(&self.shared.options) = Arc::new(options);
        self.shared.registry().forget_outside(&pods);
        self.shared.publish(publisher);
        self.shared.save();
        self.shared.renewed.notify_one();
    }

    /// Where announcements are taken.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.shared.options().listen
    }

    /// How many pods are known.
    #[must_use]
    pub fn known(&self) -> usize {
        self.shared.registry().entries().count()
    }

    /// Returns why announcements cannot be taken, if that is so now.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        lock(&self.shared.failure).clone()
    }

    /// Counts, for metrics.
    #[must_use]
    pub fn counters(&self) -> Arc<DiscoveryCounters> {
        self.shared.counters.clone()
    }
}

fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = std::net::TcpListener::bind(address)?;
    socket.set_nonblocking(true)?;
    TcpListener::from_std(socket)
}

impl Listener {
    /// Binds, inside a tokio runtime. `status` and `events` are those of the reconciler that gets the routes: an announcement is
    /// answered once the kernel has its route, and refused with the reason if it does not get there.
    pub fn bind(
        options: Options,
        status: watch::Receiver<Arc<Snapshot>>,
        events: broadcast::Sender<RouteEvent>,
    ) -> io::Result<Self> {
        let socket = bind(options.listen)?;
        Ok(Self::new(Some(socket), options, status, events))
    }

    /// As [`bind`](Self::bind), but an address that cannot be bound yet, for instance since its interface comes later, is bound
    /// when that is possible. Routes of pods that are known from an earlier run are published meanwhile.
    #[must_use]
    pub fn bind_eventually(
        options: Options,
        status: watch::Receiver<Arc<Snapshot>>,
        events: broadcast::Sender<RouteEvent>,
    ) -> Self {
        let (address, socket) = (options.listen, bind(options.listen));
        let failure = socket.as_ref().err().map(|error| format!("cannot listen on {address}: {error}"));
        if let Some(reason) = &failure {
            tracing::warn!(reason, "discovery takes no announcements yet; the agent tries again");
        }
        let listener = Self::new(socket.ok(), options, status, events);
        *lock(&listener.shared.failure) = failure;
        listener
    }

    fn new(
        socket: Option<TcpListener>,
        options: Options,
        status: watch::Receiver<Arc<Snapshot>>,
        events: broadcast::Sender<RouteEvent>,
    ) -> Self {
        let shared = Shared {
            options: Mutex::new(Arc::new(options)),
            registry: Mutex::default(),
            status,
            events,
            counters: Arc::default(),
            renewed: Notify::new(),
            warned: Mutex::default(),
            failure: Mutex::default(),
        };
        Self { socket, shared: Arc::new(shared) }
    }

    /// Returns a handle to read its state and change its options while it runs.
    #[must_use]
    pub fn handle(&self) -> Handle {
        Handle { shared: self.shared.clone() }
    }

    async fn serve(self, publisher: Publisher) -> Result<(), SourceError> {
        let Self { mut socket, shared } = self;
        let mut again = Backoff::default();
        if socket.is_none() {
            again.note(false);
        }
        let mut attempt = Instant::now() + again.pause();
        shared.restore();
        shared.publish(&publisher);
        // Conversations end with the listener: none of them publishes after that.
        let mut tasks = JoinSet::new();
        let mut conversations = Conversations::default();
        loop {
            let expiry = shared.registry().next_expiry();
            let expire = async {
                match expiry {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = expire => shared.expire(&publisher),
                () = shared.renewed.notified() => {}
                Some(_) = tasks.join_next() => {}
                () = tokio::time::sleep_until(attempt.into()), if socket.is_none() => {
                    socket = shared.bind();
                    again.note(socket.is_some());
                    attempt = Instant::now() + again.pause();
                }
                accepted = accept(socket.as_ref()) => match accepted {
                    Ok((stream, peer)) => {
                        let source = peer.ip().to_canonical();
                        let Some(claim) = conversations.admit(source) else { continue };
                        let (shared, publisher) = (shared.clone(), publisher.clone());
                        let task = tasks.spawn({
                            let claim = claim.clone();
                            async move { shared.converse(stream, source, &publisher, &claim).await }
                        });
                        conversations.add(source, claim, task);
                    }
                    Err(error) => {
                        // Out of descriptors, or a connection that died in the queue: the next may be well.
                        tracing::warn!(%error, "discovery: cannot accept a connection");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                },
            }
        }
    }
}

/// Accepts a connection; waits for ever without a socket.
async fn accept(socket: Option<&TcpListener>) -> io::Result<(TcpStream, SocketAddr)> {
    match socket {
        Some(socket) => socket.accept().await,
        None => std::future::pending().await,
    }
}

/// Set once, by the task that has received an authentic announcement, or by the listener that closes its connection.
type Claim = Arc<AtomicBool>;

/// The connections that are served. Connections without an announcement cost nothing to their client, so they never keep
/// a pod out: the oldest one of the source that has the most yields its place.
#[derive(Default)]
struct Conversations(Vec<Conversation>);

struct Conversation {
    source: IpAddr,
    claim: Claim,
    task: AbortHandle,
}

impl Conversations {
    /// Returns the claim of a new connection from `source`; `None` if it has to be closed.
    fn admit(&mut self, source: IpAddr) -> Option<Claim> {
        self.0.retain(|conversation| !conversation.task.is_finished());
        let announced = |conversation: &&Conversation| conversation.claim.load(Ordering::Acquire);
        let of_source = self.0.iter().filter(|conversation| conversation.source == source);
        if of_source.filter(announced).count() >= CONNECTIONS_OF_SOURCE {
            return None;
        }
        if self.0.len() >= CONNECTIONS {
            let mut waiting: BTreeMap<IpAddr, (usize, usize)> = BTreeMap::new();
            for (index, conversation) in self.0.iter().enumerate() {
                if !announced(&conversation) {
                    waiting.entry(conversation.source).or_insert((0, index)).0 += 1;
                }
            }
            let (_, oldest) = *waiting.values().max_by_key(|(count, oldest)| (*count, Reverse(*oldest)))?;
            let conversation = self.0.remove(oldest);
            if !conversation.claim.swap(true, Ordering::AcqRel) {
                conversation.task.abort();
            }
        }
        Some(Claim::default())
    }

    fn add(&mut self, source: IpAddr, claim: Claim, task: AbortHandle) {
        self.0.push(Conversation { source, claim, task });
    }
}

impl Source for Listener {
    fn kind(&self) -> SourceKind {
        SourceKind::Discovery
    }

    fn run(
        self: Box<Self>,
        publisher: Publisher,
    ) -> Pin<Box<dyn Future<Output = Result<(), SourceError>> + Send>> {
        Box::pin(self.serve(publisher))
    }
}

impl Shared {
    /// Makes another attempt to bind the address.
    fn bind(&self) -> Option<TcpListener> {
        let address = self.options().listen;
        let bound = bind(address);
        match &bound {
            Ok(_) => tracing::info!(%address, "discovery takes announcements now"),
            Err(error) => tracing::debug!(%error, %address, "discovery still cannot listen"),
        }
        *lock(&self.failure) =
            bound.as_ref().err().map(|error| format!("cannot listen on {address}: {error}"));
        bound.ok()
    }

    fn options(&self) -> Arc<Options> {
        lock(&self.options).clone()
    }

    async fn converse(&self, mut stream: TcpStream, egress: IpAddr, publisher: &Publisher, claim: &Claim) {
        let challenge = rand::random();
        let options = self.options();
        let key = &options.key;
        let announcement = within(PATIENCE, async {
            send(&mut stream, &Message::Hello(challenge), key).await?;
            match receive(&mut stream, key).await? {
                Message::Announcement(announcement) => Ok(announcement),
                _ => Err(ExchangeError::OutOfTurn),
            }
        });
        let announcement = match announcement.await {
            Ok(announcement) => announcement,
            Err(error) => return self.unauthentic(egress, &error),
        };
        if claim.swap(true, Ordering::AcqRel) {
            return;
        }
        let (clock, now) = (clock(), Instant::now());
        let judged = self.registry().judge(&announcement, egress, &challenge, clock, now, &options.rules);
        let outcome = match judged {
            Ok(lifetime) => self
                .admit(&announcement, egress, lifetime, &options, publisher)
                .await
                .map(|text| (lifetime, text)),
            Err(disbelief) => Err(disbelief.to_string()),
        };
        let who = format!("pod {} ({}) from {egress}", announcement.address, announcement.name);
        let (status, lifetime, text) = match outcome {
            Ok((lifetime, text)) => {
                self.counters.accepted.fetch_add(1, Ordering::Relaxed);
                (Status::Accepted, lifetime, text)
            }
            Err(text) => {
                self.counters.refused.fetch_add(1, Ordering::Relaxed);
                self.happened(EventKind::PodRefused, format!("{who}: {text}"));
                (Status::Refused, Duration::ZERO, text)
            }
        };
        let lifetime = u32::try_from(lifetime.as_secs()).unwrap_or(u32::MAX);
        let answer = Answer { nonce: announcement.nonce, status, lifetime, egress: Some(egress), text };
        if let Err(error) = within(PATIENCE, send(&mut stream, &Message::Answer(answer), key)).await {
            tracing::debug!(%error, who, "discovery: the answer was not delivered");
        }
    }

    /// Routes the pod, checks it, and keeps it or takes the route away again.
    async fn admit(
        &self,
        announcement: &Announcement,
        egress: IpAddr,
        lifetime: Duration,
        options: &Options,
        publisher: &Publisher,
    ) -> Result<String, String> {
        let address = announcement.address;
        if options.check && announcement.check_port == 0 {
            return Err(
                "the host checks pods by connecting back, and the announcement names no port for that"
                    .to_owned(),
            );
        }
        let entry = Entry { egress, name: announcement.name.clone(), expires: Instant::now() + lifetime };
        self.registry().begin(address, entry.clone());
        let version = self.publish(publisher);
        let mut outcome = self.routed(address, version).await;
        if outcome.is_ok() && options.check {
            let check = check(announcement, &options.key).await;
            if check.is_err() {
                self.registry().failed(address, egress, Instant::now());
            }
            outcome = outcome.and_then(|text| match check {
                Ok(()) => Ok(text),
                Err(error) => Err(format!(
                    "no proof from {address} port {} through the new route: {error}",
                    announcement.check_port
                )),
            });
        }
        let new = self.registry().finish(address, &entry, outcome.is_ok());
        self.publish(publisher);
        self.renewed.notify_one();
        if outcome.is_ok() {
            self.save();
        }
        if new {
            self.happened(
                EventKind::PodDiscovered,
                format!("pod {address} ({}) via {egress}", announcement.name),
            );
        }
        outcome
    }

    /// Waits until the reconciler has decided about the pod's route.
    async fn routed(&self, address: IpAddr, version: u64) -> Result<String, String> {
        let mut status = self.status.clone();
        let decided =
            tokio::time::timeout(ROUTE, status.wait_for(|snapshot| snapshot.version() >= version)).await;
        match decided {
            Ok(Ok(snapshot)) => match snapshot.fate(host(address)) {
                Some(Fate::Installed(text)) => Ok(text),
                Some(Fate::Not(reason)) => Err(reason),
                None => Err("the route was withdrawn while it was being added".to_owned()),
            },
            Ok(Err(_)) => Err("the host is shutting down".to_owned()),
            Err(_) => Err("the host's kernel did not take the route in time".to_owned()),
        }
    }

    fn expire(&self, publisher: &Publisher) {
        let expired = self.registry().expire(Instant::now());
        for (address, entry) in &expired {
            self.counters.expired.fetch_add(1, Ordering::Relaxed);
            self.happened(
                EventKind::PodExpired,
                format!("pod {address} ({}) via {}", entry.name, entry.egress),
            );
        }
        if !expired.is_empty() {
            self.publish(publisher);
            self.save();
        }
    }

    fn publish(&self, publisher: &Publisher) -> u64 {
        // Under the lock, so that what is published last is what is true last.
        let registry = self.registry();
        publisher.publish(registry.routes())
    }

    fn restore(&self) {
        let options = self.options();
        let Some(path) = &options.state else { return };
        match state::load(path, options.rules.max_lifetime) {
            Ok(entries) => {
                let mut registry = self.registry();
                registry.restore(entries);
                registry.forget_outside(&options.rules.pods);
            }
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "discovery: starting without what was known before")
            }
        }
    }

    fn save(&self) {
        let options = self.options();
        let Some(path) = &options.state else { return };
        if let Err(error) = state::save(path, self.registry().entries()) {
            tracing::warn!(path = %path.display(), %error, "discovery: what is known will not outlive a restart");
        }
    }

    fn unauthentic(&self, egress: IpAddr, error: &ExchangeError) {
        self.counters.unauthentic.fetch_add(1, Ordering::Relaxed);
        let now = Instant::now();
        let mut warned = lock(&self.warned);
        if warned.is_none_or(|last| now - last >= WARNINGS) {
            *warned = Some(now);
            drop(warned);
            self.happened(EventKind::PodRefused, format!("connection from {egress}: {error}"));
        }
    }

    fn happened(&self, kind: EventKind, text: String) {
        tracing::info!(?kind, "{text}");
        // An event without a receiver is dropped.
        _ = self.events.send(RouteEvent::now(kind, text));
    }

    fn registry(&self) -> std::sync::MutexGuard<'_, Registry> {
        lock(&self.registry)
    }
}

async fn check(announcement: &Announcement, key: &Key) -> Result<(), ExchangeError> {
    let token = Token { nonce: announcement.nonce, challenge: rand::random() };
    within(CHECK, async {
        let mut stream = TcpStream::connect((announcement.address, announcement.check_port)).await?;
        send(&mut stream, &Message::Check(token), key).await?;
        match receive(&mut stream, key).await? {
            Message::Proof(proof) if proof == token => Ok(()),
            _ => Err(ExchangeError::OutOfTurn),
        }
    })
    .await
}
