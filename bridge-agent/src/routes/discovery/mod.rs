//! Discovery: a host learns behind which node a pod is, from the pod itself.
//!
//! A pod behind masquerade does not know the address it is seen with, and the host does not know the pod's own. One
//! authenticated message shows both: the pod writes its address into it, the host sees where it comes from, and
//! `POD/32 via NODE` follows. The host then connects back through that route: only a pod that holds the key and is
//! really there can answer. See [`message`] for the protocol.
//!
//! - [`listen`]: the host's side, a source of routes.
//! - [`probe`]: the pod's side; needs no privileges.
//! - [`sniff`]: without anything in the pod, shows the addresses from which connections arrive.

pub mod listen;
pub mod message;
pub mod probe;
pub mod registry;
pub mod sniff;
pub(crate) mod state;

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::kernel::files;

use self::message::{Key, Message, PREFIX, ParseError, length};

/// Why an exchange of messages did not come to its end.
#[derive(Debug, Error)]
pub enum ExchangeError {
    /// The connection broke.
    #[error("the connection ended early: {0}")]
    Io(#[from] io::Error),
    /// The message is invalid.
    #[error(transparent)]
    Parse(#[from] ParseError),
    /// A message came out of turn.
    #[error("the other side sent a message out of turn")]
    OutOfTurn,
    /// Nothing came.
    #[error("no answer within {} s", .0.as_secs())]
    Timeout(Duration),
}

/// Why a key file is of no use.
#[derive(Debug, Error)]
pub enum KeyError {
    /// It cannot be read.
    #[error("{}: {error}; make one with `head -c 32 /dev/urandom | base64 > FILE; chmod 600 FILE`, the same on both sides", path.display())]
    Read {
        path: PathBuf,
        #[source]
        error: io::Error,
    },
    /// It holds too little.
    #[error("{}: shorter than {} bytes; make one with `head -c 32 /dev/urandom | base64 > FILE`", path.display(), Key::MIN)]
    Short { path: PathBuf },
    /// Others can read it.
    #[error("{}: other users can read it (mode {mode:o}); `chmod 600` it and, if it was open for long, make a new one", path.display())]
    Open {
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
}

/// Reads a key; `private` insists that no one but its owner and group may read it. (In a pod the mode is that of the
/// volume.)
pub fn read_key(path: &Path, private: bool) -> Result<Key, KeyError> {
    use std::os::unix::fs::PermissionsExt;
    let failed = |error| KeyError::Read { path: path.into(), error };
    let mode = std::fs::metadata(path).map_err(failed)?.permissions().mode() & 0o7777;
    if private && mode & 0o007 != 0 {
        return Err(KeyError::Open { path: path.into(), mode });
    }
    Key::new(&files::read_regular(path, files::MAX_SMALL).map_err(failed)?)
        .ok_or_else(|| KeyError::Short { path: path.into() })
}

async fn receive(stream: &mut TcpStream, key: &Key) -> Result<Message, ExchangeError> {
    let mut bytes = vec![0; PREFIX];
    stream.read_exact(&mut bytes).await?;
    let total = length(bytes.first_chunk().expect("just read"))?;
    bytes.resize(total, 0);
    stream.read_exact(&mut bytes[PREFIX..]).await?;
    Ok(Message::parse(&bytes, key)?)
}

async fn send(stream: &mut TcpStream, message: &Message, key: &Key) -> Result<(), ExchangeError> {
    stream.write_all(&message.encode(key)).await?;
    Ok(())
}

async fn within<T>(
    limit: Duration,
    exchange: impl Future<Output = Result<T, ExchangeError>>,
) -> Result<T, ExchangeError> {
    tokio::time::timeout(limit, exchange).await.unwrap_or(Err(ExchangeError::Timeout(limit)))
}

/// Milliseconds since 1970-01-01 UTC.
fn clock() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
