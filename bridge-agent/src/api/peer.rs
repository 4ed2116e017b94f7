//! Who is at the other end of the socket, and how long that one stays.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use axum::{
    extract::{ConnectInfo, Request, connect_info::Connected},
    http::StatusCode,
    middleware::Next,
    response::{IntoResponse as _, Response},
    serve::{IncomingStream, Listener},
};
use tokio::net::{UnixListener, UnixStream, unix::UCred};

use super::Problem;
use crate::{
    pool::{owner::netns_cookie, service::Client},
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
    fn new(stream: &UnixStream, credentials: &UCred, shared: &Shared) -> Self {
        // Never used again, whichever pool there is.
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let connection = NEXT.fetch_add(1, Ordering::Relaxed);
        let pid = credentials.pid().and_then(|pid| u32::try_from(pid).ok()).unwrap_or(0);
        let client = Client { connection, pid, uid: credentials.uid(), netns: netns_cookie(stream).ok() };
        Self(Arc::new(Connection { client, shared: shared.clone() }))
    }

    pub(crate) fn client(&self) -> &Client {
        &self.0.client
    }
}

/// Lets only operators through: root, or the user that the agent runs as, from the agent's own network namespace. Root in
/// a pod is none.
pub(super) async fn operators_only(
    ConnectInfo(peer): ConnectInfo<Peer>,
    request: Request,
    next: Next,
) -> Response {
    let Client { uid, netns, .. } = *peer.client();
    let own_user = uid == 0 || uid == rustix::process::geteuid().as_raw();
    // A kernel without netns cookies reports none for either socket.
    let own_netns = std::os::unix::net::UnixDatagram::unbound().and_then(netns_cookie).ok();
    if own_user && netns == own_netns {
        return next.run(request).await;
    }
    let text =
        "only root and the user that the agent runs as may do this, in the agent's own network namespace";
    Problem::new(StatusCode::FORBIDDEN, "not-operator", text).into_response()
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Some(pool) = self.shared.pool() {
            pool.hang_up(self.client.connection);
        }
    }
}

/// The listening socket, whose connections know their client.
#[derive(Debug)]
pub(super) struct Peers {
    pub(super) listener: UnixListener,
    pub(super) shared: Shared,
}

impl Listener for Peers {
    type Io = UnixStream;
    type Addr = Peer;

    async fn accept(&mut self) -> (UnixStream, Peer) {
        loop {
            let (stream, _) = Listener::accept(&mut self.listener).await;
            // Without credentials it is gone already.
            if let Ok(credentials) = stream.peer_cred() {
                let peer = Peer::new(&stream, &credentials, &self.shared);
                return (stream, peer);
            }
        }
    }

    fn local_addr(&self) -> io::Result<Peer> {
        let client = Client { connection: 0, pid: 0, uid: 0, netns: None };
        Ok(Peer(Arc::new(Connection { client, shared: self.shared.clone() })))
    }
}

impl Connected<IncomingStream<'_, Peers>> for Peer {
    fn connect_info(stream: IncomingStream<'_, Peers>) -> Self {
        stream.remote_addr().clone()
    }
}
