//! The budget of each policy, computed once for the same rules. A policy that nothing has changed for is not even read again.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, Hasher, RandomState};
use std::net::{IpAddr, Ipv6Addr};

use ipnet::IpNet;

use super::cluster::{Cluster, Stamp};
use super::selector::Reach;
use crate::config::Rule;
use crate::model::{self, Mode, OnDeny, Policy};
use crate::policy::budget::{self, Cost, Exceeded};

/// Addresses that rules do not name: of the discard prefix (RFC 6666).
const OTHER_HOST: Ipv6Addr = Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 1);
const OTHER_POD: Ipv6Addr = Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 2);

/// The outcome of earlier checks.
#[derive(Debug, Default)]
pub(super) struct Budgets {
    /// By policy: with the pods of this node, and with those of all.
    known: HashMap<String, [Option<Known>; 2]>,
    /// Keyed: no author finds two sets of rules with the same hash.
    hashes: RandomState,
}

#[derive(Debug)]
struct Known {
    /// Of the resolved rules.
    rules: u64,
    outcome: Result<Cost, Exceeded>,
    /// The policy that they were resolved from, and a hash of its surroundings.
    from: Option<(Stamp, Surroundings)>,
}

/// Everything but the policy that its resolved rules depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Surroundings(u64);

impl Budgets {
    /// Returns the surroundings of policies that select no pods, and of those that do, with the pods of this node.
    pub(super) fn surroundings(
        &self,
        external: &[IpNet],
        pods: &[IpNet],
        cluster: &Cluster,
    ) -> [Surroundings; 2] {
        let mut hasher = self.hashes.build_hasher();
        (external, pods).hash(&mut hasher);
        let networks = hasher.finish();
        for (_, pod) in cluster.pods.iter() {
            (&pod.namespace, &pod.labels, &pod.addresses, cluster.namespaces.get(&pod.namespace))
                .hash(&mut hasher);
        }
        [networks, hasher.finish()].map(Surroundings)
    }

    /// Returns the outcome of the check of a policy with the pods of this node, if it was made with these surroundings.
    pub(super) fn of(&self, name: &str, from: (Stamp, Surroundings)) -> Option<&Result<Cost, Exceeded>> {
        let known = self.known.get(name)?[Reach::Own as usize].as_ref()?;
        (known.from == Some(from)).then_some(&known.outcome)
    }

    /// Checks the rules of one policy, whose selectors are resolved, by themselves. The outcome depends on nothing else, so
    /// that a new node or pod does not have all policies compiled. `from`: the policy, and the surroundings that its rules
    /// were resolved in, for [`Self::of`].
    pub(super) fn check(
        &mut self,
        name: &str,
        reach: Reach,
        rules: &[Rule],
        from: Option<(Stamp, Surroundings)>,
    ) -> Result<Cost, Exceeded> {
        let model: Vec<model::Rule> = rules.iter().map(Rule::to_model).collect();
        let rules = hash(&model, self.hashes.build_hasher());
        let place = &mut self.known.entry(name.to_owned()).or_default()[reach as usize];
        let outcome = match place {
            Some(known) if known.rules == rules => known.outcome.clone(),
            _ => budget::check(&policy(model), &[]),
        };
        *place = Some(Known { rules, outcome: outcome.clone(), from });
        outcome
    }

    /// Forgets policies that no longer exist.
    pub(super) fn retain(&mut self, cluster: &Cluster) {
        self.known.retain(|name, _| cluster.policy(name).is_some());
    }
}

/// Returns a policy whose networks are those that its rules name, and one more on each side, so that no list stands for all.
fn policy(rules: Vec<model::Rule>) -> Policy {
    let named = |side: fn(&model::Rule) -> &Option<Vec<IpNet>>| {
        IpNet::aggregate(&rules.iter().filter_map(|rule| side(rule).as_ref()).flatten().copied().collect())
    };
    let (mut external, mut pods) = (named(|rule| &rule.external), named(|rule| &rule.pods));
    let free = |net: &IpNet, nets: &[IpNet]| !nets.iter().any(|other| other.contains(net));
    let more = [(&mut external, OTHER_HOST), (&mut pods, OTHER_POD)].map(|(nets, address)| {
        let net = IpNet::from(IpAddr::V6(address));
        (nets, net)
    });
    let mut taken: Vec<IpNet> = more.iter().flat_map(|(nets, _)| nets.iter().copied()).collect();
    for (nets, net) in more {
        if free(&net, &taken) {
            nets.push(net);
            taken.push(net);
        }
    }
    Policy {
        mode: Mode::Enforce,
        on_deny: OnDeny::Drop,
        pods,
        external,
        nodes: Vec::new(),
        rules,
        audited: Vec::new(),
        node_ports: None,
    }
}

fn hash(rules: &[model::Rule], mut hasher: impl Hasher) -> u64 {
    for rule in rules {
        (rule.direction, &rule.external, &rule.pods, rule.protocol).hash(&mut hasher);
        (&rule.ports, &rule.source_ports, rule.action).hash(&mut hasher);
    }
    hasher.finish()
}
