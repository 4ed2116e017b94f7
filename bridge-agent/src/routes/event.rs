//! Events of routes, for `monitor` and the log.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::kernel::clock;

/// An event for the operator.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RouteEvent {
    /// RFC 3339, UTC.
    pub time: String,
    pub kind: EventKind,
    /// To which route or next hop, and why.
    pub text: String,
}

impl RouteEvent {
    pub(super) fn now(kind: EventKind, text: String) -> Self {
        Self { time: clock::wall_clock(), kind, text }
    }
}

/// See [`RouteEvent::kind`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum EventKind {
    /// A route was put into the kernel.
    RouteAdded,
    /// A route got another target.
    RouteReplaced,
    /// A route was taken out.
    RouteDeleted,
    /// A desired route may not be in the kernel.
    RouteRefused,
    /// The kernel refused a request.
    RouteFailed,
    /// A next hop stopped answering.
    NextHopDown,
    /// A next hop answers again.
    NextHopUp,
    /// A next hop went down too often; it stays down until it has been stable.
    NextHopDamped,
    /// A pod announced itself.
    PodDiscovered,
    /// An announcement was refused.
    PodRefused,
    /// The announcement of a pod was not renewed in time.
    PodExpired,
}

impl fmt::Display for EventKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}
