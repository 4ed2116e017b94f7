//! The sockets of the API.

use std::{
    fs, io,
    net::SocketAddr,
    os::unix::{
        fs::{FileTypeExt as _, PermissionsExt as _, chown},
        net::UnixListener,
    },
    path::{Path, PathBuf},
};

use tokio::io::unix::AsyncFd;

use super::{Connections, error::Error, peer::Name};
use crate::config::Api;

/// Removes the socket from the file system when it is dropped.
#[derive(Debug)]
pub(super) struct Socket(pub(super) PathBuf);

impl Drop for Socket {
    fn drop(&mut self) {
        // Another process may have removed it, or made another file.
        if is_socket(&self.0) == Some(true) {
            drop(fs::remove_file(&self.0));
        }
    }
}

/// Waits for a connection; for ever without a listener.
pub(super) async fn or_never<T>(accept: Option<impl Future<Output = io::Result<T>>>) -> io::Result<T> {
    match accept {
        Some(accept) => accept.await,
        None => std::future::pending().await,
    }
}

/// Prepares a listener for [`accept`].
pub(super) fn watch(listener: UnixListener) -> io::Result<AsyncFd<UnixListener>> {
    // SAFETY: the listener owns its descriptor, which stays open and the same until both go together.
    unsafe { AsyncFd::register(listener) }.map_err(Into::into)
}

/// Waits for a connection of a client that may have another one. Those of others are closed at once: as long as they are in the queue
/// of the listener, every client waits behind them.
pub(super) async fn accept(
    listener: &AsyncFd<UnixListener>,
    clients: &Connections,
) -> io::Result<tokio::net::UnixStream> {
    /// Connections that are closed before other tasks have their turn.
    const BATCH: usize = 256;
    loop {
        let mut ready = listener.readable().await?;
        for _ in 0..BATCH {
            match listener.get_ref().accept() {
                Ok((stream, _)) if Name::of(&stream).is_some_and(|name| clients.is_full(name)) => {}
                Ok((stream, _)) => {
                    stream.set_nonblocking(true)?;
                    return tokio::net::UnixStream::from_std(stream);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    ready.clear_ready();
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        tokio::task::yield_now().await;
    }
}

/// Whether a file is a socket; `None`: there is no file.
pub(super) fn is_socket(path: &Path) -> Option<bool> {
    fs::symlink_metadata(path).ok().map(|found| found.file_type().is_socket())
}

/// Listens on a unix socket, in the place of one that may be there.
pub(super) fn listen_at(path: &Path, config: &Api, group: Option<u32>) -> Result<UnixListener, Error> {
    if is_socket(path) == Some(false) {
        return Err(Error::NotASocket(path.to_owned()));
    }
    make_socket(path, config, group)
        .map_err(|source| Error::Listen { address: path.display().to_string(), source })
}

fn make_socket(path: &Path, config: &Api, group: Option<u32>) -> io::Result<UnixListener> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    // Permissions are set before the socket has its name, so that no one else can connect in between.
    let mut staging = path.as_os_str().to_owned();
    staging.push(".new");
    let staging = PathBuf::from(staging);
    if is_socket(&staging) == Some(true) {
        drop(fs::remove_file(&staging));
    }
    let listener = UnixListener::bind(&staging)?;
    listener.set_nonblocking(true)?;
    fs::set_permissions(&staging, fs::Permissions::from_mode(config.mode.0))?;
    if let Some(group) = group {
        chown(&staging, None, Some(group))?;
    }
    fs::rename(&staging, path)?;
    Ok(listener)
}

pub(super) fn listen(address: SocketAddr) -> Result<std::net::TcpListener, Error> {
    let failed = |source| Error::Listen { address: address.to_string(), source };
    let listener = std::net::TcpListener::bind(address).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
}
