//! Takes over the connections that the kernel's conntrack knows, so that the very first start of enforcement cuts
//! none of them: reads ctnetlink (linux/netfilter/nfnetlink_conntrack.h), writes entries of the flow table.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use bridge_common::{
    flow::{Flow, FlowKey, flag, state},
    policy::{direction, side},
};
use ipnet::IpNet;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

use crate::policy::Tables;

const IPPROTO_ICMP: u8 = 1;
const IPPROTO_TCP: u8 = 6;
const IPPROTO_UDP: u8 = 17;
const IPPROTO_ICMPV6: u8 = 58;

/// One direction of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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

/// A connection that conntrack knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connection {
    /// As its first packet was.
    pub original: Tuple,
    /// As replies come in: mirrors `original`, but for address translation.
    pub reply: Tuple,
    /// Whether a reply was seen.
    pub replied: bool,
    /// `TCP_CONNTRACK_*` (linux/netfilter/nf_conntrack_tcp.h); 0 for other protocols.
    pub tcp_state: u8,
}

/// Which addresses matter, and as what.
#[derive(Clone, Debug)]
pub struct Scope {
    sides: HashMap<IpNet, u32>,
    /// Prefix lengths in use, longest first; IPv4, IPv6.
    lengths: [Vec<u8>; 2],
    node_ports: [u16; 2],
}

impl Scope {
    /// As a compiled policy says.
    #[must_use]
    pub fn new(tables: &Tables) -> Self {
        let sides: HashMap<IpNet, u32> =
            tables.addresses.iter().map(|(prefix, info)| (prefix.trunc(), info.side)).collect();
        let lengths = [false, true].map(|v6| {
            let mut lengths: Vec<u8> = sides
                .keys()
                .filter(|prefix| matches!(prefix, IpNet::V6(_)) == v6)
                .map(IpNet::prefix_len)
                .collect();
            lengths.sort_unstable_by(|a, b| b.cmp(a));
            lengths.dedup();
            lengths
        });
        Self { sides, lengths, node_ports: tables.node_ports }
    }

    fn side(&self, address: IpAddr) -> u32 {
        self.lengths[usize::from(address.is_ipv6())]
            .iter()
            .filter_map(|length| IpNet::new(address, *length).ok())
            .find_map(|prefix| self.sides.get(&prefix.trunc()))
            .copied()
            .unwrap_or(0)
    }

    /// The direction in which a connection is judged that is opened like this; `None`: it is not.
    fn direction(&self, opening: &Tuple) -> Option<u8> {
        let [first, last] = self.node_ports;
        match (self.side(opening.source), self.side(opening.destination)) {
            (side::POD, side::EXTERNAL) => Some(direction::OUTBOUND),
            (side::EXTERNAL, side::POD) => Some(direction::INBOUND),
            (side::EXTERNAL, side::LOCAL)
                if last != 0 && (first..=last).contains(&opening.destination_port) =>
            {
                Some(direction::NODE_PORT)
            }
            _ => None,
        }
    }

    /// The flows that a connection is to the kernel side: none, one, or two where the destination is translated and
    /// packets are seen both before and after that.
    #[must_use]
    pub fn flows(&self, connection: &Connection, now: u64) -> Vec<(FlowKey, Flow)> {
        let Some((state, flags)) = flow_state(connection) else { return Vec::new() };
        let translated = Tuple {
            source: connection.reply.destination,
            source_port: connection.reply.destination_port,
            destination: connection.reply.source,
            destination_port: connection.reply.source_port,
            protocol: connection.reply.protocol,
        };
        let mut openings = vec![connection.original];
        if translated != connection.original {
            openings.push(translated);
        }
        openings
            .into_iter()
            .filter_map(|opening| {
                let direction = self.direction(&opening)?;
                let mut key = FlowKey::default();
                let initiator = key.set(
                    &opening.source.into(),
                    opening.source_port.to_be_bytes(),
                    &opening.destination.into(),
                    opening.destination_port.to_be_bytes(),
                    opening.protocol,
                );
                let flags = flags | flag::SEEDED;
                let flow = Flow {
                    last_seen: now,
                    created: now,
                    state,
                    initiator,
                    direction,
                    flags,
                    ..Flow::default()
                };
                Some((key, flow))
            })
            .collect()
    }
}

/// State and flags of the flow; `None` for what can begin again without harm, or is over.
fn flow_state(connection: &Connection) -> Option<(u8, u8)> {
    const SYN_RECV: u8 = 2;
    const ESTABLISHED: u8 = 3;
    const FIN_WAIT: u8 = 4;
    const CLOSE_WAIT: u8 = 5;
    const LAST_ACK: u8 = 6;
    const TIME_WAIT: u8 = 7;
    match connection.original.protocol {
        IPPROTO_TCP => match connection.tcp_state {
            SYN_RECV | ESTABLISHED => Some((state::ESTABLISHED, 0)),
            // Conntrack does not tell who has sent the FIN, and nothing depends on it.
            FIN_WAIT | CLOSE_WAIT => Some((state::FIN_WAIT, flag::FIN_INITIATOR)),
            LAST_ACK | TIME_WAIT => Some((state::CLOSING, flag::FIN_INITIATOR | flag::FIN_RESPONDER)),
            _ => None,
        },
        _ if !connection.replied => None,
        IPPROTO_UDP => Some((state::UDP_REPLIED, 0)),
        IPPROTO_ICMP | IPPROTO_ICMPV6 => Some((state::ICMP_REPLIED, 0)),
        _ => Some((state::OTHER_REPLIED, 0)),
    }
}

/// Visits every connection that conntrack knows in the network namespace of this thread.
///
/// # Errors
///
/// What the kernel answers; [`io::ErrorKind::Unsupported`] if it has no conntrack.
pub fn for_each(mut visit: impl FnMut(Connection)) -> io::Result<()> {
    const CTNETLINK_GET: u16 = 1 << 8 | 1; // NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET
    const NLM_F_REQUEST_DUMP: u16 = 0x1 | 0x300;
    let mut socket = Socket::new(NETLINK_NETFILTER).map_err(unsupported)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut request = Vec::with_capacity(20);
    request.extend_from_slice(&20_u32.to_ne_bytes());
    request.extend_from_slice(&CTNETLINK_GET.to_ne_bytes());
    request.extend_from_slice(&NLM_F_REQUEST_DUMP.to_ne_bytes());
    request.extend_from_slice(&[0; 8]); // sequence number, port
    request.extend_from_slice(&[0; 4]); // nfgenmsg: any family, version 0
    socket.send(&request, 0)?;
    loop {
        let (bytes, _) = socket.recv_from_full()?;
        if !visit_messages(&bytes, &mut visit)? {
            return Ok(());
        }
    }
}

fn unsupported(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::EPROTONOSUPPORT | libc::EOPNOTSUPP | libc::EINVAL | libc::ENOENT) => {
            io::Error::new(io::ErrorKind::Unsupported, error)
        }
        _ => error,
    }
}

/// `false`: there are no more.
fn visit_messages(mut bytes: &[u8], visit: &mut impl FnMut(Connection)) -> io::Result<bool> {
    const HEADER: usize = 16;
    const NFGENMSG: usize = 4;
    const NLMSG_ERROR: u16 = 2;
    const NLMSG_DONE: u16 = 3;
    while bytes.len() >= HEADER {
        let length = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize;
        if length < HEADER || length > bytes.len() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "ctnetlink message that is cut off"));
        }
        let body = &bytes[HEADER..length];
        match u16::from_ne_bytes([bytes[4], bytes[5]]) {
            NLMSG_DONE => return Ok(false),
            NLMSG_ERROR => {
                let code = body.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
                return Err(unsupported(io::Error::from_raw_os_error(-code)));
            }
            _ => {
                if let Some(connection) = body.get(NFGENMSG..).and_then(connection_of) {
                    visit(connection);
                }
            }
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(true)
}

/// The value of an attribute, wherever it is among others.
fn attribute(mut attributes: &[u8], kind: u16) -> Option<&[u8]> {
    const HEADER: usize = 4;
    /// Flags in the type: nested, network byte order (`NLA_TYPE_MASK`, linux/netlink.h).
    const FLAGS: u16 = 0xc000;
    loop {
        let length = usize::from(u16::from_ne_bytes(*attributes.first_chunk()?));
        let found = u16::from_ne_bytes(*attributes.get(2..)?.first_chunk()?) & !FLAGS;
        let value = attributes.get(HEADER..length)?;
        if found == kind {
            return Some(value);
        }
        attributes = attributes.get(length.next_multiple_of(HEADER)..)?;
    }
}

fn connection_of(attributes: &[u8]) -> Option<Connection> {
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
        original: tuple_of(attribute(attributes, CTA_TUPLE_ORIG)?)?,
        reply: tuple_of(attribute(attributes, CTA_TUPLE_REPLY)?)?,
        replied: status & IPS_SEEN_REPLY != 0,
        tcp_state: tcp_state.unwrap_or(0),
    })
}

fn tuple_of(attributes: &[u8]) -> Option<Tuple> {
    const CTA_TUPLE_IP: u16 = 1;
    const CTA_TUPLE_PROTO: u16 = 2;
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
        source: address(1, 3)?,
        source_port,
        destination: address(2, 4)?,
        destination_port,
        protocol: number,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use bridge_common::{flow::END_LOW, policy::AddressInfo};

    const LAN: &str = "192.168.31.67";
    const NODE: &str = "192.168.31.17";
    const POD: &str = "10.200.1.91";

    fn scope() -> Scope {
        let entry =
            |prefix: &str, side| (prefix.parse().unwrap(), AddressInfo { side, ..AddressInfo::default() });
        Scope::new(&Tables {
            addresses: vec![
                entry("10.200.1.0/24", side::POD),
                entry("192.168.31.0/24", side::EXTERNAL),
                entry("192.168.31.17/32", side::LOCAL),
                entry("fd20:1::/64", side::POD),
                entry("fd31::/64", side::EXTERNAL),
            ],
            node_ports: [30_000, 32_767],
            ..Tables::default()
        })
    }

    fn tuple(source: &str, source_port: u16, destination: &str, destination_port: u16) -> Tuple {
        let (source, destination) = (source.parse().unwrap(), destination.parse().unwrap());
        Tuple { source, source_port, destination, destination_port, protocol: IPPROTO_TCP }
    }

    fn tcp(original: Tuple, reply: Tuple) -> Connection {
        Connection { original, reply, replied: true, tcp_state: 3 }
    }

    /// Direction, and the opening as (initiator, port, responder, port).
    fn seeded(connection: &Connection) -> Vec<(u8, String, u16, String, u16)> {
        scope()
            .flows(connection, 5)
            .into_iter()
            .map(|(key, flow)| {
                assert_eq!((flow.last_seen, flow.created, flow.generation), (5, 5, 0));
                assert_eq!(flow.flags & flag::SEEDED, flag::SEEDED);
                let low = (IpAddr::from(key.low).to_string(), u16::from_be_bytes(key.low_port));
                let high = (IpAddr::from(key.high).to_string(), u16::from_be_bytes(key.high_port));
                let (from, to) = if flow.initiator == END_LOW { (low, high) } else { (high, low) };
                (flow.direction, from.0, from.1, to.0, to.1)
            })
            .collect()
    }

    fn flow(
        direction: u8,
        from: &str,
        from_port: u16,
        to: &str,
        to_port: u16,
    ) -> (u8, String, u16, String, u16) {
        (direction, from.into(), from_port, to.into(), to_port)
    }

    #[test]
    fn plain_connections_are_seeded_in_both_directions() {
        let inbound = tcp(tuple(LAN, 50_000, POD, 40_002), tuple(POD, 40_002, LAN, 50_000));
        assert_eq!(seeded(&inbound), [flow(direction::INBOUND, LAN, 50_000, POD, 40_002)]);
        let outbound =
            tcp(tuple("fd20:1::91", 61_001, "fd31::67", 443), tuple("fd31::67", 443, "fd20:1::91", 61_001));
        assert_eq!(seeded(&outbound), [flow(direction::OUTBOUND, "fd20:1::91", 61_001, "fd31::67", 443)]);
    }

    #[test]
    fn a_masqueraded_connection_is_seeded_with_the_address_of_its_pod() {
        let connection = tcp(tuple(POD, 61_001, LAN, 443), tuple(LAN, 443, NODE, 1_024));
        assert_eq!(seeded(&connection), [flow(direction::OUTBOUND, POD, 61_001, LAN, 443)]);
    }

    #[test]
    fn a_connection_to_a_node_port_is_seeded_as_it_is_before_and_after_translation() {
        let connection = tcp(tuple(LAN, 50_000, NODE, 30_080), tuple(POD, 8_080, LAN, 50_000));
        let expected = [
            flow(direction::NODE_PORT, LAN, 50_000, NODE, 30_080),
            flow(direction::INBOUND, LAN, 50_000, POD, 8_080),
        ];
        assert_eq!(seeded(&connection), expected);
        let also_masqueraded = tcp(tuple(LAN, 50_000, NODE, 30_080), tuple(POD, 8_080, NODE, 50_000));
        assert_eq!(seeded(&also_masqueraded), [flow(direction::NODE_PORT, LAN, 50_000, NODE, 30_080)]);
    }

    #[test]
    fn what_is_out_of_scope_is_left_out() {
        for (from, to) in
            [(LAN, "192.168.31.68"), (POD, "10.200.1.92"), (POD, NODE), (LAN, NODE), ("8.8.8.8", POD)]
        {
            let connection = tcp(tuple(from, 50_000, to, 22), tuple(to, 22, from, 50_000));
            assert_eq!(seeded(&connection), [], "{from} to {to}");
        }
    }

    #[test]
    fn only_what_was_answered_and_is_not_over_is_taken() {
        let inbound = tcp(tuple(LAN, 50_000, POD, 40_002), tuple(POD, 40_002, LAN, 50_000));
        let states = |connection: &Connection| flow_state(connection).map(|(state, _)| state);
        let expected = [
            (0, None),
            (1, None),
            (2, Some(state::ESTABLISHED)),
            (3, Some(state::ESTABLISHED)),
            (4, Some(state::FIN_WAIT)),
            (5, Some(state::FIN_WAIT)),
            (6, Some(state::CLOSING)),
            (7, Some(state::CLOSING)),
            (8, None),
            (9, None),
        ];
        for (tcp_state, expected) in expected {
            assert_eq!(states(&Connection { tcp_state, ..inbound }), expected, "{tcp_state}");
        }
        for (protocol, expected) in [
            (IPPROTO_UDP, state::UDP_REPLIED),
            (IPPROTO_ICMP, state::ICMP_REPLIED),
            (132, state::OTHER_REPLIED),
        ] {
            let original = Tuple { protocol, ..inbound.original };
            let connection = Connection { original, ..inbound };
            assert_eq!(states(&connection), Some(expected));
            assert_eq!(states(&Connection { replied: false, ..connection }), None);
        }
    }

    #[test]
    fn messages_cut_off_anywhere_are_an_error_or_left_out() {
        let mut message = vec![0; 16];
        message.extend_from_slice(&[2, 0, 0, 0, 8, 0, 3, 0, 0, 0, 0, 2, 6, 0, 1, 0, 1]);
        for length in 16..message.len() {
            let mut cut = message[..length].to_vec();
            cut[..4].copy_from_slice(&u32::try_from(length).unwrap().to_ne_bytes());
            let mut seen = 0;
            assert!(visit_messages(&cut, &mut |_| seen += 1).is_ok());
            assert_eq!(seen, 0);
        }
        message[..4].copy_from_slice(&1000_u32.to_ne_bytes());
        assert!(visit_messages(&message, &mut |_| ()).is_err());
    }
}
