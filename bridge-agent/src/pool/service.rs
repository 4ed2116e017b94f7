//! The pool as the agent serves it: leases, who holds what.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bridge_common::pool::{self, Destination, Event, Refusal};
use ipnet::IpNet;
use tokio::sync::{Notify, broadcast};

pub use super::client::{Client, Happening, Holding, Leased, ServiceError, Transport, Wish};
use crate::kernel::clock;

use super::{
    Settings,
    backend::{Backend, Claimed},
    checks::Warning,
    kernel::KernelPoolError,
    layout::Layout,
    owner::Owner,
    summary::{Leases, Summary},
    tables::lock,
};

/// How many happenings a slow watcher may be behind before it misses some.
const WATCH_BACKLOG: usize = 1024;

/// How often a request that waits for a port looks again: ports that hooked sockets give back announce nothing.
const WAIT_STEP: Duration = Duration::from_millis(10);

struct Lease {
    claimed: Claimed,
    connection: Option<u64>,
    until: Option<Instant>,
    since: Instant,
    owner: Owner,
    netns: Option<u64>,
    destination: SocketAddr,
    transport: Transport,
}

/// The pool as the agent serves it.
pub struct Service {
    backend: Backend,
    networks: Mutex<Vec<IpNet>>,
    leases: Mutex<HashMap<u64, Lease>>,
    next: AtomicU64,
    freed: Notify,
    changed: Notify,
    happenings: broadcast::Sender<Happening>,
    counted: Mutex<Leases>,
    warnings: Mutex<Vec<String>>,
    /// Why pins are missing.
    unpinned: Mutex<Option<String>>,
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
            next: AtomicU64::new(1),
            freed: Notify::new(),
            changed: Notify::new(),
            happenings: broadcast::channel(WATCH_BACKLOG).0,
            counted: Mutex::default(),
            warnings: Mutex::default(),
            unpinned: Mutex::default(),
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

    /// What happens from now on.
    #[must_use]
    pub fn watch(&self) -> broadcast::Receiver<Happening> {
        self.happenings.subscribe()
    }

    /// Goes over to other settings. Ports that are held stay held; those that left the pool are not given out again.
    ///
    /// # Errors
    /// Before anything was changed: the ports do not fit. Else what the kernel says.
    pub fn change(&self, settings: &Settings, layout: Layout) -> Result<(), KernelPoolError> {
        self.backend.change(settings, layout)?;
        lock(&self.networks).clone_from(&settings.destinations);
        self.changed.notify_one();
        self.freed.notify_waiters();
        Ok(())
    }

    /// Waits for the next [`Service::change`].
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Says what spoils the pool.
    pub fn set_warnings(&self, warnings: &[Warning]) {
        *lock(&self.warnings) = warnings
            .iter()
            .map(|Warning { problem, remedy, .. }| format!("{problem}; remedy: {remedy}"))
            .collect();
    }

    /// Says why pins are missing, if they are.
    pub fn set_unpinned(&self, why: Option<String>) {
        *lock(&self.unpinned) = why;
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
        summary.warnings.extend(lock(&self.unpinned).clone());
        summary.leases.held = lock(&self.leases).len() as u64;
        Ok(summary)
    }

    /// Takes the ports that are wished for: all of them or none.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn acquire(&self, client: &Client, wish: &Wish) -> Result<Vec<Leased>, ServiceError> {
        let destination = self.check(wish)?;
        let netns = client.netns.ok_or(ServiceError::Stranger)?;
        let deadline = Instant::now() + wish.wait;
        loop {
            let freed = self.freed.notified();
            let claimed = self.claim(&destination, netns, wish.count).or_else(|refusal| {
                // The periodic sweep may be busy, with many rules for instance.
                if self.end_overdue() { self.claim(&destination, netns, wish.count) } else { Err(refusal) }
            });
            match claimed {
                Ok(claimed) => return Ok(self.note(client, wish, claimed)),
                Err(refusal) if Instant::now() >= deadline => {
                    self.refused(client, wish, refusal);
                    return Err(ServiceError::Refused(refusal));
                }
                Err(_) => {
                    let step = WAIT_STEP.min(deadline.saturating_duration_since(Instant::now()));
                    let _ = tokio::time::timeout(step, freed).await;
                }
            }
        }
    }

    fn check(&self, wish: &Wish) -> Result<Destination, ServiceError> {
        let to = SocketAddr::new(wish.destination.ip().to_canonical(), wish.destination.port());
        let networks = lock(&self.networks);
        if to.port() == 0 || !networks.iter().any(|network| network.contains(&to.ip())) {
            let networks = networks.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            return Err(ServiceError::NotADestination { destination: wish.destination, networks });
        }
        let available = self.backend.layout().ports.len();
        if wish.count > available {
            return Err(ServiceError::TooMany { count: wish.count, available });
        }
        Ok(destination(to, wish.transport))
    }

    fn claim(&self, destination: &Destination, netns: u64, count: u32) -> Result<Vec<Claimed>, Refusal> {
        let mut claimed = Vec::new();
        for _ in 0..count {
            match self.backend.acquire(destination, netns) {
                Ok(port) => claimed.push(port),
                Err(refusal) => {
                    claimed.iter().for_each(|port| self.backend.release(port));
                    return Err(refusal);
                }
            }
        }
        Ok(claimed)
    }

    fn note(&self, client: &Client, wish: &Wish, claimed: Vec<Claimed>) -> Vec<Leased> {
        let owner = Owner::of(client.pid, client.uid, None);
        let now = Instant::now();
        lock(&self.counted).acquired += claimed.len() as u64;
        let mut leases = lock(&self.leases);
        let note = |claimed: Claimed| {
            let id = self.next.fetch_add(1, Ordering::Relaxed);
            let lease = Lease {
                claimed,
                connection: wish.time.is_none().then_some(client.connection),
                until: wish.time.map(|time| now + time),
                since: now,
                owner: owner.clone(),
                netns: client.netns,
                destination: wish.destination,
                transport: wish.transport,
            };
            let leased = leased(id, &lease, now);
            leases.insert(id, lease);
            // Nobody may be watching.
            let _ = self.happenings.send(Happening::Acquired { lease: leased.clone(), pid: client.pid });
            leased
        };
        claimed.into_iter().map(note).collect()
    }

    fn refused(&self, client: &Client, wish: &Wish, refusal: Refusal) {
        let owner = Owner::of(client.pid, client.uid, None);
        lock(&self.counted).count_refusal(refusal);
        let _ = self.happenings.send(Happening::Refused {
            reason: refusal.name(),
            destination: wish.destination,
            protocol: wish.transport,
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
            Some(Lease { owner, netns, .. })
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
        lock(&self.leases).values().any(|lease| lease.connection == Some(connection))
    }

    /// Ends the leases of a client that has hung up.
    pub fn hang_up(&self, connection: u64) {
        self.end("connection closed", |_, lease| lease.connection == Some(connection));
    }

    /// Ends the leases whose time is over; answers when the next one is.
    pub fn expire(&self) -> Option<Instant> {
        self.end_overdue();
        lock(&self.leases).values().filter_map(|lease| lease.until).min()
    }

    /// Whether there was any.
    fn end_overdue(&self) -> bool {
        let now = Instant::now();
        self.end("expired", |_, lease| lease.until.is_some_and(|until| until <= now)) > 0
    }

    fn end(&self, reason: &'static str, which: impl Fn(u64, &Lease) -> bool) -> usize {
        let ended: Vec<(u64, Lease)> = lock(&self.leases).extract_if(|id, lease| which(*id, lease)).collect();
        for (id, lease) in &ended {
            self.backend.release(&lease.claimed);
            lock(&self.counted).released += 1;
            let _ = self.happenings.send(Happening::Released { id: *id, port: lease.claimed.port, reason });
            self.freed.notify_waiters();
        }
        ended.len()
    }

    /// Every port in use: leases, and the connections of hooked sockets.
    ///
    /// # Errors
    /// This kernel cannot tell which ports sockets hold.
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

    /// Passes on what a hook has reported.
    pub fn report(&self, event: &Event) {
        let _ = self.happenings.send(Happening::Refused {
            reason: Refusal(event.refusal).name(),
            destination: socket_addr(&event.destination),
            protocol: transport(&event.destination),
            pid: event.pid,
            uid: event.uid,
            command: text(&event.comm),
        });
    }
}

fn leased(id: u64, lease: &Lease, now: Instant) -> Leased {
    Leased {
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

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned()
}

fn destination(address: SocketAddr, transport: Transport) -> Destination {
    let ip = match address.ip() {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    };
    let protocol = match transport {
        Transport::Tcp => pool::TCP,
        Transport::Udp => pool::UDP,
    };
    Destination::from_network(ip.octets(), address.port().to_be_bytes(), protocol)
}

fn socket_addr(destination: &Destination) -> SocketAddr {
    SocketAddr::new(Ipv6Addr::from(destination.address()).to_canonical(), destination.port())
}

fn transport(destination: &Destination) -> Transport {
    if destination.protocol() == pool::UDP { Transport::Udp } else { Transport::Tcp }
}
