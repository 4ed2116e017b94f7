//! Makes connections established again that conntrack, made liberal, believes to end.

use std::{fs, io};

use netlink_sys::protocols::NETLINK_NETFILTER;

use super::{
    Tuple,
    forget::{BATCH, tuple},
};
use crate::kernel::netlink::{NESTED, Socket, encode_attribute as attribute};

/// `NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_NEW`.
pub(super) const CT_NEW: u16 = 1 << 8;
/// `TCP_CONNTRACK_ESTABLISHED` (linux/netfilter/nf_conntrack_tcp.h).
pub(super) const ESTABLISHED: u8 = 3;

/// The packets of one direction of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Those of the initiator, before the node translates them.
    Original(Tuple),
    /// Those of the responder, before the node translates them.
    Reply(Tuple),
}

/// Makes TCP connections established. Returns how many there were.
///
/// # Errors
///
/// Those of the kernel.
pub fn restore(connections: &[Direction]) -> io::Result<usize> {
    let timeout = fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established")?;
    let timeout: u32 = timeout.trim().parse().map_err(io::Error::other)?;
    let mut socket = Socket::open(NETLINK_NETFILTER)?;
    let mut restored = 0;
    for batch in connections.chunks(BATCH) {
        let requests = batch.iter().map(|connection| (CT_NEW, 0, body(connection, timeout)));
        // A connection may have gone meanwhile.
        restored += socket.request(requests)?.iter().filter(|refusal| refusal.is_none()).count();
    }
    Ok(restored)
}

/// Encodes the body of `IPCTNL_MSG_CT_NEW`: CTA_TUPLE_ORIG or CTA_TUPLE_REPLY, CTA_PROTOINFO, CTA_TIMEOUT
/// (linux/netfilter/nfnetlink_conntrack.h).
fn body(connection: &Direction, timeout: u32) -> Vec<u8> {
    let (which, of) = match connection {
        Direction::Original(of) => (1, of),
        Direction::Reply(of) => (2, of),
    };
    let (header, tuple) = tuple(of);
    let header = header.to_vec();
    let state = attribute(1 | NESTED, &attribute(1, &[ESTABLISHED]));
    [
        header,
        attribute(which | NESTED, &tuple),
        attribute(4 | NESTED, &state),
        attribute(7, &timeout.to_be_bytes()),
    ]
    .concat()
}
