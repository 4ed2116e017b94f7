//! Why nothing was discovered.

use std::{io, net::SocketAddr, path::PathBuf};

use crate::routes::discovery::{KeyError, probe::ProbeError};

/// Why nothing was discovered.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// No answer.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// The host said no.
    #[error("{host} refused: {text}")]
    Refused {
        /// The host.
        host: SocketAddr,
        /// Its words.
        text: String,
    },
    /// The name of the host.
    #[error("{name}: {reason}; write HOST:PORT, for example 192.168.31.67:12345")]
    Name {
        /// As written.
        name: String,
        /// Why.
        reason: String,
    },
    /// No packet socket.
    #[error("cannot see packets: {0}; this takes CAP_NET_RAW")]
    Sniff(#[source] io::Error),
    /// Two would undo each other's routes.
    #[error(
        "the agent is running and takes announcements itself if `routes.discovery` is configured; its events are those of `bridge-agent monitor`"
    )]
    AgentRuns,
    /// No address to listen on.
    #[error("{} configures no routes.discovery; add it, or write --listen and --key-file", .0.display())]
    NotConfigured(PathBuf),
}
