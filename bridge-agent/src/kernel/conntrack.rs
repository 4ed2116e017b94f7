//! Reads conntrack: ctnetlink (linux/netfilter/nfnetlink_conntrack.h).

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use netlink_sys::protocols::NETLINK_NETFILTER;

use super::netlink::{Socket, attribute};

const IPPROTO_ICMP: u8 = 1;
const IPPROTO_ICMPV6: u8 = 58;

/// One direction of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tuple {
    /// Source address.
    pub source: IpAddr,
    /// Source port; for ICMP queries the identifier.
    pub source_port: u16,
    /// Destination address.
    pub destination: IpAddr,
    /// Destination port; for ICMP queries the identifier.
    pub destination_port: u16,
    /// IP protocol number.
    pub protocol: u8,
}

/// A conntrack entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connection {
    /// The direction of its first packet.
    pub original: Tuple,
    /// The direction of replies: mirrors `original`, except for address translation.
    pub reply: Tuple,
    /// `IPS_SEEN_REPLY`.
    pub replied: bool,
    /// `TCP_CONNTRACK_*` (linux/netfilter/nf_conntrack_tcp.h); 0 for other protocols.
    pub tcp_state: u8,
}

/// Visits every conntrack entry in the network namespace of this thread.
///
/// # Errors
///
/// The kernel's refusal; [`io::ErrorKind::Unsupported`] if it has no conntrack.
pub fn for_each(mut visit: impl FnMut(Connection)) -> io::Result<()> {
    /// `NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_GET`.
    const CT_GET: u16 = 1 << 8 | 1;
    /// `struct nfgenmsg`: any family, version 0, no resource.
    const NFGENMSG: [u8; 4] = [0; 4];
    let mut socket = Socket::open(NETLINK_NETFILTER).map_err(unsupported)?;
    socket
        .dump_once(CT_GET, &NFGENMSG, |_, body| {
            if let Some(connection) = body.get(NFGENMSG.len()..).and_then(decode) {
                visit(connection);
            }
        })
        .map_err(unsupported)
}

fn unsupported(error: super::netlink::Error) -> io::Error {
    let error = io::Error::from(error);
    match error.raw_os_error() {
        Some(libc::EPROTONOSUPPORT | libc::EOPNOTSUPP | libc::EINVAL | libc::ENOENT) => {
            io::Error::new(io::ErrorKind::Unsupported, error)
        }
        _ => error,
    }
}

fn decode(attributes: &[u8]) -> Option<Connection> {
    const CTA_TUPLE_ORIG: u16 = 1;
    const CTA_TUPLE_REPLY: u16 = 2;
    const CTA_STATUS: u16 = 3;
    const CTA_PROTOINFO: u16 = 4;
    const CTA_PROTOINFO_TCP: u16 = 1;
    const CTA_PROTOINFO_TCP_STATE: u16 = 1;
    const IPS_SEEN_REPLY: u32 = 1 << 1;
    let status =
        attribute(attributes, CTA_STATUS)?.first_chunk().map(|status| u32::from_be_bytes(*status))?;
    let tcp_state = attribute(attributes, CTA_PROTOINFO)
        .and_then(|info| attribute(info, CTA_PROTOINFO_TCP))
        .and_then(|tcp| attribute(tcp, CTA_PROTOINFO_TCP_STATE))
        .and_then(|state| state.first().copied());
    Some(Connection {
        original: decode_tuple(attribute(attributes, CTA_TUPLE_ORIG)?)?,
        reply: decode_tuple(attribute(attributes, CTA_TUPLE_REPLY)?)?,
        replied: status & IPS_SEEN_REPLY != 0,
        tcp_state: tcp_state.unwrap_or(0),
    })
}

fn decode_tuple(attributes: &[u8]) -> Option<Tuple> {
    const CTA_TUPLE_IP: u16 = 1;
    const CTA_TUPLE_PROTO: u16 = 2;
    const CTA_IP_V4_SRC: u16 = 1;
    const CTA_IP_V4_DST: u16 = 2;
    const CTA_IP_V6_SRC: u16 = 3;
    const CTA_IP_V6_DST: u16 = 4;
    const CTA_PROTO_NUM: u16 = 1;
    const CTA_PROTO_SRC_PORT: u16 = 2;
    const CTA_PROTO_DST_PORT: u16 = 3;
    const CTA_PROTO_ICMP_ID: u16 = 4;
    const CTA_PROTO_ICMPV6_ID: u16 = 7;
    let ip = attribute(attributes, CTA_TUPLE_IP)?;
    let protocol = attribute(attributes, CTA_TUPLE_PROTO)?;
    let address = |v4: u16, v6: u16| {
        let v4 = attribute(ip, v4).and_then(<[u8]>::first_chunk::<4>).map(|v4| Ipv4Addr::from(*v4).into());
        v4.or_else(|| {
            attribute(ip, v6).and_then(<[u8]>::first_chunk::<16>).map(|v6| Ipv6Addr::from(*v6).into())
        })
    };
    let port = |kind: u16| {
        attribute(protocol, kind).and_then(<[u8]>::first_chunk).map(|port| u16::from_be_bytes(*port))
    };
    let number = *attribute(protocol, CTA_PROTO_NUM)?.first()?;
    let (source_port, destination_port) = match number {
        IPPROTO_ICMP | IPPROTO_ICMPV6 => {
            let identifier = port(CTA_PROTO_ICMP_ID).or_else(|| port(CTA_PROTO_ICMPV6_ID))?;
            (identifier, identifier)
        }
        _ => (port(CTA_PROTO_SRC_PORT).unwrap_or(0), port(CTA_PROTO_DST_PORT).unwrap_or(0)),
    };
    Some(Tuple {
        source: address(CTA_IP_V4_SRC, CTA_IP_V6_SRC)?,
        source_port,
        destination: address(CTA_IP_V4_DST, CTA_IP_V6_DST)?,
        destination_port,
        protocol: number,
    })
}

#[cfg(test)]
mod tests {
    use super::super::netlink::encode_attribute;
    use super::*;

    fn tuple(source: [u8; 4], source_port: u16, destination: [u8; 4], destination_port: u16) -> Vec<u8> {
        let ip = [encode_attribute(1, &source), encode_attribute(2, &destination)].concat();
        let protocol = [
            encode_attribute(1, &[6]),
            encode_attribute(2, &source_port.to_be_bytes()),
            encode_attribute(3, &destination_port.to_be_bytes()),
        ]
        .concat();
        [encode_attribute(0x8001, &ip), encode_attribute(0x8002, &protocol)].concat()
    }

    fn connection() -> Vec<u8> {
        let original = tuple([10, 200, 1, 91], 61_001, [192, 168, 31, 67], 443);
        let reply = tuple([192, 168, 31, 67], 443, [192, 168, 31, 17], 1_024);
        let tcp = encode_attribute(0x8001, &encode_attribute(1, &[3]));
        [
            encode_attribute(0x8001, &original),
            encode_attribute(0x8002, &reply),
            encode_attribute(3, &0b10_u32.to_be_bytes()),
            encode_attribute(0x8004, &tcp),
        ]
        .concat()
    }

    #[test]
    fn an_entry_has_both_directions_and_its_tcp_state() {
        let found = decode(&connection()).unwrap();
        let tuple = |source: &str, source_port, destination: &str, destination_port| Tuple {
            source: source.parse().unwrap(),
            source_port,
            destination: destination.parse().unwrap(),
            destination_port,
            protocol: 6,
        };
        let expected = Connection {
            original: tuple("10.200.1.91", 61_001, "192.168.31.67", 443),
            reply: tuple("192.168.31.67", 443, "192.168.31.17", 1_024),
            replied: true,
            tcp_state: 3,
        };
        assert_eq!(found, expected);
    }

    #[test]
    fn an_entry_that_is_cut_off_has_no_wrong_tuple() {
        let (whole, bytes) = (decode(&connection()).unwrap(), connection());
        for cut in 0..bytes.len() {
            if let Some(found) = decode(&bytes[..cut]) {
                assert_eq!((found.original, found.reply), (whole.original, whole.reply));
            }
        }
    }
}
