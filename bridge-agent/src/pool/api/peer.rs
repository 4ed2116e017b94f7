//! The socket, who is at its other end, and how long that one stays.

use std::{
    fs, io,
    os::unix::fs::{FileTypeExt as _, PermissionsExt as _, chown},
    path::{Path, PathBuf},
    sync::Arc,
};

use axum::{
    Router,
    extract::connect_info::Connected,
    serve::{IncomingStream, Listener},
};
use tokio::net::{UnixListener, UnixStream};

use super::super::{
    owner::netns_cookie,
    service::{Client, Service},
};

/// Who may open the socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Access {
    /// Permission bits of the socket.
    pub mode: u32,
    /// Group of the socket; `None` leaves it to the directory.
    pub group: Option<u32>,
}

impl Default for Access {
    /// Root and root's group.
    fn default() -> Self {
        Self { mode: 0o660, group: None }
    }
}

/// Why the socket cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// See the text.
    #[error("cannot listen on {path}: {source}")]
    Listen {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// See the text.
    #[error("{0} is in use: another agent serves it; stop that one first")]
    InUse(PathBuf),
    /// See the text.
    #[error("{0} exists and is not a socket; remove it or choose another api.socket")]
    NotASocket(PathBuf),
}

/// Makes the socket, with the permissions it is to have from its first moment on. A socket that a dead agent left is
/// replaced.
///
/// # Errors
/// [`ApiError`].
pub fn listen(path: &Path, access: &Access) -> Result<UnixListener, ApiError> {
    let error = |source| ApiError::Listen { path: path.into(), source };
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).map_err(error)?;
    }
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => return Err(ApiError::NotASocket(path.into())),
        Ok(_) if std::os::unix::net::UnixStream::connect(path).is_ok() => {
            return Err(ApiError::InUse(path.into()));
        }
        _ => {}
    }
    // Bound under another name, then moved: nobody can open it before it has its permissions.
    let mut hidden = path.as_os_str().to_owned();
    hidden.push(".new");
    let hidden = PathBuf::from(hidden);
    let _ = fs::remove_file(&hidden);
    let listener = UnixListener::bind(&hidden).map_err(error)?;
    chown(&hidden, None, access.group).map_err(error)?;
    fs::set_permissions(&hidden, fs::Permissions::from_mode(access.mode)).map_err(error)?;
    fs::rename(&hidden, path).map_err(error)?;
    Ok(listener)
}

/// A connection of a client; the last clone of it ends its leases.
#[derive(Clone, Debug)]
pub struct Peer(Arc<Connection>);

#[derive(Debug)]
struct Connection {
    client: Client,
    service: Arc<Service>,
}

impl Peer {
    pub(super) fn client(&self) -> &Client {
        &self.0.client
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.service.hang_up(self.client.connection);
    }
}

/// The listening socket together with the service: each connection knows its client.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    service: Arc<Service>,
}

impl Server {
    /// Serves `service` on `listener`.
    #[must_use]
    pub fn new(listener: UnixListener, service: Arc<Service>) -> Self {
        Self { listener, service }
    }

    /// Serves these routes until the process ends; [`super::router`] among them.
    ///
    /// # Errors
    /// None known: errors of single connections end those.
    pub async fn serve(self, routes: Router) -> io::Result<()> {
        axum::serve(self, routes.into_make_service_with_connect_info::<Peer>()).await
    }
}

impl Listener for Server {
    type Io = UnixStream;
    type Addr = Peer;

    async fn accept(&mut self) -> (UnixStream, Peer) {
        loop {
            let (stream, _) = Listener::accept(&mut self.listener).await;
            // Without credentials it is gone already.
            if let Ok(credentials) = stream.peer_cred() {
                let pid = credentials.pid().and_then(|pid| u32::try_from(pid).ok()).unwrap_or(0);
                let client = Client {
                    connection: self.service.next_number(),
                    pid,
                    uid: credentials.uid(),
                    netns: netns_cookie(pid).ok(),
                };
                let service = Arc::clone(&self.service);
                return (stream, Peer(Arc::new(Connection { client, service })));
            }
        }
    }

    fn local_addr(&self) -> io::Result<Peer> {
        let client = Client { connection: 0, pid: 0, uid: 0, netns: None };
        Ok(Peer(Arc::new(Connection { client, service: Arc::clone(&self.service) })))
    }
}

impl Connected<IncomingStream<'_, Server>> for Peer {
    fn connect_info(stream: IncomingStream<'_, Server>) -> Self {
        stream.remote_addr().clone()
    }
}
