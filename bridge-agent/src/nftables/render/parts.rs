//! The pieces that the table is made of.

use ipnet::IpNet;

use crate::firewall::Options;
use crate::model::{Direction, Mode, Policy};
use crate::nftables::ruleset::Ruleset;

/// Before the other filters of the host, so that reasons are counted also where those deny as well.
pub(super) const FILTER: i32 = -10;
/// Resets and ICMP errors per second, and at once; beyond them packets are dropped.
pub(super) const REJECTS: u32 = 1_000;

pub(super) const FORWARD: &str = "forward";
pub(super) const SCOPE: &str = "scope";
pub(super) const DENY: &str = "deny";

/// An address family, by its number in names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    V4,
    V6,
}

impl Family {
    pub(super) const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// The name of a chain, set or map of this family.
    pub(super) fn of(self, name: &str) -> String {
        format!("{name}{}", if self == Self::V4 { 4 } else { 6 })
    }

    pub(super) const fn protocol(self) -> &'static str {
        if matches!(self, Self::V4) { "ip" } else { "ip6" }
    }

    pub(super) fn everything(self) -> IpNet {
        match self {
            Self::V4 => ipnet::Ipv4Net::default().into(),
            Self::V6 => ipnet::Ipv6Net::default().into(),
        }
    }

    /// The number of ICMP.
    pub(super) const fn icmp(self) -> u8 {
        if matches!(self, Self::V4) { 1 } else { 58 }
    }
}

/// The prefixes of `family`, joined where that changes nothing.
pub(super) fn select(all: &[IpNet], family: Family) -> Vec<IpNet> {
    let wanted =
        |net: &&IpNet| matches!((net, family), (IpNet::V4(_), Family::V4) | (IpNet::V6(_), Family::V6));
    IpNet::aggregate(&all.iter().filter(wanted).map(IpNet::trunc).collect())
}

/// The networks of one family.
pub(super) struct Networks {
    pub(super) external: Vec<IpNet>,
    pub(super) pods: Vec<IpNet>,
    pub(super) nodes: Vec<IpNet>,
}

impl Networks {
    pub(super) fn of(policy: &Policy, family: Family) -> Self {
        let select = |all: &[IpNet]| select(all, family);
        Self { external: select(&policy.external), pods: select(&policy.pods), nodes: select(&policy.nodes) }
    }
}

/// The most prefixes that are compared one by one; with more, a set is faster.
const FEW: usize = 3;

/// Returns a match for each of few prefixes, else one for the set of them; `side` is `saddr` or `daddr`.
pub(super) fn among(family: Family, side: &str, name: &str, prefixes: &[IpNet]) -> Vec<String> {
    let protocol = family.protocol();
    if prefixes.len() > FEW {
        return vec![format!("{protocol} {side} @{}", family.of(name))];
    }
    prefixes.iter().map(|prefix| format!("{protocol} {side} {}", text(prefix))).collect()
}

/// Whether [`among`] takes a set.
pub(super) const fn takes_a_set(prefixes: &[IpNet]) -> bool {
    prefixes.len() > FEW
}

/// The maps of one section: how elements are looked up and named.
pub(super) struct Section<'n> {
    /// The chain that looks the maps up.
    pub(super) chain: &'n str,
    /// Begins the names of the maps.
    pub(super) prefix: &'n str,
    pub(super) family: Family,
    pub(super) direction: Direction,
    /// Whether the pod is part of the key.
    pub(super) with_pods: bool,
}

/// Rules under construction.
pub(super) struct Renderer<'a> {
    pub(super) policy: &'a Policy,
    pub(super) options: &'a Options,
    pub(super) rules: Ruleset,
}

impl Renderer<'_> {
    /// Adds `counter name REASON goto deny` to a chain, after `matches`.
    pub(super) fn deny_for(&mut self, chain: impl Into<String>, matches: &str, reason: &'static str) {
        self.rules.counters.insert(reason);
        self.rules.rule(chain, joined(matches, &format!("counter name {reason} goto {DENY}")));
    }

    /// As [`Self::deny_for`], for packets that are never answered: a reset for a packet outside the window would end its
    /// connection.
    pub(super) fn silently_deny_for(
        &mut self,
        chain: impl Into<String>,
        matches: &str,
        reason: &'static str,
    ) {
        if self.policy.mode == Mode::Audit {
            return self.deny_for(chain, matches, reason);
        }
        self.rules.counters.insert(reason);
        self.rules.rule(chain, joined(matches, &format!("counter name {reason} drop")));
    }

    /// Packets that open a flow go to `to`, whether or not connection tracking takes them for part of an older one: the
    /// policy of now decides, also on the ports of an established flow.
    pub(super) fn opening(&mut self, chain: &str, to: &str) {
        self.rules.rule(chain, format!("tcp flags & (fin|syn|rst|ack) == syn goto {to}"));
        self.rules.rule(chain, format!("meta l4proto 132 sctp chunk init exists goto {to}"));
    }

    /// Refuses packets that belong to no flow and do not open one.
    pub(super) fn openers(&mut self, chain: &str) {
        // A masqueraded flow to another node is judged packet by packet.
        self.deny_for(chain, "tcp flags & (fin|syn|rst|ack) != syn ct state != established", "not-syn");
        self.deny_for(chain, "meta l4proto 132 sctp chunk init missing ct state != established", "not-init");
    }

    pub(super) fn log(&mut self, chain: &str) {
        let prefix = match self.policy.mode {
            Mode::Enforce => "bridge denied: ",
            Mode::Audit => "bridge would deny: ",
        };
        if let Some(rate) = self.options.log_per_second {
            let limit = format!("limit rate {rate}/second burst {rate} packets");
            self.rules.rule(chain, format!("{limit} log prefix \"{prefix}\""));
        }
    }
}

pub(super) fn joined(matches: &str, rest: &str) -> String {
    if matches.is_empty() { rest.to_owned() } else { format!("{matches} {rest}") }
}

/// An interface, or a prefix of names that ends in `+`.
pub(super) fn quoted(interface: &str) -> String {
    match interface.strip_suffix('+') {
        Some(prefix) => format!("\"{prefix}*\""),
        None => format!("\"{interface}\""),
    }
}

/// A prefix, or the address of a single host.
pub(super) fn text(prefix: &IpNet) -> String {
    if prefix.prefix_len() == prefix.max_prefix_len() {
        prefix.addr().to_string()
    } else {
        prefix.to_string()
    }
}

pub(super) fn list(prefixes: &[IpNet]) -> String {
    format!("{{ {} }}", prefixes.iter().map(text).collect::<Vec<_>>().join(", "))
}
