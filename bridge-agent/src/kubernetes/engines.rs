//! The engines of this node, for its `BridgeNode`.

use std::sync::Arc;

use crate::pool::service::Service;

/// The engines and the pool of this node.
#[derive(Clone, Debug, Default)]
pub(crate) struct Engines {
    /// `ebpf`, `iptables`.
    pub(crate) names: Vec<&'static str>,
    /// `enforce` or `audit`; empty without eBPF.
    pub(crate) mode: String,
    /// Number of the active eBPF policy.
    pub(crate) generation: u32,
    /// Attached interfaces.
    pub(crate) interfaces: Vec<String>,
    /// Problems of either engine.
    pub(crate) errors: Vec<String>,
    /// Reasons for which the node does not enforce as its configuration asks.
    pub(crate) unready: Vec<String>,
    /// The difference between the engines, if they do not agree.
    pub(crate) divergence: Option<String>,
    /// Time of the last trial that expired.
    pub(crate) trial_expired: Option<String>,
    pub(crate) pool: Option<Arc<Service>>,
}

impl PartialEq for Engines {
    fn eq(&self, other: &Self) -> bool {
        let parts = |of: &Self| (of.names.clone(), of.generation, of.pool.as_ref().map(Arc::as_ptr));
        parts(self) == parts(other)
            && (&self.mode, &self.interfaces, &self.errors) == (&other.mode, &other.interfaces, &other.errors)
            && (&self.unready, &self.divergence) == (&other.unready, &other.divergence)
            && self.trial_expired == other.trial_expired
    }
}
