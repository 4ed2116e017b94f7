//! Keeps routes from a LAN host to pod networks in the kernel.
//!
//! ```text
//! sources (static, file, kubernetes, discovery) -> merge -> plan (pure) -> apply (rtnetlink) -> watch -> plan ...
//! ```
//!
//! Every route has the routing protocol number [`PROTOCOL`], which distinguishes own routes from foreign ones, also after
//! a crash. `ip route show proto 98` lists them.

pub mod discovery;
pub mod event;
pub mod export;
mod follow;
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

pub use crate::config::OnWithdraw;
pub use event::{EventKind, RouteEvent};
pub use follow::Follower;
pub use model::{DesiredRoute, NextHop, Observed, PROTOCOL, SourceKind, Target};
pub use plan::{Operation, Plan, Verdict, plan, withdraw};
pub use reconciler::Reconciler;
pub use refusal::Refusal;
pub use service::{Change, Comparison, Service, View, carry_out, read_once, withdrawal};
pub use settings::Settings;
pub use setup::{Error, Setup};
pub(crate) use sources::{ClusterFile, Node as FileNode, Pod as FilePod};
pub use status::{Counters, Fate, NextHopStatus, RouteStatus, Snapshot, State};
