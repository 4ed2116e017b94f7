//! Bind before connect: take a source port from an allowed range, bind it, connect.
//!
//! ```
//! # use std::{io::Read, net::{SocketAddr, TcpListener}};
//! use bridge_client::Connector;
//!
//! # let listener = TcpListener::bind("127.0.0.1:0")?;
//! # let server: SocketAddr = listener.local_addr()?;
//! // Ports of its own, without the agent:
//! let stream = Connector::ports(61001..=61100).connect(server)?;
//! assert!((61001..=61100).contains(&stream.local_addr()?.port()));
//! # Ok::<(), bridge_client::Error>(())
//! ```
//! With the agent, no one else on this node uses the port towards the same destination, also after masquerade; it goes
//! back when the stream is dropped, and when the program is killed:
//!
//! ```no_run
//! use std::time::Duration;
//! use bridge_client::Connector;
//!
//! let mut stream = Connector::agent().wait(Duration::from_secs(2)).connect("192.168.31.67:443".parse().unwrap())?;
//! std::io::Write::write_all(&mut stream, b"hello")?;
//! # Ok::<(), bridge_client::Error>(())
//! ```
//! No root and no eBPF is needed, only the right to open the agent's socket. Programs that cannot be changed are
//! started with `bridge-agent exec`, or live in a control group of the pool; then none of this is needed.

mod agent;
#[cfg(feature = "tokio")]
pub mod aio;
mod http;
#[cfg(feature = "hyper")]
pub mod hyper;
mod stream;

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    ops::RangeInclusive,
    path::PathBuf,
    time::Duration,
};

use rand::seq::SliceRandom as _;
use socket2::{Domain, Protocol, Socket, Type};

pub use agent::{Agent, Lease, Transport};
pub use stream::Stream;

/// Default socket of the agent.
pub const SOCKET: &str = "/run/bridge/agent.sock";

/// How many leased ports are tried when something else in this namespace has bound them.
const BIND_TRIES: u32 = 8;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "cannot talk to the agent at {path}: {source}; is bridge-agent running, and may this user open the socket?"
    )]
    Agent {
        /// The socket.
        path: PathBuf,
        /// Error of the kernel.
        source: io::Error,
    },
    #[error("the agent refused: {text}")]
    Refused {
        /// The kind: `exhausted`, `quota`, `destination`…
        code: String,
        /// The message, with the remedy.
        text: String,
    },
    #[error("the agent's answer makes no sense: {0}; it may be of another version")]
    Protocol(String),
    #[error("every port of {first}-{last} is in use; wait, or allow more ports")]
    Exhausted {
        /// Lowest port.
        first: u16,
        /// Highest port.
        last: u16,
    },
    /// The connection itself failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Io(error) => error,
            Error::Exhausted { .. } => Self::new(io::ErrorKind::AddrNotAvailable, error),
            Error::Refused { ref code, .. } if code == "exhausted" || code == "quota" => {
                Self::new(io::ErrorKind::AddrNotAvailable, error)
            }
            error => Self::other(error),
        }
    }
}

/// Connects from a port of the pool.
#[derive(Clone, Debug)]
pub struct Connector {
    source: Source,
    wait: Duration,
}

#[derive(Clone, Debug)]
enum Source {
    Agent(PathBuf),
    Ports(RangeInclusive<u16>),
}

impl Connector {
    /// Ports from the agent at [`SOCKET`].
    #[must_use]
    pub fn agent() -> Self {
        Self::agent_at(SOCKET)
    }

    /// Ports from the agent that listens on `socket`.
    #[must_use]
    pub fn agent_at(socket: impl Into<PathBuf>) -> Self {
        Self { source: Source::Agent(socket.into()), wait: Duration::ZERO }
    }

    /// Ports of this range, without an agent: one at random, checked by binding it, and another one if it is in use.
    ///
    /// A port that was used lately is in use until its TIME_WAIT is over (60 s), and nothing is known of other hosts
    /// or pods behind the same address: the agent does better.
    #[must_use]
    pub fn ports(ports: RangeInclusive<u16>) -> Self {
        Self { source: Source::Ports(ports), wait: Duration::ZERO }
    }

    /// How long to wait for a port; not at all unless asked for. At most 60 s.
    #[must_use]
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wait = wait;
        self
    }

    /// Connects.
    ///
    /// # Errors
    /// [`Error::Refused`] and [`Error::Exhausted`] if there is no port; [`Error::Io`] for failures of the connection.
    pub fn connect(&self, destination: SocketAddr) -> Result<Stream, Error> {
        match &self.source {
            Source::Agent(path) => {
                let agent = Agent::at(path);
                with_lease(
                    || agent.acquire(destination, Transport::Tcp, self.wait),
                    |port| connect_from(port, destination, true),
                )
            }
            Source::Ports(ports) => {
                let deadline = std::time::Instant::now() + self.wait;
                loop {
                    match connect_from_any(ports, destination) {
                        Err(Error::Exhausted { .. }) if std::time::Instant::now() < deadline => {
                            std::thread::sleep(Duration::from_millis(50));
                        }
                        result => return result.map(|tcp| Stream::new(tcp, None)),
                    }
                }
            }
        }
    }
}

/// Connects from a leased port; from another one if something outside the pool has bound it.
fn with_lease(
    acquire: impl Fn() -> Result<Lease, Error>,
    connect: impl Fn(u16) -> io::Result<TcpStream>,
) -> Result<Stream, Error> {
    // Kept until there is a connection, so that the agent does not hand out the same again.
    let mut unusable = Vec::new();
    loop {
        let lease = acquire()?;
        match connect(lease.port()) {
            Ok(tcp) => return Ok(Stream::new(tcp, Some(lease))),
            Err(error) if in_use(&error) && unusable.len() < BIND_TRIES as usize => unusable.push(lease),
            Err(error) => return Err(error.into()),
        }
    }
}

fn connect_from_any(ports: &RangeInclusive<u16>, destination: SocketAddr) -> Result<TcpStream, Error> {
    for port in shuffled(ports) {
        match connect_from(port, destination, false) {
            // Not SO_REUSEADDR: many sockets on one port make every pick collide when the range is nearly full.
            Err(error) if in_use(&error) => {}
            result => return Ok(result?),
        }
    }
    Err(Error::Exhausted { first: *ports.start(), last: *ports.end() })
}

fn shuffled(ports: &RangeInclusive<u16>) -> Vec<u16> {
    let mut ports: Vec<u16> = ports.clone().collect();
    ports.shuffle(&mut rand::rng());
    ports
}

/// Returns whether another socket has bound the port, or its 4-tuple is still in use.
fn in_use(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable)
}

fn connect_from(port: u16, destination: SocketAddr, reuse: bool) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(destination), Type::STREAM, Some(Protocol::TCP))?;
    // With a lease the port serves other destinations at the same time.
    socket.set_reuse_address(reuse)?;
    socket.bind(&unspecified(destination, port).into())?;
    socket.connect(&destination.into())?;
    Ok(socket.into())
}

fn unspecified(destination: SocketAddr, port: u16) -> SocketAddr {
    let ip = match destination {
        SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    SocketAddr::new(ip, port)
}
