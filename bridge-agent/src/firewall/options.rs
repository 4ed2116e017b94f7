//! Settings of a packet filter beside the policy.

use std::num::NonZeroU32;

use crate::config::{PacketMark, Scope};
use crate::model::Topology;

/// Settings beside the policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Whether forwarded traffic out of scope passes.
    pub scope: Scope,
    /// One bit of the packet mark: set between mangle PREROUTING and filter on packets from the LAN to a NodePort, since
    /// their first destination is only known before DNAT. No other program may use that bit.
    pub mark: NonZeroU32,
    /// Denied packets (in audit mode: those that would be) logged per second; `None`: none.
    pub log_per_second: Option<NonZeroU32>,
    /// The interfaces of this node.
    pub topology: Topology,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            scope: Scope::Scoped,
            mark: PacketMark::default().get(),
            log_per_second: None,
            topology: Topology::default(),
        }
    }
}
