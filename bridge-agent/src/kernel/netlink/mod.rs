//! Netlink (RFC 3549): one socket for requests, one loop that reads dumps, one walk over attributes.
//!
//! Requests block while the kernel works on them: it handles them inside the system call. Notifications arrive on
//! sockets of their own, see [`subscribe`].

mod frame;
mod lookup;
mod namespace;
mod route;
mod socket;

use std::io;

use netlink_sys::protocols::NETLINK_ROUTE;
use thiserror::Error;

pub(crate) use frame::{Header, NESTED, attribute, attributes, encode_attribute, messages};
pub use lookup::{Packet, Way};
pub use namespace::Namespace;
pub(crate) use namespace::NamespaceWatch;
pub(crate) use route::message_of;
pub use route::{Route, Watch, interface_name};
pub(crate) use socket::{RECEIVE_BUFFER, Socket, receive};

/// Why the kernel could not be read or changed.
#[derive(Debug, Error)]
pub enum Error {
    /// No netlink socket.
    #[error("cannot open a netlink socket: {0}; check that the agent has CAP_NET_ADMIN")]
    Open(#[source] io::Error),
    /// A system call failed.
    #[error("netlink: {0}")]
    Io(#[from] io::Error),
    /// The kernel dropped messages because they were not read in time (ENOBUFS).
    #[error("netlink: the kernel dropped messages (ENOBUFS); everything is read again")]
    Overrun,
    /// The objects changed during each of several dumps (`NLM_F_DUMP_INTR`).
    #[error("netlink: the tables change faster than they can be read; everything is read again")]
    Interrupted,
    /// The kernel sent a message that is not netlink.
    #[error("netlink: a message that cannot be understood ({0})")]
    Malformed(String),
    /// The kernel refused a request.
    #[error("{0}")]
    Refused(KernelError),
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Open(error) | Error::Io(error) => error,
            Error::Overrun => Self::from_raw_os_error(libc::ENOBUFS),
            Error::Interrupted => io::ErrorKind::Interrupted.into(),
            Error::Malformed(_) => Self::new(io::ErrorKind::InvalidData, error),
            Error::Refused(error) => Self::from_raw_os_error(error.errno),
        }
    }
}

/// The kernel's answer to a request that it refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{}{}", io::Error::from_raw_os_error(*.errno), message.as_ref().map(|m| format!(" ({m})")).unwrap_or_default())]
pub struct KernelError {
    /// Positive `errno`.
    pub errno: i32,
    /// The extended acknowledgement (`NLMSGERR_ATTR_MSG`), if there was one.
    pub message: Option<String>,
}

/// Opens a non-blocking rtnetlink socket that receives the notifications of `groups` (linux/rtnetlink.h) in the network
/// namespace of this thread.
///
/// # Errors
///
/// Of `socket(2)` and `setsockopt(2)`.
pub(crate) fn subscribe(groups: &[u32]) -> io::Result<netlink_sys::Socket> {
    subscribe_to(NETLINK_ROUTE, groups)
}

/// As [`subscribe`], of a `NETLINK_*` protocol.
pub(crate) fn subscribe_to(protocol: isize, groups: &[u32]) -> io::Result<netlink_sys::Socket> {
    let mut socket = netlink_sys::Socket::new(protocol)?;
    socket.bind_auto()?;
    for group in groups {
        socket.add_membership(*group)?;
    }
    socket.set_non_blocking(true)?;
    Ok(socket)
}
