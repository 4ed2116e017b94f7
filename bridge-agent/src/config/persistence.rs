//! `persistence`: state that outlives a reboot.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// State that outlives a reboot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Persistence {
    /// Whether the rules of iptables or nftables are saved for the boot.
    pub save: Save,
}

/// Whether the rules of iptables or nftables are saved for the boot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Save {
    /// After each change, where a unit loads them at boot: that of iptables-services or netfilter-persistent for iptables,
    /// `bridge-nftables.service` for nftables.
    #[default]
    Auto,
    /// Not at all.
    Never,
}
