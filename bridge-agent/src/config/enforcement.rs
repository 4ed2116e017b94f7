//! `enforcement`: how the rules are made to hold.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::interface::InterfacePattern;
use super::iptables::Iptables;
use super::leaf::Problem;
use super::nftables::Nftables;
use super::report::{Path, Report};
use super::syslog::Syslog;
use super::time_span::TimeSpan;
use crate::model::{Mode, OnDeny};

/// How the rules are made to hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Enforcement {
    /// Whether denied packets are stopped, or only counted and reported.
    pub mode: Mode,
    /// The engines that enforce the rules, side by side: ebpf, and one packet filter of the kernel.
    #[serde(serialize_with = "super::flow::flow")]
    pub engines: Vec<Engine>,
    /// The answer to the sender of a denied packet.
    pub on_deny: OnDeny,
    /// Traffic that the packet filter refuses besides that between pods and LAN hosts.
    pub scope: Scope,
    /// Settings of the iptables engine alone.
    pub iptables: Iptables,
    /// Settings of the nftables engine alone.
    pub nftables: Nftables,
    /// The network interfaces that packets are judged on. Left out, they are found from the routing table.
    pub interfaces: Interfaces,
    /// Whether packets of established flows go from interface to interface past the network stack.
    pub fast_path: FastPath,
    /// Whether drivers of interfaces towards the LAN drop denied packets before the network stack sees them.
    pub xdp: Xdp,
    /// How long an idle flow stays known, by its state.
    pub timeouts: Timeouts,
    /// Which events are reported, and how many.
    pub events: Events,
    /// Denied packets as lines of the system log. Left out: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub syslog: Option<Syslog>,
    /// How many flows are remembered.
    pub flows: Flows,
}

impl Default for Enforcement {
    fn default() -> Self {
        Self {
            mode: Mode::default(),
            engines: vec![Engine::Ebpf, Engine::Iptables],
            on_deny: OnDeny::default(),
            scope: Scope::default(),
            iptables: Iptables::default(),
            nftables: Nftables::default(),
            interfaces: Interfaces::default(),
            fast_path: FastPath::default(),
            xdp: Xdp::default(),
            timeouts: Timeouts::default(),
            events: Events::default(),
            syslog: None,
            flows: Flows::default(),
        }
    }
}

/// An engine that enforces the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// Programs at the traffic-control hooks of the interfaces.
    Ebpf,
    /// The chain BRIDGE-FORWARD of iptables and ip6tables.
    Iptables,
    /// The table bridge-agent of nftables.
    Nftables,
    /// nftables, if the node has it and no rules of iptables-legacy; else iptables.
    Auto,
}

/// Traffic that the packet filter refuses besides that between pods and LAN hosts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Nothing: other traffic is left to the other rules of the host.
    #[default]
    Scoped,
    /// All forwarded traffic that no rule allows. For a host that is a gateway and nothing else.
    Strict,
}

/// The network interfaces that packets are judged on. In a name, `*` stands for any number of characters.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Interfaces {
    /// Interfaces towards the LAN. Left out: those that the routes to `networks.external` leave by.
    #[serde(skip_serializing_if = "Vec::is_empty", serialize_with = "super::flow::flow")]
    pub external: Vec<InterfacePattern>,
    /// Interfaces towards the pods. Left out: those that the routes to `networks.pods` leave by.
    #[serde(skip_serializing_if = "Vec::is_empty", serialize_with = "super::flow::flow")]
    pub internal: Vec<InterfacePattern>,
}

/// Whether packets of established flows go from interface to interface past the network stack.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum FastPath {
    /// Those of flows and on interfaces where that makes no difference but of speed.
    #[default]
    Auto,
    /// None.
    Off,
}

/// Whether drivers of interfaces towards the LAN drop denied packets before the network stack sees them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Xdp {
    /// Those that have native XDP, where no other XDP program is attached. On some cards attaching resets the queues.
    Auto,
    /// None.
    #[default]
    Off,
}

/// How long an idle flow stays known, by its state, such as 30s, 5m or 1d.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Timeouts {
    /// TCP from the first SYN until the handshake is complete.
    pub tcp_handshake: TimeSpan,
    /// TCP after the handshake.
    pub tcp_established: TimeSpan,
    /// TCP after the first FIN.
    pub tcp_closing: TimeSpan,
    /// TCP after an RST.
    pub tcp_reset: TimeSpan,
    /// UDP that was never replied to.
    pub udp_unreplied: TimeSpan,
    /// UDP that was replied to.
    pub udp_replied: TimeSpan,
    /// ICMP and ICMPv6 queries.
    pub icmp: TimeSpan,
    /// SCTP and every other IP protocol.
    pub other: TimeSpan,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            tcp_handshake: TimeSpan::seconds(30),
            tcp_established: TimeSpan::seconds(86_400),
            tcp_closing: TimeSpan::seconds(120),
            tcp_reset: TimeSpan::seconds(120),
            udp_unreplied: TimeSpan::seconds(30),
            udp_replied: TimeSpan::seconds(180),
            icmp: TimeSpan::seconds(30),
            other: TimeSpan::seconds(600),
        }
    }
}

/// Which events are reported, and how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Events {
    /// Maximum number of events per second and CPU; more are counted, not reported. 0: none are reported.
    #[schemars(range(max = 1_000_000))]
    pub rate: u32,
    /// Whether new flows that were allowed are reported too, not only denied packets.
    pub allowed: bool,
}

impl Default for Events {
    fn default() -> Self {
        Self { rate: 100, allowed: false }
    }
}

/// How many flows are remembered. When a table is full, its longest idle flow is forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Flows {
    /// TCP connections; in a table of their own, half as many flows of other protocols that were replied to.
    #[schemars(range(min = 1024, max = 16_777_216))]
    pub established: u32,
    /// Flows that were not yet replied to; apart, so that a flood of them cannot push out an established one.
    #[schemars(range(min = 1024, max = 16_777_216))]
    pub half_open: u32,
}

impl Default for Flows {
    fn default() -> Self {
        Self { established: 262_144, half_open: 65_536 }
    }
}

impl Interfaces {
    fn check(&self, path: &Path<'_>, report: &mut Report<'_>) {
        let Self { external, internal } = self;
        let paths = [path.key("external"), path.key("internal")];
        for (list, path) in [external, internal].into_iter().zip(&paths) {
            report.repeated(path, list);
        }
        for (index, pattern) in internal.iter().enumerate() {
            let common = external.iter().find_map(|other| Some((other, other.common(pattern)?)));
            if let Some((other, name)) = common {
                let message = if other == pattern {
                    format!("`{pattern}` is both an external and an internal interface")
                } else {
                    format!("`{pattern}` and the external `{other}` both match {name}")
                };
                let help =
                    "write it on the side it faces: external towards the LAN, internal towards the pods";
                report.error(&paths[1].index(index), Problem::new(message, help));
            }
        }
    }
}

impl Enforcement {
    pub(crate) fn check(&self, path: &Path<'_>, report: &mut Report<'_>) {
        let engines = path.key("engines");
        if self.engines.is_empty() && report.intact(&engines) {
            report.error(
                &engines,
                Problem::new(
                    "no engine is given, so nothing would enforce the rules",
                    "write [ebpf, iptables], one of them, or remove the key for both",
                ),
            );
        }
        report.repeated(&engines, &self.engines);
        let filters = |engine: &Engine| matches!(engine, Engine::Iptables | Engine::Nftables | Engine::Auto);
        let mut filters = self.engines.iter().enumerate().filter(|(_, engine)| filters(engine));
        if let (Some((_, first)), Some((index, second))) = (filters.next(), filters.next())
            && first != second
        {
            let problem = Problem::new(
                "both would write the same rules into the kernel's packet filter, and each packet would pass them twice",
                "write [ebpf, nftables] or [ebpf, iptables]; auto stands for one of them",
            );
            report.error(&engines.index(index), problem);
        }
        self.iptables.check(&path.key("iptables"), report);
        if let Some(syslog) = &self.syslog {
            syslog.check(&path.key("syslog"), report);
        }
        self.interfaces.check(&path.key("interfaces"), report);
    }
}
