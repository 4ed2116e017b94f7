//! The same for tokio.
//!
//! ```
//! # use bridge_client::{aio, Connector};
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), bridge_client::Error> {
//! # let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
//! # let server = listener.local_addr()?;
//! let stream = aio::connect(&Connector::ports(61001..=61100), server).await?;
//! assert!((61001..=61100).contains(&stream.local_addr()?.port()));
//! # Ok(())
//! # }
//! ```

use std::{
    io,
    net::SocketAddr,
    ops::{Deref, DerefMut},
    pin::Pin,
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf},
    net::{TcpSocket, TcpStream, UnixStream},
    time::{Duration, Instant, sleep},
};

use crate::{
    Agent, BIND_TRIES, Connector, Error, Lease, Source, Transport,
    agent::{leased, order},
    http, in_use, shuffled, unspecified,
};

/// A [`TcpStream`] of tokio whose source port goes back to the pool when it is dropped.
#[derive(Debug)]
pub struct Stream {
    // Dropped in this order: the connection, then the lease.
    tcp: TcpStream,
    lease: Option<Lease>,
}

/// [`Connector::connect`] without blocking.
///
/// # Errors
/// As [`Connector::connect`].
pub async fn connect(connector: &Connector, destination: SocketAddr) -> Result<Stream, Error> {
    let ports = match &connector.source {
        Source::Ports(ports) => ports,
        Source::Agent(path) => {
            let agent = Agent::at(path);
            let mut unusable = Vec::new();
            loop {
                let lease = acquire(&agent, path, destination, connector.wait).await?;
                match connect_from(lease.port(), destination, true).await {
                    Ok(tcp) => return Ok(Stream { tcp, lease: Some(lease) }),
                    Err(error) if in_use(&error) && unusable.len() < BIND_TRIES as usize => {
                        unusable.push(lease)
                    }
                    Err(error) => return Err(error.into()),
                }
            }
        }
    };
    let deadline = Instant::now() + connector.wait;
    loop {
        for port in shuffled(ports) {
            match connect_from(port, destination, false).await {
                Err(error) if in_use(&error) => {}
                result => return Ok(Stream { tcp: result?, lease: None }),
            }
        }
        if Instant::now() >= deadline {
            return Err(Error::Exhausted { first: *ports.start(), last: *ports.end() });
        }
        sleep(Duration::from_millis(50)).await;
    }
}

async fn acquire(
    agent: &Agent,
    path: &std::path::Path,
    destination: SocketAddr,
    wait: Duration,
) -> Result<Lease, Error> {
    let request = order(destination, Transport::Tcp, wait)?;
    let mut connection = UnixStream::connect(path).await.map_err(|e| agent.error(e))?;
    connection.write_all(&request).await.map_err(|e| agent.error(e))?;
    let mut bytes = Vec::new();
    let answer = loop {
        if let Some(answer) = http::parse(&bytes)? {
            break answer;
        }
        if connection.read_buf(&mut bytes).await.map_err(|e| agent.error(e))? == 0 {
            return Err(agent.error(io::ErrorKind::UnexpectedEof.into()));
        }
    };
    let leased = leased(&answer)?;
    Ok(Lease::new(&leased, connection.into_std()?))
}

async fn connect_from(port: u16, destination: SocketAddr, reuse: bool) -> io::Result<TcpStream> {
    let socket = if destination.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(reuse)?;
    socket.bind(unspecified(destination, port))?;
    socket.connect(destination).await
}

impl Stream {
    /// Returns the two parts, for callers that keep the lease longer than the connection.
    #[must_use]
    pub fn into_parts(self) -> (TcpStream, Option<Lease>) {
        (self.tcp, self.lease)
    }
}

impl Deref for Stream {
    type Target = TcpStream;

    fn deref(&self) -> &TcpStream {
        &self.tcp
    }
}

impl DerefMut for Stream {
    fn deref_mut(&mut self) -> &mut TcpStream {
        &mut self.tcp
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_read(cx, into)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write(cx, from)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}
