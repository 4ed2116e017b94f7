//! Why the API cannot be served.

use std::{io, path::PathBuf};

/// Why the API cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another agent answers on the socket.
    #[error("an agent{} already answers on {}: stop that one first, or write another api.socket", pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default(), path.display())]
    InUse {
        /// The socket.
        path: PathBuf,
        /// The other agent, if it is in a PID namespace that we see.
        pid: Option<i32>,
    },
    /// Something else is where the socket is to be.
    #[error("{} exists and is not a socket: remove it, or write another api.socket", .0.display())]
    NotASocket(PathBuf),
    /// There is no such group.
    #[error("there is no group {0}: correct api.group, or make it with `groupadd --system {0}`")]
    NoGroup(String),
    /// The name service does not answer.
    #[error(
        "cannot look up the group {group}: {source}; check nsswitch.conf(5), or write the number of the group"
    )]
    Group {
        group: String,
        /// The error of getgrnam(3) or getent(1).
        source: io::Error,
    },
    /// A listening socket could not be made.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Where.
        address: String,
        /// Error of the kernel.
        source: io::Error,
    },
    /// There is nothing to serve with.
    #[error("cannot serve the API: {0}")]
    Serve(#[source] io::Error),
}
