//! The budget of each policy, computed once for the same rules.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use super::cluster::Cluster;
use crate::config::{Config, Rule};
use crate::model::Policy;
use crate::policy::budget::{self, Cost, Exceeded};

/// The outcome of earlier checks by policy, with a hash of the rules and networks.
#[derive(Debug, Default)]
pub(super) struct Budgets(HashMap<String, (u64, Result<Cost, Exceeded>)>);

impl Budgets {
    /// Checks the rules of one policy, whose selectors are resolved, by themselves.
    pub(super) fn check(&mut self, name: &str, rules: &[Rule], config: &Config) -> Result<Cost, Exceeded> {
        let mut policy = Policy { rules: rules.iter().map(Rule::to_model).collect(), ..config.policy() };
        policy.node_ports = None;
        let hash = hash(&policy);
        if let Some((known, outcome)) = self.0.get(name)
            && *known == hash
        {
            return outcome.clone();
        }
        let outcome = budget::check(&policy, &[]);
        self.0.insert(name.to_owned(), (hash, outcome.clone()));
        outcome
    }

    /// Forgets policies that no longer exist.
    pub(super) fn retain(&mut self, cluster: &Cluster) {
        self.0.retain(|name, _| cluster.policies.get(name).is_some());
    }
}

fn hash(policy: &Policy) -> u64 {
    let mut hasher = DefaultHasher::new();
    (&policy.pods, &policy.external, &policy.nodes).hash(&mut hasher);
    for rule in &policy.rules {
        (rule.direction, &rule.external, &rule.pods, rule.protocol).hash(&mut hasher);
        (&rule.ports, &rule.source_ports, rule.action).hash(&mut hasher);
    }
    hasher.finish()
}
