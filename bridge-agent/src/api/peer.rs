//! Who is at the other end of the socket, and how long that one stays.

use std::{
    collections::HashMap,
    os::fd::AsFd,
    sync::{
        Arc, LazyLock, Mutex, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use axum::{
    extract::{ConnectInfo, Request},
    http::StatusCode,
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use rustix::net::sockopt::socket_peercred;
use tokio::net::UnixStream;

use super::Problem;
use crate::{
    kernel::{lock::lock, netlink::Namespace},
    pool::{
        owner::{self, Owner, netns_cookie, own_netns, pod_of},
        service::Client,
    },
    state::Shared,
};

/// A connection of a client; the last clone of it ends its leases.
#[derive(Clone, Debug)]
pub(crate) struct Peer(Arc<Connection>);

#[derive(Debug)]
struct Connection {
    client: Client,
    name: Name,
    operator: bool,
    shared: Shared,
}

/// The unit that has a share of the connections: a pod; outside of pods a control group, and in the agent's own network namespace a
/// user. Processes of a pod can change their user, and make network namespaces. Without a control group it is the namespace.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Name {
    netns: Option<u64>,
    group: Option<String>,
    uid: Option<u32>,
}

impl Name {
    /// The name of the client at the other end; `None`: it has none without more look-ups, or no share.
    ///
    /// For each connection that is accepted, as fast as a client connects.
    pub(super) fn of(stream: &impl AsFd) -> Option<Self> {
        let netns = netns_cookie(stream).ok();
        if netns == own_netns() {
            return None;
        }
        let credentials = socket_peercred(stream).ok()?;
        let pid = u32::try_from(credentials.pid.as_raw_nonzero().get()).ok()?;
        Some(Self::elsewhere(netns, pid))
    }

    /// The name of a client in another network namespace than the agent's.
    fn elsewhere(netns: Option<u64>, pid: u32) -> Self {
        match group(pid) {
            Some(group) => Self { netns: None, group: Some(group), uid: None },
            None => Self { netns, group: None, uid: None },
        }
    }
}

/// The pod of a process, or else its control group; looked up again after a while.
fn group(pid: u32) -> Option<String> {
    const FRESH: Duration = Duration::from_millis(100);
    const MOST: usize = 1024;
    type Known = HashMap<u32, (Instant, Option<String>)>;
    static KNOWN: LazyLock<Mutex<Known>> = LazyLock::new(Mutex::default);
    let mut known = lock(&KNOWN);
    if let Some((at, group)) = known.get(&pid)
        && at.elapsed() < FRESH
    {
        return group.clone();
    }
    let cgroup = owner::cgroup(pid);
    // With control groups of version 1, all processes are in the root of version 2.
    let group = cgroup.filter(|cgroup| cgroup != "/").map(|cgroup| pod_of(&cgroup).unwrap_or(cgroup));
    if known.len() >= MOST {
        known.clear();
    }
    known.insert(pid, (Instant::now(), group.clone()));
    group
}

impl Peer {
    /// The client at the other end; `None` if it is gone already.
    pub(super) fn of(stream: &UnixStream, shared: &Shared) -> Option<Self> {
        let credentials = stream.peer_cred().ok()?;
        // Never used again, whichever pool there is.
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let connection = NEXT.fetch_add(1, Ordering::Relaxed);
        let pid = credentials.pid().and_then(|pid| u32::try_from(pid).ok()).unwrap_or(0);
        let uid = credentials.uid();
        let netns = netns_cookie(stream).ok();
        // A kernel that does not know the cookie of one does not know that of the other.
        let is_own = netns == own_netns();
        let namespace = if is_own { None } else { Namespace::of(stream).ok().map(Arc::new) };
        let pod = is_own.then(|| Owner::of(pid, uid, None).pod).flatten();
        let own_user = uid == 0 || uid == rustix::process::geteuid().as_raw();
        // A pod with the node's network is not the node's operator.
        let operator = own_user && is_own && (pod.is_none() || pod == *own_pod());
        let name = if is_own {
            Name { netns, uid: pod.is_none().then_some(uid), group: pod }
        } else {
            Name::elsewhere(netns, pid)
        };
        let client = Client { connection, pid, uid, netns, namespace };
        Some(Self(Arc::new(Connection { client, name, operator, shared: shared.clone() })))
    }

    pub(super) fn name(&self) -> &Name {
        &self.0.name
    }

    /// Whether this connection holds leases that end with it.
    pub(super) fn holds_leases(&self) -> bool {
        self.0.shared.pool().is_some_and(|pool| pool.holds(self.0.client.connection))
    }

    /// Whether the client is root, or the user that the agent runs as, in the agent's own network namespace and in no pod but
    /// the agent's own.
    pub(super) fn is_operator(&self) -> bool {
        self.0.operator
    }

    pub(crate) fn client(&self) -> &Client {
        &self.0.client
    }
}

/// The pod of the agent, if it is in one.
fn own_pod() -> &'static Option<String> {
    static OWN: OnceLock<Option<String>> = OnceLock::new();
    OWN.get_or_init(|| Owner::of(std::process::id(), 0, None).pod)
}

/// Lets only operators through.
pub(super) async fn operators_only(
    ConnectInfo(peer): ConnectInfo<Peer>,
    request: Request,
    next: Next,
) -> Response {
    if peer.is_operator() {
        return next.run(request).await;
    }
    let text = "only root and the user that the agent runs as may do this, in the agent's own network namespace and \
                in no other pod";
    Problem::new(StatusCode::FORBIDDEN, "not-operator", text).into_response()
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Some(pool) = self.shared.pool() {
            pool.hang_up(self.client.connection);
        }
    }
}
