//! Deletes connections of addresses that have gone.

use std::{collections::BTreeSet, io, net::IpAddr};

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

use super::{Connection, IPPROTO_ICMP, IPPROTO_ICMPV6, Tuple, for_each};

/// Deletes every connection from or to one of `addresses` in the network namespace of this thread, except for ICMP
/// queries, which end by themselves within seconds. Returns the number of deleted connections.
///
/// # Errors
///
/// Those of the kernel; [`io::ErrorKind::Unsupported`] without conntrack.
pub fn forget(addresses: &BTreeSet<IpAddr>) -> io::Result<usize> {
    let mut originals = Vec::new();
    for_each(|Connection { original, reply, .. }| {
        let ends = [original.source, original.destination, reply.source, reply.destination];
        let queries = matches!(original.protocol, IPPROTO_ICMP | IPPROTO_ICMPV6);
        if !queries && ends.iter().any(|end| addresses.contains(end)) {
            originals.push(original);
        }
    })?;
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut deleted = 0;
    for original in &originals {
        socket.send(&request(original), 0)?;
        let (answer, _) = socket.recv_from_full()?;
        // Another program, or its age, may have removed a connection since it was listed.
        deleted += usize::from(answer.get(16..20) == Some(&[0; 4]));
    }
    Ok(deleted)
}

/// Encodes `IPCTNL_MSG_CT_DELETE` with the tuple of the first packet.
fn request(original: &Tuple) -> Vec<u8> {
    const CTNETLINK_DELETE: u16 = 1 << 8 | 2; // NFNL_SUBSYS_CTNETLINK
    const NLM_F_REQUEST_ACK: u16 = 0x1 | 0x4;
    const NESTED: u16 = 1 << 15;
    let (family, ip) = match (original.source, original.destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            (libc::AF_INET, [attribute(1, &source.octets()), attribute(2, &destination.octets())].concat())
        }
        (source, destination) => {
            (libc::AF_INET6, [attribute(3, &octets(source)), attribute(4, &octets(destination))].concat())
        }
    };
    let protocol = [
        attribute(1, &[original.protocol]),
        attribute(2, &original.source_port.to_be_bytes()),
        attribute(3, &original.destination_port.to_be_bytes()),
    ]
    .concat();
    let tuple = [attribute(1 | NESTED, &ip), attribute(2 | NESTED, &protocol)].concat();
    let tuple = attribute(1 | NESTED, &tuple); // CTA_TUPLE_ORIG
    let length = u32::try_from(20 + tuple.len()).unwrap_or(u32::MAX);
    let mut request = length.to_ne_bytes().to_vec();
    request.extend(CTNETLINK_DELETE.to_ne_bytes());
    request.extend(NLM_F_REQUEST_ACK.to_ne_bytes());
    request.extend([0; 8]); // sequence number, port
    request.extend([u8::try_from(family).unwrap_or_default(), 0, 0, 0]);
    request.extend(tuple);
    request
}

fn octets(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
    let mut attribute = [&length.to_ne_bytes(), &kind.to_ne_bytes(), value].concat();
    attribute.resize(attribute.len().next_multiple_of(4), 0);
    attribute
}
