//! The facts of a configuration file: every pod is of this node, and nothing has happened yet.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{Facts, FlowTable, KnownFlow, NodeState, Packet, Question};
use crate::{
    config::{Config, PoolScope},
    model::Policy,
};

/// Index that stands for the interface towards the LAN.
const LAN: u32 = 1;
/// Index that stands for the interfaces towards pods.
const PODS: u32 = 2;

/// A node as its configuration file describes it.
#[derive(Clone, Debug)]
pub struct Offline {
    policy: Policy,
    pool: Option<PoolScope>,
    local: Vec<IpAddr>,
}

/// See [`NodeState`].
struct State<'a>(&'a [IpNet]);

impl Offline {
    /// `local`: addresses of the node, which no file has.
    #[must_use]
    pub fn new(config: &Config, local: Vec<IpAddr>) -> Self {
        Self { policy: config.policy(), pool: config.pool_scope(), local }
    }

    /// The policy of the file.
    #[must_use]
    pub const fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Calls `with` with the facts for a question. A destination in `networks.nodes` is taken for this node.
    pub fn with_facts<T>(&self, question: &Question, with: impl FnOnce(&Facts<'_>) -> T) -> T {
        let mut local = self.local.clone();
        if self.policy.nodes.iter().any(|network| network.contains(&question.destination)) {
            local.push(question.destination);
        }
        with(&Facts {
            policy: &self.policy,
            local: &local,
            state: &State(&self.policy.pods),
            pool: self.pool.as_ref(),
            lan_interface: LAN,
            live: false,
        })
    }
}

impl NodeState for State<'_> {
    fn hosted(&self, pod: IpAddr) -> Option<u32> {
        self.0.iter().any(|network| network.contains(&pod)).then_some(PODS)
    }

    fn leads_to(&self, _: IpAddr, _: u32) -> bool {
        true
    }

    fn is_external(&self, interface: u32) -> bool {
        interface == LAN
    }

    fn has_tunnel(&self, _: u8, _: u16) -> bool {
        false
    }

    fn flow(&self, _: FlowTable, _: &Packet) -> Option<KnownFlow> {
        None
    }
}
