//! Known state of a cluster.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::ops::Bound;
use std::sync::atomic::{AtomicU64, Ordering};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::resources::{Condition, Revision};
use crate::config::Rule;

/// Labels of a pod or a namespace, sorted by their keys.
pub(super) type Labels = Box<[(Box<str>, Box<str>)]>;

/// A node, as the API server or Cilium describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Node {
    /// Its addresses on the LAN, preferred first.
    pub(super) addresses: Box<[IpAddr]>,
    /// The networks of its pods.
    pub(super) networks: Box<[IpNet]>,
}

/// A pod with addresses of its own, or one that takes part in the port pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Pod {
    pub(super) namespace: Box<str>,
    pub(super) labels: Labels,
    pub(super) addresses: Box<[IpAddr]>,
    /// By which its control group is named, if it takes part in the transparent port pool.
    #[serde(default)]
    pub(super) pool_uid: Option<Box<str>>,
}

/// A `BridgePolicy`. Its conditions do not count in a comparison, since they change nothing.
#[derive(Clone, Debug, Eq, Serialize, Deserialize)]
pub(super) struct Policy {
    pub(super) generation: i64,
    /// Distinguishes it from a deleted one of the same name, whose generation began at 1, too.
    #[serde(default)]
    pub(super) uid: Box<str>,
    pub(super) rules: Result<Vec<Rule>, Refusal>,
    /// The conditions in its status.
    #[serde(skip)]
    pub(super) reported: Vec<Condition>,
    /// Identifies `rules`: the generation of an object that was deleted and made again begins at 1.
    #[serde(skip)]
    pub(super) stamp: Stamp,
}

/// Differs from that of every other policy that was read in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp(u64);

impl Default for Stamp {
    fn default() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

impl Policy {
    /// Identifies its content among all policies of its name.
    pub(super) fn revision(&self) -> Revision {
        (self.uid.clone(), self.generation)
    }
}

impl PartialEq for Policy {
    fn eq(&self, other: &Self) -> bool {
        (self.generation, &self.uid, &self.rules) == (other.generation, &other.uid, &other.rules)
    }
}

/// The reason for which a policy is not accepted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "SavedRefusal")]
pub(super) struct Refusal {
    /// The reason of the condition, in CamelCase.
    pub(super) reason: String,
    /// The findings, with remedies.
    pub(super) message: String,
}

/// A refusal in the file of the last run. Version 0.1 saved the message alone.
#[derive(Deserialize)]
#[serde(untagged)]
enum SavedRefusal {
    Message(String),
    Whole { reason: String, message: String },
}

impl From<SavedRefusal> for Refusal {
    fn from(saved: SavedRefusal) -> Self {
        match saved {
            SavedRefusal::Message(message) => Self { reason: "Invalid".to_owned(), message },
            SavedRefusal::Whole { reason, message } => Self { reason, message },
        }
    }
}

/// A block of Calico.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Block {
    pub(super) network: IpNet,
    /// The node that hands out its addresses.
    pub(super) node: Option<Box<str>>,
    /// Those of its addresses that pods of other nodes have, and which node.
    pub(super) lent: Box<[(IpAddr, Box<str>)]>,
}

/// A block of Calico that is a node's own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Affinity {
    pub(super) network: IpNet,
    pub(super) node: Box<str>,
}

/// Returns the namespace in the key of a policy; a policy of the cluster has none.
pub(super) fn namespace_of(key: &str) -> Option<&str> {
    key.split_once('/').map(|(namespace, _)| namespace)
}

/// All objects of one kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(bound(serialize = "T: Serialize", deserialize = "T: Deserialize<'de>"))]
pub(super) struct Table<T> {
    items: BTreeMap<Box<str>, T>,
    /// Whether they are all that there are, or were when they were last heard of.
    known: bool,
    /// Objects of a list in progress; replaces `items` when it is complete.
    #[serde(skip)]
    incoming: Option<BTreeMap<Box<str>, T>>,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self { items: BTreeMap::new(), known: false, incoming: None }
    }
}

impl<T: PartialEq> Table<T> {
    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &T)> + Clone {
        self.items.iter().map(|(key, value)| (&**key, value))
    }

    /// Returns the object with the lowest key above `key`; without `key`, the first.
    pub(super) fn after(&self, key: Option<&str>) -> Option<(&str, &T)> {
        let from = key.map_or(Bound::Unbounded, Bound::Excluded);
        let mut next = self.items.range::<str, _>((from, Bound::Unbounded));
        next.next().map(|(key, value)| (&**key, value))
    }

    pub(super) fn get(&self, key: &str) -> Option<&T> {
        self.items.get(key)
    }

    pub(super) fn get_mut(&mut self, key: &str) -> Option<&mut T> {
        self.items.get_mut(key)
    }

    /// Whether all objects were listed, now or by an earlier run.
    pub(super) const fn is_known(&self) -> bool {
        self.known
    }

    pub(super) fn len(&self) -> usize {
        self.items.len()
    }

    /// Begins a list. The known objects stay until it is complete.
    pub(super) fn begin(&mut self) {
        self.incoming = Some(BTreeMap::new());
    }

    /// An object of the list; `None` if it counts for nothing.
    pub(super) fn listed(&mut self, key: Box<str>, value: Option<T>) {
        if let (Some(incoming), Some(value)) = (&mut self.incoming, value) {
            incoming.insert(key, value);
        }
    }

    /// The list is complete. Returns whether that changes anything.
    pub(super) fn complete(&mut self) -> bool {
        let Some(incoming) = self.incoming.take() else { return false };
        let changed = !self.known || self.items != incoming;
        self.items = incoming;
        self.known = true;
        changed
    }

    /// There are none, and cannot be. Returns whether that changes anything.
    pub(super) fn absent(&mut self) -> bool {
        self.begin();
        self.complete()
    }

    /// An object is new or has changed. Returns whether that changes anything.
    pub(super) fn apply(&mut self, key: Box<str>, value: Option<T>) -> bool {
        match value {
            None => self.items.remove(&key).is_some(),
            Some(value) => {
                let same = self.items.get(&key) == Some(&value);
                // Also an equal value may have parts that do not count in a comparison.
                self.items.insert(key, value);
                !same
            }
        }
    }
}

/// Known state of a cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Cluster {
    pub(super) nodes: Table<Node>,
    /// Those of this node.
    pub(super) pods: Table<Pod>,
    /// Those of other nodes.
    pub(super) remote_pods: Table<Pod>,
    pub(super) namespaces: Table<Labels>,
    pub(super) policies: Table<Policy>,
    /// By namespace and name, with a `/` between.
    pub(super) namespace_policies: Table<Policy>,
    pub(super) blocks: Table<Block>,
    pub(super) affinities: Table<Affinity>,
    pub(super) cilium: Table<Node>,
}

impl Cluster {
    /// Returns all policies by key: those of the cluster, then those of namespaces.
    pub(super) fn all_policies(&self) -> impl Iterator<Item = (&str, &Policy)> + Clone {
        self.policies.iter().chain(self.namespace_policies.iter())
    }

    /// Returns a policy by its key.
    pub(super) fn policy(&self, key: &str) -> Option<&Policy> {
        match namespace_of(key) {
            None => self.policies.get(key),
            Some(_) => self.namespace_policies.get(key),
        }
    }

    /// How many policies are not valid.
    pub(super) fn invalid_policies(&self) -> usize {
        self.all_policies().filter(|(_, policy)| policy.rules.is_err()).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn items(table: &Table<u8>) -> Vec<(&str, u8)> {
        table.iter().map(|(key, value)| (key, *value)).collect()
    }

    #[test]
    fn a_new_list_takes_the_place_of_the_old_one_when_it_is_complete() {
        let mut table = Table::default();
        table.begin();
        table.listed("a".into(), Some(1));
        table.listed("b".into(), Some(2));
        assert!(!table.known && items(&table).is_empty());
        assert!(table.complete() && table.known);
        table.begin();
        table.listed("b".into(), Some(3));
        assert_eq!(items(&table), [("a", 1), ("b", 2)], "nothing is forgotten in between");
        assert!(table.complete());
        assert_eq!(items(&table), [("b", 3)]);
        table.begin();
        table.listed("b".into(), Some(3));
        assert!(!table.complete(), "the same list is no change");
    }

    #[test]
    fn only_a_change_is_a_change() {
        let mut table = Table::default();
        assert!(table.absent() && table.known);
        assert!(!table.absent());
        assert!(table.apply("a".into(), Some(1)));
        assert!(!table.apply("a".into(), Some(1)));
        assert!(table.apply("a".into(), Some(2)));
        assert!(table.apply("a".into(), None));
        assert!(!table.apply("a".into(), None));
    }
}
