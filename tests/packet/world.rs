//! Addresses, policies and packets that the tests share.

use std::net::IpAddr;

use bridge_agent::{
    datapath::{Behaviour, Hook},
    model::{Action, Direction, Mode, NodePorts, OnDeny, Policy, PortRange, Protocol, Rule},
};
use bridge_common::filter::{counters::Reason, flow::FlowKey};
use bridge_lab::{
    packet::{Packet, Tcp},
    prog::{LAN_INTERFACE, Node, POD_INTERFACE, Place, behaviour},
};

pub(crate) use Hook::{ExternalEgress, ExternalIngress, InternalEgress, InternalIngress};

/// A port that LAN hosts may connect to.
pub(crate) const OPEN: u16 = 40_002;
/// A port that is always denied.
pub(crate) const SHUT: u16 = 40_003;
/// A port that pods may connect to.
pub(crate) const OUT: u16 = 8080;

pub(crate) fn ip(address: &str) -> IpAddr {
    address.parse().expect("an address")
}

/// Hosts of one address family.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Family {
    pub(crate) lan: IpAddr,
    /// Behind the interface that frames come in by.
    pub(crate) pod: IpAddr,
    /// Behind another interface.
    pub(crate) other_pod: IpAddr,
    /// A pod of another node.
    pub(crate) far_pod: IpAddr,
    pub(crate) node: IpAddr,
    pub(crate) other_node: IpAddr,
    pub(crate) service: IpAddr,
    pub(crate) stranger: IpAddr,
}

pub(crate) fn families() -> [Family; 2] {
    [
        Family {
            lan: ip("192.168.31.67"),
            pod: ip("10.200.1.91"),
            other_pod: ip("10.200.1.92"),
            far_pod: ip("10.200.1.200"),
            node: ip("192.168.31.17"),
            other_node: ip("192.168.31.18"),
            service: ip("10.96.0.10"),
            stranger: ip("203.0.113.5"),
        },
        Family {
            lan: ip("fd31::67"),
            pod: ip("fd20:1::91"),
            other_pod: ip("fd20:1::92"),
            far_pod: ip("fd20:1::200"),
            node: ip("fd31::17"),
            other_node: ip("fd31::18"),
            service: ip("fd96::10"),
            stranger: ip("2001:db8::5"),
        },
    ]
}

pub(crate) fn range(first: u16, last: u16) -> PortRange {
    PortRange { first, last }
}

pub(crate) fn rule(name: &str, direction: Direction, protocol: Protocol, ports: &[PortRange]) -> Rule {
    Rule {
        name: name.to_owned(),
        direction,
        external: None,
        pods: None,
        protocol,
        ports: ports.to_vec(),
        source_ports: Vec::new(),
        action: Action::Allow,
    }
}

pub(crate) fn policy(rules: Vec<Rule>) -> Policy {
    let nets = |nets: &[&str]| nets.iter().map(|net| net.parse().expect("a network")).collect();
    Policy {
        mode: Mode::Enforce,
        on_deny: OnDeny::Reject,
        pods: nets(&["10.200.1.0/24", "fd20:1::/64"]),
        external: nets(&["192.168.31.0/24", "fd31::/64"]),
        nodes: nets(&["192.168.31.18/32", "fd31::18/128"]),
        rules,
        audited: Vec::new(),
        node_ports: Some(NodePorts { range: range(30_000, 32_767), allow: vec![range(30_080, 30_080)] }),
    }
}

/// [`OPEN`] inbound, [`OUT`] outbound, for TCP, UDP and SCTP, and ICMP queries inbound.
pub(crate) fn usual_policy() -> Policy {
    let mut rules = vec![rule("ping", Direction::Inbound, Protocol::Icmp, &[])];
    for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
        rules.push(rule(&format!("in-{protocol:?}"), Direction::Inbound, protocol, &[range(OPEN, OPEN)]));
        rules.push(rule(&format!("out-{protocol:?}"), Direction::Outbound, protocol, &[range(OUT, OUT)]));
    }
    policy(rules)
}

pub(crate) fn node() -> Node {
    node_of(&usual_policy(), &behaviour())
}

/// A node with the pods of [`families`].
pub(crate) fn node_of(policy: &Policy, behaviour: &Behaviour) -> Node {
    let mut node = Node::new(policy, behaviour).expect("the packet path loads");
    for family in families() {
        node.host(family.pod, LAN_INTERFACE).expect("room for a pod");
        node.host(family.other_pod, POD_INTERFACE).expect("room for a pod");
    }
    node
}

/// An egress hook, and a packet that came in from the LAN.
pub(crate) fn from_lan(hook: Hook) -> Place {
    Place::from(hook, LAN_INTERFACE)
}

/// An egress hook, and a packet that came in by the interface of [`Family::other_pod`].
pub(crate) fn from_pod(hook: Hook) -> Place {
    Place::from(hook, POD_INTERFACE)
}

pub(crate) fn key(packet: &Packet, protocol: u8, source_port: u16, destination_port: u16) -> FlowKey {
    let (source, destination) = packet.addresses();
    FlowKey::new(
        &source.into(),
        source_port.to_be_bytes(),
        &destination.into(),
        destination_port.to_be_bytes(),
        protocol,
    )
    .0
}

/// A TCP connection and who opens it; segments by hand, acknowledgements right.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Connection {
    pub(crate) client: IpAddr,
    pub(crate) server: IpAddr,
    pub(crate) client_port: u16,
    pub(crate) server_port: u16,
    /// Where packets of the client come in.
    pub(crate) client_hook: Hook,
    /// Where packets of the server come in.
    pub(crate) server_hook: Hook,
}

impl Connection {
    pub(crate) fn inbound(family: Family, port: u16) -> Self {
        Self {
            client: family.lan,
            server: family.pod,
            client_port: 50_000,
            server_port: port,
            client_hook: ExternalIngress,
            server_hook: InternalIngress,
        }
    }

    pub(crate) fn outbound(family: Family, port: u16) -> Self {
        Self {
            client: family.pod,
            server: family.lan,
            client_port: 61_001,
            server_port: port,
            client_hook: InternalIngress,
            server_hook: ExternalIngress,
        }
    }

    pub(crate) fn client_sends(&self, make: impl FnOnce(u16, u16) -> Tcp) -> Packet {
        Packet::new(self.client, self.server).tcp(make(self.client_port, self.server_port))
    }

    pub(crate) fn server_sends(&self, make: impl FnOnce(u16, u16) -> Tcp) -> Packet {
        Packet::new(self.server, self.client).tcp(make(self.server_port, self.client_port))
    }

    pub(crate) fn syn(&self) -> Packet {
        self.client_sends(Tcp::syn)
    }

    pub(crate) fn syn_ack(&self) -> Packet {
        self.server_sends(Tcp::syn_ack)
    }

    /// The client's acknowledgement of [`Connection::syn_ack`], and everything it says after it.
    pub(crate) fn ack(&self) -> Packet {
        self.client_sends(|source, destination| Tcp::ack(source, destination, 1001, 5001))
    }

    pub(crate) fn server_ack(&self) -> Packet {
        self.server_sends(|source, destination| Tcp::ack(source, destination, 5001, 1001))
    }

    pub(crate) fn key(&self) -> FlowKey {
        key(&self.syn(), 6, self.client_port, self.server_port)
    }

    /// The handshake, every step of which must pass.
    pub(crate) fn establish(&self, node: &mut Node) {
        node.passes(self.client_hook, &self.syn(), Reason::new_flow);
        node.passes(self.server_hook, &self.syn_ack(), Reason::established);
        node.passes(self.client_hook, &self.ack(), Reason::established);
    }
}
