//! The engines as the status shows them.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::policy::TablesStats;

/// The eBPF engine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Enforcement {
    /// `enforce` or `audit`.
    pub mode: String,
    /// Number of the active policy; grows with each.
    pub generation: u32,
    /// Sizes of its tables.
    pub tables: Option<TablesStats>,
    /// Microseconds from the first write of its tables to the switch; `None` if it was active already.
    pub switched_in_us: Option<u64>,
    /// `tcx` or `clsact`.
    pub mechanism: String,
    /// Whether the agent found eBPF enforcement active when it started.
    pub adopted: bool,
    /// Connections seeded from conntrack at first start.
    pub seeded: Option<usize>,
    /// Attached interfaces.
    pub interfaces: Vec<AttachedInterface>,
    /// Protocols that may take the fast path.
    #[serde(default)]
    pub fast_path: FastPathStatus,
    /// Pins that another program had removed and the agent restored.
    #[serde(default)]
    pub pins_restored: u64,
    /// Programs that others had detached or moved and the agent restored.
    #[serde(default)]
    pub programs_restored: u64,
    /// Programs that are not attached, or not the first ones, at this moment.
    #[serde(default)]
    pub displaced: Vec<String>,
    /// Why pods are behind interfaces that are not judged; `None`: they are not.
    #[serde(default)]
    pub misled: Option<String>,
    /// Problems that the operator should know.
    pub remarks: Vec<String>,
}

/// An interface with programs of bridge on it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AttachedInterface {
    pub name: String,
    pub index: u32,
    /// `external`, `internal`, `bridge`, `port`, or `tunnel` to pods of other nodes.
    pub role: String,
    /// Use of the interface by the fast path: `in`, `out`, `peer` (straight to its other end).
    #[serde(default)]
    pub fast_path: Vec<String>,
    /// Towards the LAN, whether the driver drops denied packets (`enforcement.xdp`): `native`, or `off` and why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub xdp: Option<String>,
}

/// Protocols that may take the fast path.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FastPathStatus {
    /// Empty: the fast path is off.
    pub protocols: Vec<String>,
    /// Why other protocols may not.
    pub remarks: Vec<String>,
}

/// The packet filter beside eBPF, or in its place.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FirewallStatus {
    /// `iptables` or `nftables`.
    #[serde(default)]
    pub engine: String,
    /// Of iptables `nft` or `legacy`, of nftables the family and name of its table.
    pub backend: String,
    /// Why `auto` has taken this engine; `None` if the configuration names it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chosen: Option<String>,
    /// How often the agent repaired rules that another program had changed.
    pub repairs: u64,
    /// Damage found at the last repair.
    pub last_repair: Option<String>,
    /// Time of the last repair; RFC 3339, UTC.
    pub last_repair_time: Option<String>,
    /// Why the rules cannot be read or repaired now.
    pub failure: Option<String>,
    /// Packets on which the engines disagreed; only with both engines.
    pub divergence: Option<DivergenceStatus>,
}

/// Packets that one engine passed and the other denied, since this agent started to compare.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DivergenceStatus {
    /// Denied by iptables, passed or not seen by eBPF: packets by denying rule. Not counted in audit mode.
    pub denied_by_iptables: BTreeMap<String, u64>,
    /// As much for nftables, by reason.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub denied_by_nftables: BTreeMap<String, u64>,
    /// Denied by eBPF, and allowed by the rules of iptables; a lower bound.
    pub denied_by_ebpf: u64,
    /// The last of these.
    pub last_denied_by_ebpf: Option<String>,
    /// Denied by eBPF and compared with the rules of iptables.
    pub compared: u64,
    /// Denied by eBPF and not compared, because the rules were not read in time.
    pub not_compared: u64,
}

impl DivergenceStatus {
    /// Describes the difference between the engines, if there is one.
    pub(crate) fn summary(&self) -> Option<String> {
        let by_iptables: u64 = self.denied_by_iptables.values().sum();
        let by_nftables: u64 = self.denied_by_nftables.values().sum();
        // Packets that eBPF alone denies are not counted with nftables.
        if by_nftables > 0 {
            return Some(format!("packets denied by nftables alone: {by_nftables}"));
        }
        (by_iptables + self.denied_by_ebpf > 0).then(|| {
            format!("packets denied by iptables alone: {by_iptables}, by eBPF alone: {}", self.denied_by_ebpf)
        })
    }
}
