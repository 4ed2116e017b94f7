//! Who is at the other end of the socket, and how long that one stays.

use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicU64, Ordering},
};

use axum::{
    extract::{ConnectInfo, Request},
    http::StatusCode,
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use tokio::net::UnixStream;

use super::Problem;
use crate::{
    kernel::netlink::Namespace,
    pool::{
        owner::{Owner, netns_cookie, own_netns},
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

/// The unit that has a share of the connections: a network namespace; in the agent's own one a pod, and outside of pods a user.
/// Processes of a pod can change their user.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Name {
    netns: Option<u64>,
    pod: Option<String>,
    uid: Option<u32>,
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
        let name = Name { netns, uid: (is_own && pod.is_none()).then_some(uid), pod };
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
