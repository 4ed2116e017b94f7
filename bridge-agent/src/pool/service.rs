//! The pool as the agent serves it: leases, who holds what, what happens.

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
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, broadcast};

use super::{
    backend::{Backend, Claimed},
    owner::Owner,
    tables::lock,
};

/// How many happenings a slow watcher may be behind before it misses some.
const WATCH_BACKLOG: usize = 1024;

/// How often a request that waits for a port looks again: ports that hooked sockets give back announce nothing.
const WAIT_STEP: Duration = Duration::from_millis(10);

/// TCP or UDP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// RFC 9293.
    #[default]
    Tcp,
    /// RFC 768, connected sockets.
    Udp,
}

/// Who asks: the process at the other end of the socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Client {
    /// Number of its connection to the agent.
    pub connection: u64,
    /// Process id.
    pub pid: u32,
    /// User id.
    pub uid: u32,
    /// `SO_NETNS_COOKIE` of its network namespace, if it could be found out.
    pub netns: Option<u64>,
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wish {
    /// Where the client will connect to.
    pub destination: SocketAddr,
    /// With which protocol.
    pub transport: Transport,
    /// How many ports; all or none.
    pub count: u32,
    /// How long to wait for them.
    pub wait: Duration,
    /// How long to hold them; `None`: as long as the client's connection to the agent.
    pub time: Option<Duration>,
}

/// A port that a client holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Leased {
    /// For [`Service::release`].
    pub id: u64,
    /// The port to bind, with SO_REUSEADDR.
    pub port: u16,
    /// The only destination it is good for.
    pub destination: SocketAddr,
    /// The only protocol it is good for.
    pub protocol: Transport,
    /// Milliseconds left; left out: as long as the connection to the agent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expires_in_ms: Option<u64>,
}

/// A port in use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Holding {
    /// `lease`: from this API. `socket`: a connection.
    pub kind: &'static str,
    /// Of a lease.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<u64>,
    /// The source port.
    pub port: u16,
    /// Where it leads to; left out for an unconnected UDP socket.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub destination: Option<SocketAddr>,
    /// TCP or UDP.
    pub protocol: Transport,
    /// Who has it.
    #[serde(flatten)]
    pub owner: Owner,
    /// Since when, in milliseconds.
    pub age_ms: u64,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "event", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Happening {
    /// A lease began.
    Acquired {
        /// The lease.
        lease: Leased,
        /// Who has it.
        pid: u32,
    },
    /// A lease ended.
    Released {
        /// The lease.
        id: u64,
        /// Its port.
        port: u16,
        /// Why.
        reason: &'static str,
    },
    /// A program was refused a port.
    Refused {
        /// See [`Refusal::name`].
        reason: &'static str,
        /// Where it wanted to connect to.
        destination: SocketAddr,
        /// TCP or UDP.
        protocol: Transport,
        /// The process.
        pid: u32,
        /// Its user.
        uid: u32,
        /// Its name.
        command: String,
    },
}

/// Why a request is not met.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ServiceError {
    /// See the text.
    #[error(
        "{destination} is not a destination of the pool ({networks}); add it to portPool.destinations, or connect without the pool"
    )]
    NotADestination {
        /// What was asked for.
        destination: SocketAddr,
        /// What there is.
        networks: String,
    },
    /// See the text.
    #[error("{count} ports are asked for, the pool has {available}")]
    TooMany {
        /// Asked for.
        count: u32,
        /// In the pool.
        available: u32,
    },
    /// See the text.
    #[error(
        "the network namespace of the client cannot be found out; the agent must see its process (hostPID: true) and be allowed to enter its namespace"
    )]
    Stranger,
    /// See the text.
    #[error("no port is left for this destination: {}", hint(*.0))]
    Refused(Refusal),
    /// See the text.
    #[error("there is no lease {0}; it may have ended with its time or its connection")]
    NoLease(u64),
    /// See the text.
    #[error("lease {0} belongs to another user")]
    NotYours(u64),
}

fn hint(refusal: Refusal) -> &'static str {
    match refusal {
        Refusal::QUOTA => {
            "the quota of this network namespace is used up; close connections or raise portPool.quota"
        }
        Refusal::TABLE_FULL => {
            "the pool's tables are full; fewer destinations at once, or a smaller span of ports"
        }
        _ => "all are in use, or were used by somebody else a moment ago; wait, or enlarge portPool.ports",
    }
}

struct Lease {
    claimed: Claimed,
    connection: Option<u64>,
    until: Option<Instant>,
    since: Instant,
    owner: Owner,
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
    happenings: broadcast::Sender<Happening>,
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
            happenings: broadcast::channel(WATCH_BACKLOG).0,
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

    /// A number for a new connection.
    #[must_use]
    pub fn next_number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
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
            match self.claim(&destination, netns, wish.count) {
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
        let mut leases = lock(&self.leases);
        let note = |claimed: Claimed| {
            let id = self.next_number();
            let lease = Lease {
                claimed,
                connection: wish.time.is_none().then_some(client.connection),
                until: wish.time.map(|time| now + time),
                since: now,
                owner: owner.clone(),
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
    /// There is none, or it belongs to another user (root may end all).
    pub fn release(&self, client: &Client, id: u64) -> Result<(), ServiceError> {
        match lock(&self.leases).get(&id) {
            None => return Err(ServiceError::NoLease(id)),
            Some(lease) if client.uid != 0 && lease.owner.uid != client.uid => {
                return Err(ServiceError::NotYours(id));
            }
            Some(_) => {}
        }
        self.end("released", |lease, _| lease == id);
        Ok(())
    }

    /// Ends the leases of a client that has hung up.
    pub fn hang_up(&self, connection: u64) {
        self.end("connection closed", |_, lease| lease.connection == Some(connection));
    }

    /// Ends the leases whose time is over; answers when the next one is.
    pub fn expire(&self) -> Option<Instant> {
        let now = Instant::now();
        self.end("expired", |_, lease| lease.until.is_some_and(|until| until <= now));
        lock(&self.leases).values().filter_map(|lease| lease.until).min()
    }

    fn end(&self, reason: &'static str, which: impl Fn(u64, &Lease) -> bool) {
        let ended: Vec<(u64, Lease)> = lock(&self.leases).extract_if(|id, lease| which(*id, lease)).collect();
        for (id, lease) in ended {
            self.backend.release(&lease.claimed);
            let _ = self.happenings.send(Happening::Released { id, port: lease.claimed.port, reason });
            self.freed.notify_waiters();
        }
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
        let monotonic = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        let monotonic = Duration::try_from(monotonic).unwrap_or_default();
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
