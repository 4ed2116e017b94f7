//! The budget of each policy, computed once for the same rules.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::{IpAddr, Ipv6Addr};

use ipnet::IpNet;

use super::cluster::Cluster;
use super::selector::Reach;
use crate::config::Rule;
use crate::model::{self, Mode, OnDeny, Policy};
use crate::policy::budget::{self, Cost, Exceeded};

/// Addresses that rules do not name: of the discard prefix (RFC 6666).
const OTHER_HOST: Ipv6Addr = Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 1);
const OTHER_POD: Ipv6Addr = Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 2);

/// The outcome of earlier checks by policy, with a hash of the rules.
#[derive(Debug, Default)]
pub(super) struct Budgets(HashMap<(String, Reach), (u64, Result<Cost, Exceeded>)>);

impl Budgets {
    /// Checks the rules of one policy, whose selectors are resolved, by themselves. The outcome depends on nothing else, so
    /// that a new node or pod does not have all policies compiled.
    pub(super) fn check(&mut self, name: &str, reach: Reach, rules: &[Rule]) -> Result<Cost, Exceeded> {
        let key = (name.to_owned(), reach);
        let rules: Vec<model::Rule> = rules.iter().map(Rule::to_model).collect();
        let hash = hash(&rules);
        if let Some((known, outcome)) = self.0.get(&key)
            && *known == hash
        {
            return outcome.clone();
        }
        let outcome = budget::check(&policy(rules), &[]);
        self.0.insert(key, (hash, outcome.clone()));
        outcome
    }

    /// Forgets policies that no longer exist.
    pub(super) fn retain(&mut self, cluster: &Cluster) {
        self.0.retain(|(name, _), _| cluster.policy(name).is_some());
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

fn hash(rules: &[model::Rule]) -> u64 {
    let mut hasher = DefaultHasher::new();
    for rule in rules {
        (rule.direction, &rule.external, &rule.pods, rule.protocol).hash(&mut hasher);
        (&rule.ports, &rule.source_ports, rule.action).hash(&mut hasher);
    }
    hasher.finish()
}
