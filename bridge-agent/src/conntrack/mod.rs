//! Seeds the flow table from conntrack, so that the first start of enforcement interrupts no connection.

mod enter;
mod forget;
mod restore;

use std::{collections::HashMap, net::IpAddr};

use bridge_common::{
    filter::{
        fast_path::ticks,
        flow::{Flow, FlowKey, flag, state},
        policy::{direction, side},
    },
    protocol,
};
use ipnet::IpNet;

pub use enter::{Opened, enter};
pub use forget::{Forgetting, forget};
pub use restore::{Direction, restore};

pub use crate::kernel::conntrack::{Connection, Tuple, for_each};
use crate::policy::Tables;

/// The addresses to follow, and their roles.
#[derive(Clone, Debug)]
pub struct Scope {
    sides: HashMap<IpNet, u16>,
    /// Prefix lengths in use, longest first; IPv4, IPv6.
    lengths: [Vec<u8>; 2],
    node_ports: [u16; 2],
}

impl Scope {
    /// As a compiled policy says.
    #[must_use]
    pub fn new(tables: &Tables) -> Self {
        let sides: HashMap<IpNet, u16> =
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

    fn side(&self, address: IpAddr) -> u16 {
        self.lengths[usize::from(address.is_ipv6())]
            .iter()
            .filter_map(|length| IpNet::new(address, *length).ok())
            .find_map(|prefix| self.sides.get(&prefix.trunc()))
            .copied()
            .unwrap_or(0)
    }

    /// Returns direction and flags of the flow that the connection is under these addresses; `None`: none is followed.
    /// `peer`: the source of the connection's first packet.
    fn direction(&self, opening: &Tuple, peer: IpAddr, translated: bool) -> Option<(u8, u8)> {
        let [first, last] = self.node_ports;
        let flags = if translated { flag::TRANSLATED } else { 0 };
        let (source, destination) = (self.side(opening.source), self.side(opening.destination));
        match (source, destination) {
            (side::POD, side::EXTERNAL) => Some((direction::OUTBOUND, flags)),
            (side::POD, side::POD | side::NODE) => None,
            (side::POD, _) => Some((direction::OUTBOUND, flag::UNRESTRICTED)),
            (side::NODE, _) => None,
            // The node hides the peer.
            (side::LOCAL, side::POD) => {
                let judged = matches!(self.side(peer), side::EXTERNAL | 0);
                judged.then_some((direction::INBOUND, flags))
            }
            (side::LOCAL, side::EXTERNAL) => {
                (self.side(peer) == side::POD).then_some((direction::OUTBOUND, flags))
            }
            (_, side::POD) => Some((direction::INBOUND, flags)),
            (side::EXTERNAL, side::LOCAL)
                if last != 0 && (first..=last).contains(&opening.destination_port) =>
            {
                Some((direction::NODE_PORT, 0))
            }
            _ => None,
        }
    }

    /// Returns the flows that a connection is to the kernel side: none, one, or two where the node translates it and packets
    /// are seen both before and after that.
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
                let (direction, more) =
                    self.direction(&opening, connection.original.source, translated != connection.original)?;
                let mut key = FlowKey::default();
                let initiator = key.set(
                    &opening.source.into(),
                    opening.source_port.to_be_bytes(),
                    &opening.destination.into(),
                    opening.destination_port.to_be_bytes(),
                    opening.protocol,
                );
                let flags = flags | more | flag::SEEDED;
                let flow = Flow {
                    last_seen: now,
                    opened: ticks(now),
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

/// Returns state and flags of the flow; `None` if it can begin again without harm, or has ended.
fn flow_state(connection: &Connection) -> Option<(u8, u8)> {
    const SYN_RECV: u8 = 2;
    const ESTABLISHED: u8 = 3;
    const FIN_WAIT: u8 = 4;
    const CLOSE_WAIT: u8 = 5;
    const LAST_ACK: u8 = 6;
    const TIME_WAIT: u8 = 7;
    match connection.original.protocol {
        // Conntrack takes any segment for one of a connection that it has missed the begin of, and only the answer
        // shows that there is one.
        _ if !connection.replied => None,
        protocol::TCP => match connection.tcp_state {
            SYN_RECV | ESTABLISHED => Some((state::ESTABLISHED, 0)),
            // Conntrack does not record the sender of the FIN, and nothing depends on it.
            FIN_WAIT | CLOSE_WAIT => Some((state::FIN_WAIT, flag::FIN_INITIATOR)),
            LAST_ACK | TIME_WAIT => Some((state::CLOSING, flag::FIN_INITIATOR | flag::FIN_RESPONDER)),
            _ => None,
        },
        protocol::UDP => Some((state::UDP_REPLIED, 0)),
        protocol::ICMP | protocol::ICMPV6 => Some((state::ICMP_REPLIED, 0)),
        _ => Some((state::OTHER_REPLIED, 0)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bridge_common::filter::{flow::END_LOW, policy::AddressInfo};

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
        Tuple { source, source_port, destination, destination_port, protocol: protocol::TCP }
    }

    fn tcp(original: Tuple, reply: Tuple) -> Connection {
        Connection { original, reply, replied: true, tcp_state: 3 }
    }

    const NOW: u64 = 1 << 40;

    /// Direction, and the opening as (initiator, port, responder, port).
    fn seeded(connection: &Connection) -> Vec<(u8, String, u16, String, u16)> {
        scope()
            .flows(connection, NOW)
            .into_iter()
            .map(|(key, flow)| {
                assert_eq!((flow.last_seen, flow.opened, flow.generation), (NOW, ticks(NOW), 0));
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
        let expected = [
            flow(direction::OUTBOUND, POD, 61_001, LAN, 443),
            flow(direction::OUTBOUND, NODE, 1_024, LAN, 443),
        ];
        assert_eq!(seeded(&connection), expected);
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
        let expected = [
            flow(direction::NODE_PORT, LAN, 50_000, NODE, 30_080),
            flow(direction::INBOUND, NODE, 50_000, POD, 8_080),
        ];
        assert_eq!(seeded(&also_masqueraded), expected);
    }

    #[test]
    fn what_is_out_of_scope_is_left_out() {
        for (from, to) in [(LAN, "192.168.31.68"), (POD, "10.200.1.92"), (LAN, NODE), (NODE, POD)] {
            let connection = tcp(tuple(from, 50_000, to, 22), tuple(to, 22, from, 50_000));
            assert_eq!(seeded(&connection), [], "{from} to {to}");
        }
    }

    #[test]
    fn connections_of_pods_to_elsewhere_are_seeded_so_that_answers_pass() {
        for to in [NODE, "8.8.8.8"] {
            let connection = tcp(tuple(POD, 50_000, to, 22), tuple(to, 22, POD, 50_000));
            assert_eq!(seeded(&connection), [flow(direction::OUTBOUND, POD, 50_000, to, 22)]);
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
            assert_eq!(states(&Connection { tcp_state, replied: false, ..inbound }), None, "{tcp_state}");
        }
        for (protocol, expected) in [
            (protocol::UDP, state::UDP_REPLIED),
            (protocol::ICMP, state::ICMP_REPLIED),
            (132, state::OTHER_REPLIED),
        ] {
            let original = Tuple { protocol, ..inbound.original };
            let connection = Connection { original, ..inbound };
            assert_eq!(states(&connection), Some(expected));
            assert_eq!(states(&Connection { replied: false, ..connection }), None);
        }
    }
}
