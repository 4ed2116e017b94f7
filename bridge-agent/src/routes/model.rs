//! Routes as they are wanted, and routes as the kernel has them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use crate::config::{DEFAULT_METRIC, TABLE_LOCAL, TABLE_MAIN};

/// The routing protocol number (`rtm_protocol`) that marks a route as bridge's own.
///
/// Free in iproute2's `rt_protos`, in `linux/rtnetlink.h`, and not used by FRR (193-197), OVN (84) or Calico (80).
/// A route with another number is foreign and is never changed; a route with this one that no source wants is removed.
pub const PROTOCOL: u8 = 98;

/// A next hop in the kernel: its address, and the index of its interface.
pub type Hop = (IpAddr, u32);

/// Who wants a route. The order is the precedence: what comes first wins.
///
/// 1. `Static`: an operator wrote it on this very host.
/// 2. `File`: a description of the cluster that an operator or a tool keeps on this host.
/// 3. `Kubernetes`: what the API server says.
/// 4. `Discovery`: what a pod says of itself. A pod is the least trusted of the four, so it also yields to a
///    *wider* network of any other source; see [`crate::routes::sources`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum SourceKind {
    /// The configuration of this host.
    Static,
    /// `cluster.yaml`.
    File,
    /// The Kubernetes API.
    Kubernetes,
    /// Announcements of pods.
    Discovery,
}

impl fmt::Display for SourceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Static => "static",
            Self::File => "file",
            Self::Kubernetes => "kubernetes",
            Self::Discovery => "discovery",
        })
    }
}

/// A neighbour that forwards to a pod network.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
pub struct NextHop {
    /// Its address. IPv6 may carry an IPv4 network (RFC 8950) where the kernel can.
    pub via: IpAddr,
    /// The interface; `None` finds it from the connected networks. Needed for a link-local address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dev: Option<String>,
    /// Share of the flows among several next hops, 1 to 256.
    pub weight: u16,
}

impl NextHop {
    /// A next hop of weight 1 on whatever interface it is connected to.
    #[must_use]
    pub const fn new(via: IpAddr) -> Self {
        Self { via, dev: None, weight: 1 }
    }
}

impl fmt::Display for NextHop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "via {}", self.via)?;
        if let Some(dev) = &self.dev {
            write!(f, " dev {dev}")?;
        }
        if self.weight != 1 {
            write!(f, " weight {}", self.weight)?;
        }
        Ok(())
    }
}

/// What becomes of packets to a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(rename = "RouteTarget")]
pub enum Target {
    /// They go to next hops.
    Forward {
        /// Used together, each by its weight (multipath).
        via: Vec<NextHop>,
        /// Used, together again, only while none of `via` can be.
        backup: Vec<NextHop>,
    },
    /// They are dropped in silence, instead of following the default route.
    Blackhole,
}

/// A route that a source wants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DesiredRoute {
    /// The network, host bits zero.
    #[schemars(with = "String")]
    pub to: IpNet,
    /// Where its packets go.
    pub target: Target,
    /// Lower is preferred; `None` is [`super::Settings::metric`].
    pub metric: Option<u32>,
    /// `None` is [`super::Settings::table`].
    pub table: Option<u32>,
    /// Who wants it.
    pub source: SourceKind,
    /// Which entry of the source: a node's name, a pod's name; may be empty.
    pub origin: String,
}

impl DesiredRoute {
    /// `to` through one next hop, with the metric and table of the settings.
    #[must_use]
    pub fn forward(to: IpNet, via: IpAddr, source: SourceKind, origin: impl Into<String>) -> Self {
        Self {
            to: to.trunc(),
            target: Target::Forward { via: vec![NextHop::new(via)], backup: Vec::new() },
            metric: None,
            table: None,
            source,
            origin: origin.into(),
        }
    }
}

impl fmt::Display for DesiredRoute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.target {
            Target::Blackhole => write!(f, "blackhole {}", self.to)?,
            Target::Forward { via, backup } => {
                write!(f, "{}", self.to)?;
                for hop in via {
                    write!(f, " {hop}")?;
                }
                for hop in backup {
                    write!(f, " backup {}", hop.via)?;
                }
            }
        }
        write!(f, " ({}", self.source)?;
        if !self.origin.is_empty() {
            write!(f, " {}", self.origin)?;
        }
        f.write_str(")")
    }
}

/// What the kernel identifies a route by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RouteKey {
    /// Routing table.
    pub table: u32,
    /// Destination.
    pub to: IpNet,
    /// DSCP and ECN bits a packet must bear; 0 matches all. Always 0 in bridge's own routes.
    pub tos: u8,
    /// `RTA_PRIORITY`.
    pub metric: u32,
}

/// `rtm_type`, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RouteKind {
    /// `RTN_UNICAST`.
    Unicast,
    /// `RTN_LOCAL`: an address of this host.
    Local,
    /// `RTN_BROADCAST`.
    Broadcast,
    /// `RTN_ANYCAST`.
    Anycast,
    /// `RTN_MULTICAST`.
    Multicast,
    /// `RTN_BLACKHOLE`.
    Blackhole,
    /// `RTN_UNREACHABLE`, `RTN_PROHIBIT`, `RTN_THROW` and the rest, by number.
    Other(u8),
}

impl From<u8> for RouteKind {
    fn from(number: u8) -> Self {
        match number {
            1 => Self::Unicast,
            2 => Self::Local,
            3 => Self::Broadcast,
            4 => Self::Anycast,
            5 => Self::Multicast,
            6 => Self::Blackhole,
            other => Self::Other(other),
        }
    }
}

impl From<RouteKind> for u8 {
    fn from(kind: RouteKind) -> Self {
        match kind {
            RouteKind::Unicast => 1,
            RouteKind::Local => 2,
            RouteKind::Broadcast => 3,
            RouteKind::Anycast => 4,
            RouteKind::Multicast => 5,
            RouteKind::Blackhole => 6,
            RouteKind::Other(number) => number,
        }
    }
}

/// One next hop of a route in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KernelHop {
    /// `None`: directly connected.
    pub via: Option<IpAddr>,
    /// Interface index; 0 if the kernel names none.
    pub ifindex: u32,
    /// 1 to 256.
    pub weight: u16,
}

/// A route as the kernel has it, or as it shall have it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KernelRoute {
    /// Identity.
    pub key: RouteKey,
    /// `rtm_protocol`; [`PROTOCOL`] marks bridge's own.
    pub protocol: u8,
    /// Type.
    pub kind: RouteKind,
    /// Sorted; empty for kinds that do not forward.
    pub hops: Vec<KernelHop>,
    /// Whether it has attributes that bridge never sets (metrics such as an MTU, a preferred source, an
    /// encapsulation, a nexthop object): then it is not what bridge wrote, even if all else is the same.
    pub altered: bool,
}

impl KernelRoute {
    /// Whether bridge made it.
    #[must_use]
    pub const fn is_own(&self) -> bool {
        self.protocol == PROTOCOL
    }

    /// Whether its packets reach the destination without another router.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.kind == RouteKind::Unicast
            && !self.hops.is_empty()
            && self.hops.iter().all(|hop| hop.via.is_none())
    }

    /// Whether it stands for addresses of the host itself or of its links.
    #[must_use]
    pub fn is_local(&self) -> bool {
        match self.kind {
            RouteKind::Local | RouteKind::Broadcast | RouteKind::Anycast | RouteKind::Multicast => true,
            // The kernel writes a connected network itself (RTPROT_KERNEL); DHCP clients and network managers
            // sometimes write it in its place.
            RouteKind::Unicast => self.is_connected() && self.protocol == RTPROT_KERNEL,
            _ => false,
        }
    }
}

/// `RTPROT_KERNEL`: the kernel's own, for example the network of an interface's address.
pub const RTPROT_KERNEL: u8 = 2;

/// An interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    pub name: String,
    /// `IFF_UP`: routes through it may exist.
    pub up: bool,
}

/// An address of this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// The interface that has it.
    pub ifindex: u32,
    /// Address and prefix length, host bits kept.
    pub net: IpNet,
}

/// What the kernel says at one moment: everything a plan depends on besides what is wanted.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// By interface index.
    pub links: BTreeMap<u32, Link>,
    /// In no order.
    pub addresses: Vec<Address>,
    /// All own routes, and of the foreign ones at least those that are connected, default, or touch a desired network.
    pub routes: Vec<KernelRoute>,
    /// Whether an IPv4 route may have an IPv6 next hop (Linux 5.2, with IPv6 enabled).
    pub v4_via_v6: bool,
    /// Next hops that do not answer, with the index of their interface; see [`crate::routes::health`].
    pub down: BTreeSet<(IpAddr, u32)>,
}

impl Observed {
    /// The route in the words of `ip route`.
    #[must_use]
    pub fn show(&self, route: &KernelRoute) -> String {
        use std::fmt::Write;
        let mut text = String::new();
        match route.kind {
            RouteKind::Unicast => {}
            RouteKind::Local => text.push_str("local "),
            RouteKind::Broadcast => text.push_str("broadcast "),
            RouteKind::Anycast => text.push_str("anycast "),
            RouteKind::Multicast => text.push_str("multicast "),
            RouteKind::Blackhole => text.push_str("blackhole "),
            RouteKind::Other(7) => text.push_str("unreachable "),
            RouteKind::Other(8) => text.push_str("prohibit "),
            RouteKind::Other(9) => text.push_str("throw "),
            RouteKind::Other(number) => _ = write!(text, "type {number} "),
        }
        match route.key.to.prefix_len() {
            0 => text.push_str("default"),
            _ => _ = write!(text, "{}", route.key.to),
        }
        for hop in &route.hops {
            if route.hops.len() > 1 {
                text.push_str(" nexthop");
            }
            match (hop.via, route.key.to) {
                (Some(via @ IpAddr::V6(_)), IpNet::V4(_)) => _ = write!(text, " via inet6 {via}"),
                (Some(via), _) => _ = write!(text, " via {via}"),
                (None, _) => {}
            }
            if let Some(link) = self.links.get(&hop.ifindex) {
                _ = write!(text, " dev {}", link.name);
            }
            if route.hops.len() > 1 {
                _ = write!(text, " weight {}", hop.weight);
            }
        }
        _ = write!(text, " proto {}", protocol_name(route.protocol));
        if route.key.table != TABLE_MAIN {
            _ = write!(
                text,
                " table {}",
                if route.key.table == TABLE_LOCAL { "local".into() } else { route.key.table.to_string() }
            );
        }
        if route.key.metric != 0 {
            _ = write!(text, " metric {}", route.key.metric);
        }
        text
    }
}

/// The name iproute2 gives a routing protocol number, or the number.
#[must_use]
pub fn protocol_name(protocol: u8) -> String {
    match protocol {
        1 => "redirect".into(),
        RTPROT_KERNEL => "kernel".into(),
        3 => "boot".into(),
        4 => "static".into(),
        9 => "ra".into(),
        11 => "zebra".into(),
        12 => "bird".into(),
        16 => "dhcp".into(),
        186 => "bgp".into(),
        188 => "ospf".into(),
        PROTOCOL => "98".into(),
        other => other.to_string(),
    }
}
