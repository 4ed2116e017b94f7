//! Routes from a LAN host to pod networks, kept true.
//!
//! ```text
//! sources (static, file, kubernetes, discovery) -> merge -> plan (pure) -> apply (rtnetlink) -> watch -> plan ...
//! ```
//!
//! Every route bears the routing protocol number [`PROTOCOL`]: that is how own routes are told from foreign ones,
//! also by the next run after a crash. `ip route show proto 98` lists them.

pub mod model;
pub mod netlink;
pub mod plan;
mod prefix_map;
mod reconciler;
mod refusal;
mod resolve;
mod settings;
pub mod sources;
mod status;

pub use model::{DesiredRoute, NextHop, Observed, PROTOCOL, SourceKind, Target};
pub use plan::{Operation, Plan, Verdict, plan, withdraw};
pub use reconciler::Reconciler;
pub use refusal::Refusal;
pub use settings::{OnWithdraw, Settings};
pub use status::{Counters, EventKind, RouteEvent, RouteStatus, Snapshot, State};
