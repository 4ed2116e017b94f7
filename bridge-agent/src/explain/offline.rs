//! The facts of a configuration file: every pod is of this node, and nothing has happened yet.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{Client, Facts, FlowTable, Hook, KnownFlow, NodeState, Packet, PoolFacts, Question, Request};
use crate::{
    config::{Config, PoolScope},
    model::Policy,
    pool::hooked::covers,
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
    client: Option<Client>,
}

/// See [`NodeState`].
struct State<'a>(&'a [IpNet]);

impl Offline {
    /// `local`: addresses of the node, which no file has.
    #[must_use]
    pub fn new(config: &Config, local: Vec<IpAddr>) -> Self {
        Self { policy: config.policy(), pool: config.pool_scope(), local, client: None }
    }

    /// Takes the process of a request for the client: the file alone says whether it is hooked.
    #[must_use]
    pub fn with_client_of(mut self, request: &Request) -> Self {
        let groups = self.pool.as_ref().map(|pool| pool.cgroups.as_slice()).unwrap_or_default();
        self.client = request.client().zip(request.cgroup.clone()).map(|(name, cgroup)| {
            let hook = covers(groups, &cgroup).map_or(Hook::None, |group| Hook::By(group.clone()));
            Client { name, cgroup, hook }
        });
        self
    }

    /// The facts about the pool.
    #[must_use]
    pub fn pool_facts(&self) -> PoolFacts<'_> {
        PoolFacts { scope: self.pool.as_ref(), client: self.client.as_ref(), ephemeral: None }
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
            pool: self.pool_facts(),
            lan_interface: LAN,
            live: false,
            by_ebpf: true,
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
