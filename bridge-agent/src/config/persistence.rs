//! `persistence`: state that outlives a reboot.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// State that outlives a reboot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Persistence {
    /// Whether the iptables rules are saved for the boot.
    pub save: Save,
}

/// Whether the iptables rules are saved for the boot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Save {
    /// After each change, for whichever of iptables-services and netfilter-persistent is installed.
    #[default]
    Auto,
    /// Not at all.
    Never,
}
