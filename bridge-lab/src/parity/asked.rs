//! `bridge-agent explain` about packets that go through the packet filters for real: it reads the rules of the kernel, and says
//! which way each packet takes.

use std::{
    collections::{BTreeMap, HashSet},
    net::IpAddr,
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use bridge_agent::{
    explain::nft::{Owner, Ruleset, Way},
    iptables::{
        observe::{self, OwnRules},
        ruleset::{Family, Table},
        walk::{self, Interfaces, Packet, State},
    },
    model::PortRange,
};
use etherparse::{NetSlice, SlicedPacket, TransportSlice};

use super::{Sent, Side, endpoints::side, local};

const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;
const SCTP: u8 = 132;

/// The rules of a packet filter as `explain` reads them from the kernel.
pub(super) enum Rules {
    Iptables(BTreeMap<(Family, Table), OwnRules>),
    Nftables(Ruleset),
}

fn output(program: &str, arguments: &[&str]) -> Result<String> {
    let output =
        Command::new(program).args(arguments).output().with_context(|| format!("start {program}"))?;
    ensure!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

impl Rules {
    /// Reads the rules of iptables in the network namespace of this thread.
    pub(super) fn of_iptables() -> Result<Self> {
        let mut own = BTreeMap::new();
        for (family, program) in [(Family::V4, "iptables-save"), (Family::V6, "ip6tables-save")] {
            let tables = observe::parse(&output(program, &[])?);
            for table in Table::ALL {
                own.extend(tables.get(table.name()).map(|observed| ((family, table), observed.own())));
            }
        }
        Ok(Self::Iptables(own))
    }

    /// Reads the rules of nftables in the network namespace of this thread.
    pub(super) fn of_nftables() -> Result<Self> {
        Ok(Self::Nftables(Ruleset::parse(&output("nft", &["--json", "--numeric", "list", "ruleset"])?)))
    }

    /// Whether a packet passes; `None`: `explain` does not know.
    fn passes(&self, packet: &Packet, interfaces: Interfaces<'_>) -> Option<bool> {
        match self {
            Self::Iptables(own) => {
                walk::walk(own, packet, packet, false).verdict.map(|verdict| verdict == walk::Verdict::Passes)
            }
            Self::Nftables(rules) => {
                rules.walk(&Way { before: packet, after: packet, interfaces }, Owner::Bridge).passes
            }
        }
    }

    /// Asks about the first packet of each flow. Outer `None`: the packet is no such one.
    pub(super) fn ask(&self, sent: &[Sent]) -> Vec<Option<Option<bool>>> {
        let mut flows = HashSet::new();
        let ask = |sent: &Sent| {
            let packet = question(sent, &mut flows)?;
            let (lan, pods) = (Some("lan0"), Some("pods0"));
            let (input, output) = if sent.from == Side::Lan { (lan, pods) } else { (pods, lan) };
            let output = output.filter(|_| !packet.to_node);
            Some(self.passes(&packet, Interfaces { input, output }))
        };
        sent.iter().map(ask).collect()
    }
}

/// The ends of a flow, and its protocol.
type Flow = ([(IpAddr, u16); 2], u8);

/// Returns the first packet of a flow as a question: connection tracking calls it new. `None`: it belongs to a flow that came
/// before, does not open one, is damaged or in fragments, or the node could not have sent it.
fn question(sent: &Sent, flows: &mut HashSet<Flow>) -> Option<Packet> {
    let octets = sent.packets.first()?.ip();
    let parsed = SlicedPacket::from_ip(&octets).ok();
    let (source, destination) = sent.packets.first()?.addresses();
    // The chains that drop forged sources come before those that it knows.
    let forged = sent.from != side(source);
    let whole = sent.packets.len() == 1 && sent.expected.is_plain() && !forged;
    let (ports, protocol, opens) = parsed.as_ref().map_or(((0, 0), 0, false), read);
    let mut ends = [(source, ports.0), (destination, ports.1)];
    ends.sort_unstable();
    // Also one that is not asked about makes a flow.
    let is_first = flows.insert((ends, protocol));
    let to_node = local().contains(&destination);
    let delivered = !to_node || matches!(protocol, TCP | UDP | SCTP);
    let icmp_type = match protocol {
        ICMP => 8,
        ICMPV6 => 128,
        _ => 0,
    };
    (whole && opens && is_first && delivered && !local().contains(&source)).then_some(Packet {
        source,
        source_ports: PortRange::one(ports.0),
        destination,
        destination_port: ports.1,
        protocol,
        icmp_type,
        to_node,
        from_node: false,
        state: State::New,
    })
}

/// Returns ports, protocol, and whether the packet asks for a flow.
fn read(packet: &SlicedPacket<'_>) -> ((u16, u16), u8, bool) {
    let Some(payload) = packet.net.as_ref().and_then(NetSlice::ip_payload_ref) else {
        return ((0, 0), 0, false);
    };
    let number = payload.ip_number.0;
    match &packet.transport {
        Some(TransportSlice::Tcp(tcp)) => {
            let opens = tcp.syn() && !tcp.ack() && !tcp.fin() && !tcp.rst();
            ((tcp.source_port(), tcp.destination_port()), number, opens)
        }
        Some(TransportSlice::Udp(udp)) => ((udp.source_port(), udp.destination_port()), number, true),
        Some(TransportSlice::Icmpv4(icmp)) => ((0, 0), number, icmp.type_u8() == 8),
        Some(TransportSlice::Icmpv6(icmp)) => ((0, 0), number, icmp.type_u8() == 128),
        _ if number == SCTP => match payload.payload {
            [a, b, c, d, _, _, _, _, _, _, _, _, chunk, ..] => {
                ((u16::from_be_bytes([*a, *b]), u16::from_be_bytes([*c, *d])), number, *chunk == 1)
            }
            _ => ((0, 0), number, false),
        },
        _ => ((0, 0), number, !payload.fragmented),
    }
}
