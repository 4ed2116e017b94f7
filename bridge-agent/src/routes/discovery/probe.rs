//! The pod's side of discovery. Opens one connection, waits on one port, needs no privileges.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use thiserror::Error;
use tokio::net::{TcpListener, TcpStream};

use super::message::{Announcement, Answer, Key, Message, Nonce, Token};
use super::{ExchangeError, clock, receive, send, within};

/// How to probe.
#[derive(Clone, Debug)]
pub struct Options {
    /// The host that listens.
    pub host: SocketAddr,
    /// Shared with it.
    pub key: Key,
    /// The pod's address; `None` takes the one the connection leaves from.
    pub address: Option<IpAddr>,
    /// Where to wait for the host to connect back; 0 lets the kernel choose. Behind a firewall, a port that LAN
    /// hosts may reach.
    pub check_port: u16,
    /// How long the host shall remember.
    pub lifetime: Duration,
    /// Shown at the host; at most [`super::message::MAX_NAME`] bytes.
    pub name: String,
    /// For all of it.
    pub timeout: Duration,
}

/// Why there is no answer. (An answer may still be a refusal.)
#[derive(Debug, Error)]
pub enum ProbeError {
    /// No connection.
    #[error(
        "cannot connect to {host}: {error}; check that `bridge-agent discover listen` runs there and that the port is allowed"
    )]
    Connect {
        host: SocketAddr,
        #[source]
        error: io::Error,
    },
    /// Cannot wait for the check.
    #[error(
        "cannot wait on {address} for the host to connect back: {error}; `--check-port` chooses another port"
    )]
    Bind {
        /// Where.
        address: SocketAddr,
        #[source]
        error: io::Error,
    },
    /// The conversation broke off. A host that holds another key hangs up without a word.
    #[error("{host}: {error}; if it hung up at once, compare the key files and look at its events")]
    Exchange {
        host: SocketAddr,
        #[source]
        error: ExchangeError,
    },
}

/// Announces the pod once.
pub async fn probe(options: &Options) -> Result<Answer, ProbeError> {
    let host = options.host;
    let connect = tokio::time::timeout(options.timeout, TcpStream::connect(host)).await;
    let mut stream = connect
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
        .map_err(|error| ProbeError::Connect { host, error })?;
    let address = match options.address {
        Some(address) => address,
        None => stream.local_addr().map_err(|error| ProbeError::Connect { host, error })?.ip().to_canonical(),
    };
    let waiting = SocketAddr::new(address, options.check_port);
    let bound = async {
        let listener = TcpListener::bind(waiting).await?;
        let port = listener.local_addr()?.port();
        Ok((listener, port))
    };
    let (listener, check_port) = bound.await.map_err(|error| ProbeError::Bind { address: waiting, error })?;
    let conversation = async {
        let key = &options.key;
        let Message::Hello(challenge) = receive(&mut stream, key).await? else {
            return Err(ExchangeError::OutOfTurn);
        };
        let nonce: Nonce = rand::random();
        let announcement = Announcement {
            challenge,
            nonce,
            timestamp: clock(),
            lifetime: u32::try_from(options.lifetime.as_secs()).unwrap_or(u32::MAX),
            check_port,
            address,
            name: options.name.clone(),
        };
        send(&mut stream, &Message::Announcement(announcement), key).await?;
        loop {
            tokio::select! {
                answer = receive(&mut stream, key) => match answer? {
                    Message::Answer(answer) if answer.nonce == nonce => return Ok(answer),
                    _ => return Err(ExchangeError::OutOfTurn),
                },
                accepted = listener.accept() => if let Ok((stream, peer)) = accepted
                    && let Err(error) = prove(stream, nonce, key).await
                {
                    // Another client found the port; the host's connection may still come.
                    tracing::debug!(%peer, %error, "discovery: not the host's check");
                },
            }
        }
    };
    within(options.timeout, conversation).await.map_err(|error| ProbeError::Exchange { host, error })
}

async fn prove(mut stream: TcpStream, nonce: Nonce, key: &Key) -> Result<(), ExchangeError> {
    within(Duration::from_secs(2), async {
        match receive(&mut stream, key).await? {
            Message::Check(Token { nonce: of, challenge }) if of == nonce => {
                send(&mut stream, &Message::Proof(Token { nonce, challenge }), key).await
            }
            _ => Err(ExchangeError::OutOfTurn),
        }
    })
    .await
}
