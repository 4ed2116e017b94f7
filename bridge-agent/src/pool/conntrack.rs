//! Which closed connections conntrack still remembers: their ports are no good for another pod yet.

use std::{collections::HashSet, io};

use bridge_common::pool::Destination;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

/// `NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_GET`.
const CT_GET: u16 = (1 << 8) | 1;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_IP_V4_DST: u16 = 2;
const CTA_IP_V6_DST: u16 = 4;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;
const HEADER: usize = 16;
const NFGENMSG: usize = 4;

/// Destination and source port (host byte order) of every TCP and UDP connection that conntrack knows in this network
/// namespace, in the direction of its first packet.
///
/// # Errors
/// What the kernel says; ENOENT or EOPNOTSUPP without conntrack.
pub fn known() -> io::Result<HashSet<(Destination, u16)>> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut known = HashSet::new();
    // AF_INET and AF_INET6.
    for family in [2, 10] {
        socket.send(&request(family), 0)?;
        loop {
            let (answer, _) = socket.recv_from_full()?;
            if !collect(&answer, &mut known)? {
                break;
            }
        }
    }
    Ok(known)
}

fn request(family: u8) -> Vec<u8> {
    let mut message = Vec::with_capacity(HEADER + NFGENMSG);
    message.extend(20_u32.to_ne_bytes());
    message.extend(CT_GET.to_ne_bytes());
    message.extend((NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    message.extend([0; 8]);
    message.extend([family, 0, 0, 0]);
    message
}

/// Reads one datagram of a dump. `false`: it was the last one.
fn collect(mut messages: &[u8], known: &mut HashSet<(Destination, u16)>) -> io::Result<bool> {
    while messages.len() >= HEADER {
        let length = u32::from_ne_bytes([messages[0], messages[1], messages[2], messages[3]]) as usize;
        let kind = u16::from_ne_bytes([messages[4], messages[5]]);
        if length < HEADER || length > messages.len() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let body = &messages[HEADER..length];
        match kind {
            NLMSG_DONE => return Ok(false),
            NLMSG_ERROR => {
                let code = body.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
                return if code == 0 { Ok(false) } else { Err(io::Error::from_raw_os_error(-code)) };
            }
            _ => known.extend(body.get(NFGENMSG..).and_then(connection)),
        }
        messages = messages.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(true)
}

fn connection(attributes: &[u8]) -> Option<(Destination, u16)> {
    let tuple = attribute(attributes, CTA_TUPLE_ORIG)?;
    let (ip, proto) = (attribute(tuple, CTA_TUPLE_IP)?, attribute(tuple, CTA_TUPLE_PROTO)?);
    let protocol = *attribute(proto, CTA_PROTO_NUM)?.first()?;
    let port = |which| attribute(proto, which).and_then(|bytes| bytes.first_chunk::<2>().copied());
    let (from, to) = (port(CTA_PROTO_SRC_PORT)?, port(CTA_PROTO_DST_PORT)?);
    let destination = match attribute(ip, CTA_IP_V4_DST).and_then(|ip| ip.first_chunk::<4>()) {
        Some(ip) => Destination::from_network_v4(*ip, to, protocol),
        None => Destination::from_network(*attribute(ip, CTA_IP_V6_DST)?.first_chunk::<16>()?, to, protocol),
    };
    Some((destination, u16::from_be_bytes(from)))
}

/// The value of an attribute among others (`struct nlattr`).
fn attribute(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    const TYPE_MASK: u16 = 0x3fff;
    while let [a, b, c, d, ..] = *attributes {
        let length = usize::from(u16::from_ne_bytes([a, b]));
        let value = attributes.get(4..length)?;
        if u16::from_ne_bytes([c, d]) & TYPE_MASK == wanted {
            return Some(value);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attr(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = u16::try_from(4 + value.len()).unwrap().to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn message(protocol: u8) -> Vec<u8> {
        const NESTED: u16 = 0x8000;
        let ip = [attr(1, &[10, 200, 1, 91]), attr(CTA_IP_V4_DST, &[192, 168, 31, 67])].concat();
        let proto = [
            attr(CTA_PROTO_NUM, &[protocol]),
            attr(CTA_PROTO_SRC_PORT, &61001_u16.to_be_bytes()),
            attr(CTA_PROTO_DST_PORT, &443_u16.to_be_bytes()),
        ]
        .concat();
        let tuple = [attr(CTA_TUPLE_IP | NESTED, &ip), attr(CTA_TUPLE_PROTO | NESTED, &proto)].concat();
        let body = [vec![2, 0, 0, 0], attr(CTA_TUPLE_ORIG | NESTED, &tuple)].concat();
        let mut message = u32::try_from(HEADER + body.len()).unwrap().to_ne_bytes().to_vec();
        message.extend([0, 1, 2, 0]);
        message.extend([0; 8]);
        message.extend(body);
        message
    }

    #[test]
    fn a_connection_is_known_by_its_first_direction() {
        let mut known = HashSet::new();
        assert!(collect(&[message(6), message(17)].concat(), &mut known).unwrap());
        let to = |protocol| Destination::from_network_v4([192, 168, 31, 67], [1, 187], protocol);
        assert_eq!(known, HashSet::from([(to(6), 61001), (to(17), 61001)]));
    }

    #[test]
    fn a_message_that_is_cut_off_anywhere_does_no_harm() {
        let whole = message(6);
        for cut in 0..whole.len() {
            let mut known = HashSet::new();
            // An error or nothing, but no panic and no wrong entry.
            let _ = collect(&whole[..cut], &mut known);
            assert!(known.is_empty());
        }
    }

    #[test]
    fn a_refusal_is_an_error() {
        let mut message = 20_u32.to_ne_bytes().to_vec();
        message.extend([2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        message.extend((-libc::EPERM).to_ne_bytes());
        let error = collect(&message, &mut HashSet::new()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EPERM));
    }
}
