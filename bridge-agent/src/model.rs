//! The desired state of the packet path: the result of a configuration file and a cluster, and the input of every
//! engine (eBPF, iptables).
//!
//! Everything here is validated: ranges are not inverted, lists are not empty, names are unique.

mod hook;
mod port_set;
mod target;

use std::fmt;

use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use self::{
    hook::{Hook, Role},
    port_set::{PortSet, parse_ephemeral, parse_ranges},
    target::Target,
};

/// The allowed flows, and the answer to others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Policy {
    /// Whether a denied packet is dropped, or only reported as if it were.
    pub mode: Mode,
    /// The answer to the sender of a denied packet.
    pub on_deny: OnDeny,
    /// The networks of the pods. Disjoint from [`Policy::external`].
    pub pods: Vec<IpNet>,
    /// The networks of the LAN hosts.
    pub external: Vec<IpNet>,
    /// Addresses inside `external` or `pods` that belong to cluster nodes: never judged as a LAN host or a pod.
    /// The own addresses of the node are added to them at run time.
    pub nodes: Vec<IpNet>,
    /// In the order of the configuration; among matching rules a deny wins, then the first.
    pub rules: Vec<Rule>,
    /// Rules in audit mode: they decide nothing, and are counted and reported as if they did, beside the others.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub audited: Vec<Rule>,
    /// `None`: traffic to NodePorts is not judged.
    pub node_ports: Option<NodePorts>,
}

/// Whether a denied packet is stopped, or only reported as if it were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Denied packets do not pass.
    #[default]
    Enforce,
    /// Denied packets pass, and are counted and reported as they would have been.
    Audit,
}

/// The answer to the sender of a denied packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnDeny {
    /// TCP gets an RST, UDP an ICMP port unreachable; everything else is dropped.
    #[default]
    Reject,
    /// Silence.
    Drop,
}

/// One rule; every criterion must match.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Rule {
    /// Unique among all rules of a policy; 1 to 63 bytes of `[A-Za-z0-9._-]`.
    pub name: String,
    /// Which side opens the flow.
    pub direction: Direction,
    /// LAN hosts; `None` stands for all of [`Policy::external`].
    pub external: Option<Vec<IpNet>>,
    /// Pods; `None` stands for all of [`Policy::pods`]. Empty (a selector that selects no pod) matches nothing.
    pub pods: Option<Vec<IpNet>>,
    /// Layer 4 protocol.
    pub protocol: Protocol,
    /// Destination ports; empty stands for all. Never set for [`Protocol::Icmp`].
    pub ports: Vec<PortRange>,
    /// Source ports; empty stands for all. Never set for [`Protocol::Icmp`].
    pub source_ports: Vec<PortRange>,
    /// Verdict on a new flow that matches.
    pub action: Action,
}

/// Which side opens the flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// A LAN host opens a flow to a pod.
    Inbound,
    /// A pod opens a flow to a LAN host.
    Outbound,
}

/// Layer 4 protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// RFC 9293.
    Tcp,
    /// RFC 768.
    Udp,
    /// RFC 9260.
    Sctp,
    /// Queries of ICMP (RFC 792) over IPv4 and of ICMPv6 (RFC 4443) over IPv6. Errors follow the flow they quote.
    Icmp,
    /// Every IP protocol; with ports, those that have ports (TCP, UDP, SCTP).
    Any,
}

/// Verdict on a new flow that matches a rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// The flow is let through, and its replies with it.
    #[default]
    Allow,
    /// The flow is refused; beats every allow.
    Deny,
}

/// Ports from `first` to `last`, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct PortRange {
    /// Lowest port of the range.
    pub first: u16,
    /// Highest port of the range; not below `first`.
    pub last: u16,
}

impl PortRange {
    /// Every port there is.
    pub const ALL: Self = Self { first: 0, last: u16::MAX };

    /// A single port.
    #[must_use]
    pub const fn one(port: u16) -> Self {
        Self { first: port, last: port }
    }

    /// Whether `port` lies in the range.
    #[must_use]
    pub const fn contains(self, port: u16) -> bool {
        self.first <= port && port <= self.last
    }

    /// How many ports it has, 1 to 65536.
    #[must_use]
    pub fn count(&self) -> u32 {
        u32::from(self.last - self.first) + 1
    }

    /// Returns the same ports in ascending ranges that neither overlap nor touch.
    #[must_use]
    pub fn join(ranges: &[Self]) -> Vec<Self> {
        let mut sorted = ranges.to_vec();
        sorted.sort_unstable();
        let mut joined: Vec<Self> = Vec::with_capacity(sorted.len());
        for range in sorted {
            match joined.last_mut() {
                Some(last) if u32::from(range.first) <= u32::from(last.last) + 1 => {
                    last.last = last.last.max(range.last);
                }
                _ => joined.push(range),
            }
        }
        joined
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            write!(f, "{}", self.first)
        } else {
            write!(f, "{}-{}", self.first, self.last)
        }
    }
}

/// NodePort traffic: from [`Policy::external`] to an address of the node itself, on a port of `range`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NodePorts {
    /// kube-apiserver's `--service-node-port-range`.
    pub range: PortRange,
    /// The ports inside `range` that the LAN may use; TCP, UDP and SCTP alike.
    pub allow: Vec<PortRange>,
}

/// The surroundings of a node by interface, as its links and routes show them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Topology {
    /// Interfaces towards [`Policy::external`].
    pub external: Vec<String>,
    /// Interfaces that lead to the pods of this node: names, or prefixes of names that end in `+`.
    pub internal: Vec<String>,
    /// Pods of other nodes, by the interface that leads to them.
    pub remote: Vec<RoutedPods>,
    /// Pods of this node, by the interface that routes to them lead to, if that is none of `internal`.
    pub gateways: Vec<RoutedPods>,
    /// Tunnels that end here.
    pub tunnels: Vec<Tunnel>,
    /// Their interfaces.
    pub tunnel_interfaces: Vec<String>,
    /// Interfaces that cannot be those of pods that the rules do not know yet, if these are not known by their names. Empty: they are.
    pub settled: Vec<String>,
}

/// Pods that routes by one interface lead to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoutedPods {
    /// The interface.
    pub interface: String,
    /// Prefixes routed by it.
    pub pods: Vec<IpNet>,
}

/// The outer packets of a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tunnel {
    /// VXLAN or Geneve: UDP to this port.
    Udp(u16),
    /// IPIP, GRE: this IP protocol.
    Protocol(u8),
}
