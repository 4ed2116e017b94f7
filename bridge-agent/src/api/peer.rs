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
    pool::{
        owner::{Owner, netns_cookie},
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
    shared: Shared,
}

impl Peer {
    /// The client at the other end; `None` if it is gone already.
    pub(super) fn of(stream: &UnixStream, shared: &Shared) -> Option<Self> {
        let credentials = stream.peer_cred().ok()?;
        // Never used again, whichever pool there is.
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let connection = NEXT.fetch_add(1, Ordering::Relaxed);
        let pid = credentials.pid().and_then(|pid| u32::try_from(pid).ok()).unwrap_or(0);
        let client = Client { connection, pid, uid: credentials.uid(), netns: netns_cookie(stream).ok() };
        Some(Self(Arc::new(Connection { client, shared: shared.clone() })))
    }

    /// Its user and network namespace.
    pub(super) fn name(&self) -> (u32, Option<u64>) {
        (self.0.client.uid, self.0.client.netns)
    }

    /// Whether this connection holds leases that end with it.
    pub(super) fn holds_leases(&self) -> bool {
        self.0.shared.pool().is_some_and(|pool| pool.holds(self.0.client.connection))
    }

    /// Whether the client is root, or the user that the agent runs as, in the agent's own network namespace and in no pod but
    /// the agent's own.
    pub(super) fn is_operator(&self) -> bool {
        let Client { uid, netns, pid, .. } = *self.client();
        let own_user = uid == 0 || uid == rustix::process::geteuid().as_raw();
        // A kernel that does not know the cookie of one does not know that of the other.
        own_user && netns == own_netns() && is_of_own_pod(pid)
    }

    pub(crate) fn client(&self) -> &Client {
        &self.0.client
    }
}

fn own_netns() -> Option<u64> {
    static OWN: OnceLock<Option<u64>> = OnceLock::new();
    *OWN.get_or_init(|| std::os::unix::net::UnixDatagram::unbound().and_then(netns_cookie).ok())
}

/// Whether a process is in no pod, or in that of the agent: a pod with the node's network is not the node's operator.
fn is_of_own_pod(pid: u32) -> bool {
    static OWN: OnceLock<Option<String>> = OnceLock::new();
    let pod = Owner::of(pid, 0, None).pod;
    pod.is_none() || pod == *OWN.get_or_init(|| Owner::of(std::process::id(), 0, None).pod)
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
