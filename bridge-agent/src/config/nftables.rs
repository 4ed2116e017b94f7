//! `enforcement.nftables`: settings of the nftables engine alone.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::iptables::PacketMark;

/// Settings of the nftables engine alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Nftables {
    /// The bit of the packet mark that bridge sets on packets to a NodePort until they are judged. No other program on the
    /// node may use it.
    pub mark: PacketMark,
    /// The most denied packets that the kernel logs in a second. 0: none.
    #[schemars(range(max = 10_000))]
    pub log_rate: u32,
}
