//! The pool as the agent serves it: leases, who holds what.

use std::{
    collections::{HashMap, hash_map::Entry},
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bridge_common::{
    pool::{self, Destination, Event, Refusal},
    protocol,
};
use ipnet::IpNet;
use tokio::sync::{Notify, broadcast};

pub use super::client::{Client, Holding, LeaseRequest, LeasedPort, PoolEvent, ServiceError, Transport};
use crate::kernel::{
    clock,
    netlink::{Namespace, NamespaceWatch},
};

use super::{
    Settings,
    backend::{Backend, Claimed},
    checks::Warning,
    kernel::KernelPoolError,
    layout::Layout,
    owner::{self, Owner},
    remedy::Recent,
    summary::{Leases, Summary},
    tables::lock,
};

/// How many events a slow watcher may be behind before it misses some.
const WATCH_BACKLOG: usize = 1024;

/// Pause between two tries of a request that waits for a port: hooked sockets release ports without a notification.
const WAIT_STEP: Duration = Duration::from_millis(10);

/// A lease that is not over.
struct HeldLease {
    claimed: Claimed,
    client: ShareKey,
    group: u64,
    connection: Option<u64>,
    until: Option<Instant>,
    since: Instant,
    owner: Owner,
    netns: Option<u64>,
    /// Its [`Namespace::number`]; `None` if the lease does not end with it.
    namespace: Option<i32>,
    destination: SocketAddr,
    transport: Transport,
}

/// Most leases of one client at once, over all destinations.
pub const MAX_LEASES: usize = 1024;

/// Leases that the table has room for.
const ALL_LEASES: usize = 65_536;

/// The unit that has a share of the leases: a network namespace, and in the agent's own one a user. Processes of a pod can
/// change their user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ShareKey {
    netns: Option<u64>,
    uid: Option<u32>,
}

impl ShareKey {
    fn of(client: &Client) -> Self {
        let own = client.netns.is_some() && client.netns == owner::own_netns();
        Self { netns: client.netns, uid: own.then_some(client.uid) }
    }
}

/// The pool as the agent serves it.
pub struct Service {
    backend: Backend,
    networks: Mutex<Vec<IpNet>>,
    leases: Mutex<HashMap<u64, HeldLease>>,
    /// Numbers of leases that end with a connection, by connection.
    of_connections: Mutex<HashMap<u64, usize>>,
    next: AtomicU64,
    namespaces: Mutex<Option<NamespaceWatch>>,
    freed: Notify,
    changed: Notify,
    /// Whether a port was refused since [`Service::take_starved`].
    starved: AtomicBool,
    events: broadcast::Sender<PoolEvent>,
    counted: Mutex<Leases>,
    warnings: Mutex<Vec<String>>,
    recent: Mutex<Recent>,
    /// Why pins are missing.
    unpinned: Mutex<Option<String>>,
    /// The sentence for `status` while the masquerade table cannot be installed again.
    masquerade_failure: Mutex<Option<String>>,
    masquerade_repairs: AtomicU64,
    /// Hooked and waiting.
    pods: Mutex<(usize, usize)>,
}

impl std::fmt::Debug for Service {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Service").field("backend", &self.backend).finish_non_exhaustive()
    }
}

impl Service {
    /// Serves ports of `backend` towards these networks.
    #[must_use]
    pub fn new(backend: Backend, networks: Vec<IpNet>) -> Arc<Self> {
        Arc::new(Self {
            backend,
            networks: Mutex::new(networks),
            leases: Mutex::default(),
            of_connections: Mutex::default(),
            next: AtomicU64::new(1),
            namespaces: Mutex::default(),
            freed: Notify::new(),
            changed: Notify::new(),
            starved: AtomicBool::new(false),
            events: broadcast::channel(WATCH_BACKLOG).0,
            counted: Mutex::default(),
            warnings: Mutex::default(),
            recent: Mutex::default(),
            unpinned: Mutex::default(),
            masquerade_failure: Mutex::default(),
            masquerade_repairs: AtomicU64::default(),
            pods: Mutex::default(),
        })
    }

    /// Where the ports come from.
    #[must_use]
    pub fn backend(&self) -> &Backend {
        &self.backend
    }

    /// The destinations of the pool.
    #[must_use]
    pub fn networks(&self) -> Vec<IpNet> {
        lock(&self.networks).clone()
    }

    /// Subscribes to the events from now on.
    #[must_use]
    pub fn watch(&self) -> broadcast::Receiver<PoolEvent> {
        self.events.subscribe()
    }

    /// Goes over to other settings. Ports that are held stay held; those that left the pool are not given out again.
    ///
    /// # Errors
    /// Before anything was changed: the ports do not fit. Else an error of the kernel.
    pub fn change(&self, settings: &Settings, layout: Layout) -> Result<(), KernelPoolError> {
        self.backend.change(settings, layout)?;
        lock(&self.networks).clone_from(&settings.destinations);
        self.changed.notify_one();
        self.freed.notify_waiters();
        Ok(())
    }

    /// Has the next sweep begin soon.
    pub(super) fn sweep_soon(&self) {
        self.changed.notify_one();
    }

    /// Waits for the next [`Service::change`], or [`Service::sweep_soon`].
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Returns whether a connect was refused a port since the last call, for want of one or of a slot.
    pub fn take_starved(&self) -> bool {
        self.starved.swap(false, Ordering::Relaxed)
    }

    /// Replaces the warnings about the surroundings of the pool.
    pub fn set_warnings(&self, warnings: &[Warning]) {
        *lock(&self.warnings) = warnings
            .iter()
            .map(|Warning { problem, remedy, .. }| format!("{problem}; remedy: {remedy}"))
            .collect();
    }

    /// Replaces the sentence about missing pins.
    pub fn set_unpinned(&self, why: Option<String>) {
        *lock(&self.unpinned) = why;
    }

    pub(super) fn set_masquerade_failure(&self, sentence: Option<String>) {
        *lock(&self.masquerade_failure) = sentence;
    }

    pub(super) fn count_masquerade_repair(&self) {
        self.masquerade_repairs.fetch_add(1, Ordering::Relaxed);
    }

    /// Says how many pods are hooked because they say so, and how many said so whose control group is not there.
    pub fn set_pods(&self, hooked: usize, waiting: usize) {
        *lock(&self.pods) = (hooked, waiting);
    }

    /// The pool in figures.
    ///
    /// # Errors
    /// A system call fails.
    pub fn summary(&self) -> Result<Summary, KernelPoolError> {
        let mut summary = Summary::of(&self.backend)?;
        summary.destinations = self.networks();
        summary.leases = *lock(&self.counted);
        (summary.pods.hooked, summary.pods.waiting) = *lock(&self.pods);
        summary.warnings.clone_from(&lock(&self.warnings));
        summary.warnings.extend(lock(&self.recent).sentences());
        summary.warnings.extend(lock(&self.unpinned).clone());
        summary.warnings.extend(lock(&self.masquerade_failure).clone());
        summary.masquerade_repairs = self.masquerade_repairs.load(Ordering::Relaxed);
        summary.leases.held = lock(&self.leases).len() as u64;
        Ok(summary)
    }

    /// Takes the ports that are wished for: all of them or none.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn acquire(
        &self,
        client: &Client,
        request: &LeaseRequest,
    ) -> Result<Vec<LeasedPort>, ServiceError> {
        let destination = self.check(request)?;
        let netns = client.netns.ok_or(ServiceError::Stranger)?;
        let owner = Owner::of(client.pid, client.uid, None);
        let group = owner.group();
        self.check_share(client, group, request)?;
        // A lease without a time ends with its connection.
        let namespace = request.time.and_then(|_| self.number_of(client.namespace.as_deref()?));
        let deadline = Instant::now() + request.wait;
        loop {
            let freed = self.freed.notified();
            let claim = || self.claim(&destination, netns, group, request.count);
            // The task that ends leases may be delayed by a long reload.
            let claimed = claim().or_else(|refusal| if self.end_overdue() { claim() } else { Err(refusal) });
            match claimed {
                Ok(claimed) => match self.note(client, (&owner, group, namespace), request, &claimed) {
                    Ok(leased) => return Ok(leased),
                    Err(error) => {
                        claimed.iter().for_each(|port| self.backend.release(port));
                        self.refused(client, request, Refusal::LEASES);
                        return Err(error);
                    }
                },
                Err(refusal) if Instant::now() >= deadline => {
                    self.refused(client, request, refusal);
                    return Err(ServiceError::Refused(refusal));
                }
                Err(_) => {
                    let step = WAIT_STEP.min(deadline.saturating_duration_since(Instant::now()));
                    let _ = tokio::time::timeout(step, freed).await;
                }
            }
        }
    }

    fn check(&self, request: &LeaseRequest) -> Result<Destination, ServiceError> {
        let to = SocketAddr::new(request.destination.ip().to_canonical(), request.destination.port());
        let networks = lock(&self.networks);
        if to.port() == 0 || !networks.iter().any(|network| network.contains(&to.ip())) {
            let networks = networks.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            return Err(ServiceError::NotADestination { destination: request.destination, networks });
        }
        let available = self.backend.layout().ports.len();
        if request.count > available {
            return Err(ServiceError::TooMany { count: request.count, available });
        }
        Ok(destination(to, request.transport))
    }

    /// Whether the client may hold these ports in addition to its leases.
    fn check_share(&self, client: &Client, group: u64, request: &LeaseRequest) -> Result<(), ServiceError> {
        let mut result = share(&lock(&self.leases), client, group, request.count);
        if result.is_err() && self.end_overdue() {
            result = share(&lock(&self.leases), client, group, request.count);
        }
        if result.is_err() {
            self.refused(client, request, Refusal::LEASES);
        }
        result
    }

    fn claim(
        &self,
        destination: &Destination,
        netns: u64,
        group: u64,
        count: u32,
    ) -> Result<Vec<Claimed>, Refusal> {
        let mut claimed = Vec::new();
        for _ in 0..count {
            match self.backend.acquire(destination, netns, group) {
                Ok(port) => claimed.push(port),
                Err(refusal) => {
                    claimed.iter().for_each(|port| self.backend.release(port));
                    return Err(refusal);
                }
            }
        }
        Ok(claimed)
    }

    /// Enters claimed ports as leases, unless requests at the same time have used up the client's share.
    fn note(
        &self,
        client: &Client,
        (owner, group, namespace): (&Owner, u64, Option<i32>),
        request: &LeaseRequest,
        claimed: &[Claimed],
    ) -> Result<Vec<LeasedPort>, ServiceError> {
        let now = Instant::now();
        let key = ShareKey::of(client);
        let mut leases = lock(&self.leases);
        share(&leases, client, group, request.count)?;
        lock(&self.counted).acquired += claimed.len() as u64;
        let note = |claimed: &Claimed| {
            let id = self.next.fetch_add(1, Ordering::Relaxed);
            let lease = HeldLease {
                claimed: *claimed,
                client: key,
                group,
                connection: request.time.is_none().then_some(client.connection),
                until: request.time.map(|time| now + time),
                since: now,
                owner: owner.clone(),
                netns: client.netns,
                namespace,
                destination: request.destination,
                transport: request.transport,
            };
            let leased = leased(id, &lease, now);
            leases.insert(id, lease);
            // An error means that there is no watcher.
            let _ = self.events.send(PoolEvent::Acquired { lease: leased.clone(), pid: client.pid });
            leased
        };
        if request.time.is_none() {
            *lock(&self.of_connections).entry(client.connection).or_default() += claimed.len();
        }
        Ok(claimed.iter().map(note).collect())
    }

    fn refused(&self, client: &Client, request: &LeaseRequest, refusal: Refusal) {
        let owner = Owner::of(client.pid, client.uid, None);
        lock(&self.counted).count_refusal(refusal);
        lock(&self.recent).note(refusal, owner.group(), request.destination, &owner.command, client.pid);
        let _ = self.events.send(PoolEvent::Refused {
            reason: refusal.name(),
            destination: request.destination,
            protocol: request.transport,
            pid: client.pid,
            uid: client.uid,
            command: owner.command,
        });
    }

    /// Ends a lease before its time.
    ///
    /// # Errors
    /// There is none, or it belongs to another user, pod or network namespace; an operator may end all.
    pub fn release(&self, client: &Client, operator: bool, id: u64) -> Result<(), ServiceError> {
        let pod = Owner::of(client.pid, client.uid, None).pod;
        match lock(&self.leases).get(&id) {
            None => return Err(ServiceError::NoLease(id)),
            Some(HeldLease { owner, netns, .. })
                if !operator && (owner.uid, *netns, &owner.pod) != (client.uid, client.netns, &pod) =>
            {
                return Err(ServiceError::NotYours(id));
            }
            Some(_) => {}
        }
        self.end("released", |lease, _| lease == id);
        Ok(())
    }

    /// Whether a connection holds leases that end with it.
    pub(crate) fn holds(&self, connection: u64) -> bool {
        lock(&self.of_connections).contains_key(&connection)
    }

    /// Ends the leases of a client that has hung up.
    pub fn hang_up(&self, connection: u64) {
        if self.holds(connection) {
            self.end("connection closed", |_, lease| lease.connection == Some(connection));
        }
    }

    /// The number by which the end of a client's network namespace is reported.
    fn number_of(&self, namespace: &Namespace) -> Option<i32> {
        let mut watch = lock(&self.namespaces);
        if watch.is_none() {
            *watch = NamespaceWatch::open().ok();
        }
        watch.as_ref()?;
        drop(watch);
        let number = namespace.number();
        // Another namespace may have had this number before.
        self.end_without_namespace();
        number.inspect_err(|error| tracing::debug!(%error, "a lease outlives its network namespace")).ok()
    }

    /// Ends the leases whose network namespace has ended: they are good for no other.
    fn end_without_namespace(&self) {
        let ended = lock(&self.namespaces).as_mut().map(NamespaceWatch::ended).unwrap_or_default();
        if !ended.is_empty() {
            let has_ended = |lease: &HeldLease| lease.namespace.is_some_and(|number| ended.contains(&number));
            self.end("network namespace ended", |_, lease| has_ended(lease));
        }
    }

    /// Ends the leases whose time is over, or whose network namespace has ended; answers when the next one is.
    pub fn expire(&self) -> Option<Instant> {
        self.end_without_namespace();
        self.end_overdue();
        lock(&self.leases).values().filter_map(|lease| lease.until).min()
    }

    /// Whether there was any.
    fn end_overdue(&self) -> bool {
        let now = Instant::now();
        self.end("expired", |_, lease| lease.until.is_some_and(|until| until <= now)) > 0
    }

    fn end(&self, reason: &'static str, which: impl Fn(u64, &HeldLease) -> bool) -> usize {
        let ended: Vec<(u64, HeldLease)> =
            lock(&self.leases).extract_if(|id, lease| which(*id, lease)).collect();
        for (id, lease) in &ended {
            self.backend.release(&lease.claimed);
            if let Some(connection) = lease.connection {
                let mut of_connections = lock(&self.of_connections);
                if let Entry::Occupied(mut held) = of_connections.entry(connection) {
                    *held.get_mut() -= 1;
                    if *held.get() == 0 {
                        held.remove();
                    }
                }
            }
            lock(&self.counted).released += 1;
            let _ = self.events.send(PoolEvent::Released { id: *id, port: lease.claimed.port, reason });
            self.freed.notify_waiters();
        }
        ended.len()
    }

    /// Every port in use: leases, and the connections of hooked sockets.
    ///
    /// # Errors
    /// This kernel cannot list the ports that sockets hold.
    pub fn list(&self) -> io::Result<Vec<Holding>> {
        let now = Instant::now();
        let mut list: Vec<Holding> = lock(&self.leases)
            .iter()
            .map(|(id, lease)| Holding {
                kind: "lease",
                id: Some(*id),
                port: lease.claimed.port,
                destination: Some(lease.destination),
                protocol: lease.transport,
                owner: lease.owner.clone(),
                age_ms: millis(now - lease.since),
            })
            .collect();
        let monotonic = clock::monotonic();
        let layout = self.backend.layout();
        for lease in self.backend.sockets().map_err(io::Error::other)? {
            list.push(Holding {
                kind: "socket",
                id: None,
                port: layout.port(lease.index),
                destination: (lease.state & pool::LEASE_ANY == 0).then(|| socket_addr(&lease.destination)),
                protocol: transport(&lease.destination),
                owner: Owner::of(lease.pid, lease.uid, Some(text(&lease.comm))),
                age_ms: millis(monotonic.saturating_sub(Duration::from_nanos(lease.since_ns))),
            });
        }
        list.sort_by_key(|holding| (holding.destination, holding.port));
        Ok(list)
    }

    /// Sends an event of the hooks to watchers, and keeps it for `status`.
    pub fn report(&self, event: &Event) {
        let (to, refusal) = (socket_addr(&event.destination), Refusal(event.refusal));
        if matches!(refusal, Refusal::EXHAUSTED | Refusal::TABLE_FULL | Refusal::SHARE) {
            self.starved.store(true, Ordering::Relaxed);
        }
        lock(&self.recent).note(refusal, event.cgroup_id, to, &text(&event.comm), event.pid);
        let _ = self.events.send(PoolEvent::Refused {
            reason: Refusal(event.refusal).name(),
            destination: socket_addr(&event.destination),
            protocol: transport(&event.destination),
            pid: event.pid,
            uid: event.uid,
            command: text(&event.comm),
        });
    }
}

/// Whether a client may hold `count` more leases. All namespaces of a group together leave a quarter of the table to others.
fn share(
    leases: &HashMap<u64, HeldLease>,
    client: &Client,
    group: u64,
    count: u32,
) -> Result<(), ServiceError> {
    let key = ShareKey::of(client);
    let held = leases.values().filter(|lease| lease.client == key).count();
    if held + count as usize > MAX_LEASES {
        return Err(ServiceError::Share { held, count, limit: MAX_LEASES });
    }
    let held = leases.values().filter(|lease| lease.group == group).count();
    let others = leases.len() - held;
    let limit = (ALL_LEASES - others.min(ALL_LEASES)) * 3 / 4;
    if held + count as usize > limit {
        return Err(ServiceError::Share { held, count, limit });
    }
    Ok(())
}

fn leased(id: u64, lease: &HeldLease, now: Instant) -> LeasedPort {
    LeasedPort {
        id,
        port: lease.claimed.port,
        destination: lease.destination,
        protocol: lease.transport,
        expires_in_ms: lease.until.map(|until| millis(until.saturating_duration_since(now))),
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Returns the name of a thread, which any program chooses: without characters that a terminal acts on.
fn text(bytes: &[u8]) -> String {
    owner::printable(&String::from_utf8_lossy(bytes.split(|byte| *byte == 0).next().unwrap_or_default()))
}

pub(super) fn destination(address: SocketAddr, transport: Transport) -> Destination {
    let ip = match address.ip() {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    };
    let protocol = match transport {
        Transport::Tcp => protocol::TCP,
        Transport::Udp => protocol::UDP,
    };
    Destination::from_network(ip.octets(), address.port().to_be_bytes(), protocol)
}

fn socket_addr(destination: &Destination) -> SocketAddr {
    SocketAddr::new(Ipv6Addr::from(destination.address()).to_canonical(), destination.port())
}

fn transport(destination: &Destination) -> Transport {
    if destination.protocol() == protocol::UDP { Transport::Udp } else { Transport::Tcp }
}
