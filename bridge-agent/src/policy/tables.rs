//! The result of compiling a policy, and why it may not fit.

use bridge_common::filter::policy::{
    AddressInfo, PairKey, PairSets, PortIntervals, PortPage, RuleInfo, RuleSet, reference,
};
use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::model::Rule;

/// The most pairs of address classes a policy may need: the kernel holds each in about 64 bytes.
pub const MAX_PAIRS: usize = 4_000_000;

/// The most port intervals that may be computed on the way, intermediate results included: about a second, and
/// 130 MB.
pub const MAX_INTERVALS: usize = 1 << 24;

/// The most pages that port lookups may need, 1 KiB of kernel memory each.
pub const MAX_PAGES: usize = 1 << 18;

/// The name of the rule that stands for [`crate::model::NodePorts::allow`].
pub const NODE_PORTS_RULE: &str = "nodePorts";

/// A policy as the kernel reads it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tables {
    /// Prefixes, without host bits, ascending, each once; the longest that matches an address holds for it.
    /// Class 0 is named by no rule that names both sides, and in no pair.
    pub addresses: Vec<(IpNet, AddressInfo)>,
    /// Ascending by key, each once.
    pub pairs: Vec<(PairKey, PairSets)>,
    /// By index; the first says "no rule matches".
    pub rule_sets: Vec<RuleSet>,
    /// By [`AddressInfo::origin`]: the distinct properties of addresses of pods and LAN hosts.
    pub origins: Vec<AddressInfo>,
    /// By index.
    pub narrows: Vec<PortIntervals>,
    /// By index; the first is not used.
    pub pages: Vec<PortPage>,
    /// By index: the rules of the policy, then [`NODE_PORTS_RULE`], if NodePorts are judged, then the rules in audit mode.
    pub rules: Vec<RuleInfo>,
    /// For [`bridge_common::filter::control::Settings::global_sets`].
    pub global_sets: [u32; 2],
    /// For [`bridge_common::filter::control::Settings::node_ports`].
    pub node_ports: [u16; 2],
    /// For [`bridge_common::filter::control::Settings::node_port_root`].
    pub node_port_root: u32,
    /// Length of `rules`.
    pub rule_count: u32,
}

/// How many entries each table has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TablesStats {
    /// IPv4 prefixes.
    pub addresses4: usize,
    /// IPv6 prefixes.
    pub addresses6: usize,
    /// Pairs of address classes.
    pub pairs: usize,
    /// Sets of rules.
    pub rule_sets: usize,
    /// Port lookups with few intervals, 64 bytes each.
    pub narrows: usize,
    /// Pages of port lookups with many intervals, 1 KiB each.
    pub pages: usize,
    /// Rules, the one for NodePorts included.
    pub rules: usize,
}

impl Tables {
    /// How large they are.
    #[must_use]
    pub fn stats(&self) -> TablesStats {
        let addresses4 = self.addresses.iter().filter(|(prefix, _)| matches!(prefix, IpNet::V4(_))).count();
        TablesStats {
            addresses4,
            addresses6: self.addresses.len() - addresses4,
            pairs: self.pairs.len(),
            rule_sets: self.rule_sets.len(),
            narrows: self.narrows.len(),
            pages: self.pages.len(),
            rules: self.rules.len(),
        }
    }
}

/// Why a policy cannot be compiled.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// An address would be both a pod's and a LAN host's.
    #[error(
        "pod network {pods} and external network {external} overlap: an address must be on one side; \
         write networks.external without the pods' addresses"
    )]
    OverlappingNetworks {
        /// Of [`Policy::pods`].
        pods: IpNet,
        /// Of [`Policy::external`].
        external: IpNet,
    },
    /// Rules that name both sides name too many combinations.
    #[error(
        "rules that name both external and pods make {pairs} pairs of address lists, of which {MAX_PAIRS} can be \
         held; most come from {rules}: leave out external or pods there, name the same list of addresses in all of \
         them, or write one prefix in place of many addresses"
    )]
    TooManyPairs {
        /// How many it would be.
        pairs: u64,
        /// Those that contribute most.
        rules: String,
    },
    /// The port ranges of rules for the same addresses overlap in too many ways.
    #[error(
        "the ports and source ports of {rules} overlap in more than {MAX_INTERVALS} ways: give rules for the same \
         addresses the same sourcePorts, or leave them out, and join rules that differ in their ports only"
    )]
    TooManyPortRanges {
        /// Whose they are.
        rules: String,
    },
    /// The tables for port lookup would take too much memory.
    #[error(
        "the ports and source ports of the rules need {pages} pages of 1 KiB, of which {MAX_PAGES} can be held: give \
         rules for the same addresses the same sourcePorts, or leave them out, and join rules that differ in their \
         ports only"
    )]
    TooManyPages {
        /// How many it would be.
        pages: usize,
    },
    /// More rules than a verdict can name.
    #[error("{rules} rules are more than the {limit} that the tables can distinguish; join rules that differ in their ports only", limit = reference::RULE - 1)]
    TooManyRules {
        /// How many there are.
        rules: usize,
    },
}

/// The first few of `rules`, for a message.
pub(super) fn names<'a>(rules: impl ExactSizeIterator<Item = &'a Rule>) -> String {
    const SHOWN: usize = 5;
    let more = rules.len().saturating_sub(SHOWN);
    let shown: Vec<&str> = rules.take(SHOWN).map(|rule| rule.name.as_str()).collect();
    let and_more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("{}{and_more}", shown.join(", "))
}
