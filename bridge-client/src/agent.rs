//! Leases from the agent.

use std::{
    io::{self, Read as _, Write as _},
    net::SocketAddr,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::{Error, SOCKET, http};

/// TCP or UDP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// TCP.
    #[default]
    Tcp,
    /// Connected UDP sockets.
    Udp,
}

/// Body of a request; docs/openapi.json.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Acquire {
    destination: SocketAddr,
    protocol: Transport,
    count: u32,
    wait_ms: u64,
}

#[derive(Deserialize)]
struct Acquired {
    leases: Vec<Leased>,
}

#[derive(Deserialize)]
pub(crate) struct Leased {
    id: u64,
    port: u16,
}

/// The agent, reached through its unix socket.
#[derive(Clone, Debug)]
pub struct Agent {
    path: PathBuf,
}

/// A port that no one else uses towards one destination, as long as this value lives.
///
/// Bind it with SO_REUSEADDR. It goes back when this is dropped, and when the program ends in any way.
#[derive(Debug)]
pub struct Lease {
    id: u64,
    port: u16,
    // The lease ends with the connection.
    _connection: UnixStream,
}

impl Lease {
    pub(crate) fn new(leased: &Leased, connection: UnixStream) -> Self {
        Self { id: leased.id, port: leased.port, _connection: connection }
    }

    /// The port, to be bound before connecting.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The number that the agent lists it under.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }
}

impl Default for Agent {
    fn default() -> Self {
        Self::at(SOCKET)
    }
}

impl Agent {
    /// The agent that listens on `socket`.
    #[must_use]
    pub fn at(socket: impl AsRef<Path>) -> Self {
        Self { path: socket.as_ref().to_owned() }
    }

    /// Leases a port towards a destination, waiting for one if need be.
    ///
    /// # Errors
    /// [`Error::Agent`], or [`Error::Refused`] with the reason.
    pub fn acquire(
        &self,
        destination: SocketAddr,
        transport: Transport,
        wait: Duration,
    ) -> Result<Lease, Error> {
        let mut connection = UnixStream::connect(&self.path).map_err(|e| self.error(e))?;
        let answer =
            exchange(&mut connection, &order(destination, transport, wait)?).map_err(|e| self.error(e))??;
        Ok(Lease::new(&leased(&answer)?, connection))
    }

    pub(crate) fn error(&self, source: io::Error) -> Error {
        Error::Agent { path: self.path.clone(), source }
    }
}

pub(crate) fn order(destination: SocketAddr, protocol: Transport, wait: Duration) -> Result<Vec<u8>, Error> {
    let wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
    let body = serde_json::to_string(&Acquire { destination, protocol, count: 1, wait_ms })
        .map_err(|error| Error::Protocol(error.to_string()))?;
    Ok(http::request("POST", "/v1/leases", &body))
}

pub(crate) fn leased(answer: &http::Answer) -> Result<Leased, Error> {
    let mut acquired: Acquired = answer.json()?;
    acquired.leases.pop().ok_or_else(|| Error::Protocol("no lease in it".into()))
}

/// Sends a request and reads its answer.
fn exchange(connection: &mut UnixStream, request: &[u8]) -> io::Result<Result<http::Answer, Error>> {
    connection.write_all(request)?;
    let (mut bytes, mut part) = (Vec::new(), [0; 4096]);
    loop {
        match http::parse(&bytes) {
            Ok(None) => {}
            Ok(Some(answer)) => return Ok(Ok(answer)),
            Err(error) => return Ok(Err(error)),
        }
        match connection.read(&mut part)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            length => bytes.extend_from_slice(&part[..length]),
        }
    }
}
