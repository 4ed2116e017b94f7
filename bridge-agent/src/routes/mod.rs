//! Routes from a LAN host to pod networks, kept true.
//!
//! ```text
//! sources (static, file, kubernetes, discovery) -> merge -> plan (pure) -> apply (rtnetlink) -> watch -> plan ...
//! ```
//!
//! Every route bears the routing protocol number [`PROTOCOL`]: that is how own routes are told from foreign ones,
//! also by the next run after a crash. `ip route show proto 98` lists them.

pub mod discovery;
pub mod export;
pub mod health;
pub mod model;
pub mod netlink;
pub mod plan;
mod prefix_map;
mod reconciler;
mod refusal;
mod resolve;
mod service;
mod settings;
mod setup;
pub mod sources;
mod status;
mod watchdog;

pub use model::{DesiredRoute, NextHop, Observed, PROTOCOL, SourceKind, Target};
pub use plan::{Operation, Plan, Verdict, plan, withdraw};
pub use reconciler::Reconciler;
pub use refusal::Refusal;
pub use service::{Change, Comparison, Service, View, carry_out, read_once, withdrawal};
pub use settings::{OnWithdraw, Settings};
pub use setup::{Error, Setup};
pub(crate) use sources::{ClusterFile, Node as FileNode, Pod as FilePod};
pub use status::{Counters, EventKind, Fate, NextHopStatus, RouteEvent, RouteStatus, Snapshot, State};
