//! Finds the policies that keep a configuration from being applied, and leaves them out. Pure.
//!
//! Each policy is within its budget by itself, but all of them together may exceed a limit of the kernel. Policies that
//! were active before stay; the new and changed ones are halved until those that fail are found.

use std::collections::BTreeMap;

use super::cluster::Cluster;
use super::resources::ObservedPolicy;
use super::resources::Revision;

/// Reason for a policy that another one keeps from being tried.
const WAITING: &str = "not applied yet: the node is finding the policy that it cannot apply";

/// Policies that are left out.
#[derive(Debug, Default)]
pub(super) struct Quarantine {
    /// Revision and reason by policy.
    excluded: BTreeMap<String, (Revision, String)>,
    /// Groups of excluded policies that have not been tried by themselves.
    untried: Vec<Vec<String>>,
    /// Revision of each policy that was active when a configuration was last applied.
    good: BTreeMap<String, Revision>,
}

impl Quarantine {
    /// The reason for which a policy is left out.
    pub(super) fn reason(&self, policy: &str, revision: &Revision) -> Option<&str> {
        let (excluded, reason) = self.excluded.get(policy)?;
        (excluded == revision).then_some(reason.as_str())
    }

    /// Notes that a configuration with `policies` was applied. Returns whether excluded ones are to be tried next.
    pub(super) fn succeeded(&mut self, policies: &[ObservedPolicy], cluster: &Cluster) -> bool {
        self.good = policies.iter().map(|policy| (policy.name.clone(), policy.revision())).collect();
        self.excluded.retain(|name, (revision, _)| {
            cluster.policy(name).is_some_and(|policy| policy.revision() == *revision)
        });
        match self.untried.pop() {
            None => false,
            Some(group) => {
                self.excluded.retain(|name, _| !group.contains(name));
                true
            }
        }
    }

    /// Notes that a configuration with `policies` was not applied. Returns whether others are left out now, so that it is
    /// worth another attempt at once.
    pub(super) fn failed(&mut self, policies: &[ObservedPolicy], error: &str) -> bool {
        let is_new = |policy: &&ObservedPolicy| self.good.get(&policy.name) != Some(&policy.revision());
        let suspects: Vec<&ObservedPolicy> = policies.iter().filter(is_new).collect();
        let reason = match suspects.as_slice() {
            [] => return false,
            [_] => format!("the node cannot apply it together with the others: {error}"),
            _ => {
                let names =
                    |part: &[&ObservedPolicy]| part.iter().map(|policy| policy.name.clone()).collect();
                let (some, others) = suspects.split_at(suspects.len() / 2);
                self.untried.extend([names(some), names(others)]);
                WAITING.to_owned()
            }
        };
        let entries =
            suspects.iter().map(|policy| (policy.name.clone(), (policy.revision(), reason.clone())));
        self.excluded.extend(entries);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::super::cluster::{Policy, Stamp};
    use super::*;

    /// Applies policies, of which those named `bad` cannot be, until nothing changes any more. Returns the active ones.
    fn settle(quarantine: &mut Quarantine, cluster: &Cluster) -> (Vec<String>, usize) {
        for attempt in 0..1000 {
            let all = cluster.policies.iter().map(|(name, policy)| (name, policy.revision()));
            let policies: Vec<ObservedPolicy> = all
                .filter(|(name, revision)| quarantine.reason(name, revision).is_none())
                .map(|(name, (uid, observed_generation))| ObservedPolicy {
                    name: name.into(),
                    observed_generation,
                    uid,
                })
                .collect();
            let again = match policies.iter().any(|policy| policy.name.starts_with("bad")) {
                true => quarantine.failed(&policies, "too much"),
                false => quarantine.succeeded(&policies, cluster),
            };
            if !again {
                return (policies.into_iter().map(|policy| policy.name).collect(), attempt);
            }
        }
        panic!("it never settles: {quarantine:?}");
    }

    fn add(cluster: &mut Cluster, name: &str, generation: i64) {
        let (uid, rules, reported) = Default::default();
        let policy = Policy { generation, uid, rules: Ok(rules), reported, stamp: Stamp::default() };
        cluster.policies.apply(name.into(), Some(policy));
    }

    #[test]
    fn all_but_the_bad_policies_become_active() {
        let (mut quarantine, mut cluster) = (Quarantine::default(), Cluster::default());
        for number in 0..100 {
            add(&mut cluster, &format!("good{number}"), 1);
        }
        assert_eq!(
            settle(&mut quarantine, &cluster),
            (cluster.policies.iter().map(|(name, _)| name.to_owned()).collect(), 0)
        );
        for name in ["bad1", "bad2", "later1", "later2", "later3"] {
            add(&mut cluster, name, 1);
        }
        let (active, attempts) = settle(&mut quarantine, &cluster);
        assert_eq!(active.len(), 103, "{active:?}");
        assert!(attempts < 30, "{attempts}");
        assert!(quarantine.reason("bad1", &("".into(), 1)).unwrap().contains("too much"));
        assert_eq!(quarantine.reason("bad1", &("".into(), 2)), None, "a new generation is tried again");
        assert_eq!(quarantine.reason("bad1", &("new".into(), 1)), None, "and so is another one of its name");
        // Deleted: nothing is left of it.
        for name in ["bad1", "bad2"] {
            cluster.policies.apply(name.into(), None);
        }
        assert_eq!(settle(&mut quarantine, &cluster).0.len(), 103);
        assert!(quarantine.excluded.is_empty(), "{quarantine:?}");
    }

    #[test]
    fn a_failure_without_new_policies_is_nobodys() {
        assert!(!Quarantine::default().failed(&[], "no netlink"));
    }
}
