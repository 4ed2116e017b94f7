//! What an operator decides about all routes of a host.

use ipnet::IpNet;

use super::health;
use crate::config::{DEFAULT_METRIC, OnWithdraw, TABLE_MAIN};

/// How routes are written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Routing table, 1 to 2^32-1 without 255 (local). With another than the main table the operator adds the `ip rule`.
    pub table: u32,
    /// `RTA_PRIORITY`; lower is preferred.
    pub metric: u32,
    /// Replaces a route that is no longer wanted, or whose next hops are all down.
    pub on_withdraw: OnWithdraw,
    /// Networks of foreign routes that desired routes may lie inside, for example a company's `10.0.0.0/8`.
    pub allow_inside: Vec<IpNet>,
    /// How next hops are watched; `None`: not at all.
    pub health: Option<health::Options>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            table: TABLE_MAIN,
            metric: DEFAULT_METRIC,
            on_withdraw: OnWithdraw::Remove,
            allow_inside: Vec::new(),
            health: None,
        }
    }
}
