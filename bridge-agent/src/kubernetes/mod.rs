//! Kubernetes: nodes, pods, namespaces and policies of a cluster, followed by watches.
//!
//! ```text
//! API server -> watch (thin) -> cluster: known state -> plan (pure) -> a configuration, as if all of it stood in the
//! file -> the run loop: routes, eBPF, iptables, port pool
//! ```
//!
//! The active configuration stays while the API server is away. Until everything has been listed once, nothing is
//! withdrawn.

mod budgets;
mod cluster;
mod connect;
mod engines;
pub(crate) mod examine;
mod follow;
mod networks;
mod objects;
pub(crate) mod plan;
pub(crate) mod plugin;
mod policy_sets;
mod quarantine;
pub mod reference;
mod report;
pub mod resources;
pub(crate) mod saved;
mod schema;
mod selector;
mod state;
mod status;
mod thread;
mod watch;

pub use connect::Error;
pub(crate) use engines::Engines;
pub(crate) use follow::Follower;
pub use follow::View;
pub use networks::Origin;
pub(crate) use plan::Planned;
pub use status::KubernetesStatus;
