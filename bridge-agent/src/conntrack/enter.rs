//! Enters connections that were open before the kernel tracked any.

use std::io;

use netlink_packet_core::NLM_F_CREATE;
use netlink_sys::protocols::NETLINK_NETFILTER;

use bridge_common::protocol;

use super::{
    Tuple,
    forget::{BATCH, tuple},
    restore::{CT_NEW, ESTABLISHED},
};
use crate::kernel::netlink::{NESTED, Socket, encode_attribute as attribute};

/// `IPS_SEEN_REPLY | IPS_ASSURED` and `IPS_CONFIRMED` (linux/netfilter/nf_conntrack_common.h).
const ANSWERED: u32 = 1 << 1 | 1 << 2;
const CONFIRMED: u32 = 1 << 3;
/// `IP_CT_TCP_FLAG_BE_LIBERAL` (linux/netfilter/nf_conntrack_tcp.h), as flags and mask: the window is not known.
const LIBERAL: [u8; 2] = [8, 8];
/// `SCTP_CONNTRACK_ESTABLISHED` (linux/netfilter/nf_conntrack_sctp.h).
const SCTP_ESTABLISHED: u8 = 4;

/// An open connection that no address translation concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened {
    /// Its first packet.
    pub opening: Tuple,
    /// Whether packets of both directions were seen.
    pub answered: bool,
    /// SCTP: verification tags of packets of the initiator, and of the responder.
    pub tags: [u32; 2],
    /// For how long it may be silent, in seconds.
    pub timeout: u32,
}

/// Enters connections, or notes of those that are known that they were answered. Returns how many the kernel took.
///
/// # Errors
///
/// The kernel has no conntrack, or the request failed as a whole.
pub fn enter(connections: &[Opened]) -> io::Result<usize> {
    let mut socket = Socket::open(NETLINK_NETFILTER)?;
    let mut entered = 0;
    for batch in connections.chunks(BATCH) {
        let requests = batch.iter().map(|connection| (CT_NEW, NLM_F_CREATE, body(connection)));
        for refusal in socket.request(requests)? {
            match refusal {
                None => entered += 1,
                Some(refusal) => tracing::debug!(errno = refusal.errno, "conntrack takes no connection"),
            }
        }
    }
    Ok(entered)
}

/// Encodes the body of `IPCTNL_MSG_CT_NEW` (linux/netfilter/nfnetlink_conntrack.h).
fn body(connection: &Opened) -> Vec<u8> {
    let Opened { opening, answered, tags: [of_initiator, of_responder], timeout } = connection;
    let reply = Tuple {
        source: opening.destination,
        source_port: opening.destination_port,
        destination: opening.source,
        destination_port: opening.source_port,
        protocol: opening.protocol,
    };
    let ((header, original), (_, reply)) = (tuple(opening), tuple(&reply));
    let status = CONFIRMED | if *answered { ANSWERED } else { 0 };
    // CTA_PROTOINFO_TCP and CTA_PROTOINFO_SCTP.
    let state = match opening.protocol {
        protocol::TCP => {
            Some((1, [attribute(1, &[ESTABLISHED]), attribute(4, &LIBERAL), attribute(5, &LIBERAL)]))
        }
        protocol::SCTP => Some((
            3,
            [
                attribute(1, &[SCTP_ESTABLISHED]),
                attribute(2, &of_initiator.to_be_bytes()),
                attribute(3, &of_responder.to_be_bytes()),
            ],
        )),
        _ => None,
    };
    let state = state.map(|(kind, state)| attribute(4 | NESTED, &attribute(kind | NESTED, &state.concat())));
    [
        header.to_vec(),
        // CTA_TUPLE_ORIG, CTA_TUPLE_REPLY, CTA_STATUS, CTA_PROTOINFO, CTA_TIMEOUT.
        attribute(1 | NESTED, &original),
        attribute(2 | NESTED, &reply),
        attribute(3, &status.to_be_bytes()),
        state.unwrap_or_default(),
        attribute(7, &timeout.to_be_bytes()),
    ]
    .concat()
}
