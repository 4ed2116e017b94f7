//! The cluster as last known, for a start while its API server is away: enforcement must not become less by it. It is in the
//! state directory and survives a reboot, so that a node that boots without the API server is closed from the start.

use std::io::{self, BufReader};
use std::ops::Deref;
use std::path::PathBuf;

use serde::ser::{SerializeMap as _, SerializeStruct as _};
use serde::{Deserialize, Serialize, Serializer};

use super::cluster::{Cluster, Table};
use crate::config::Kubernetes;
use crate::kernel::{
    files::{self, Ownership},
    state_directory,
};

#[derive(Debug)]
pub(super) struct Saved {
    place: PathBuf,
    node: String,
    section: Kubernetes,
}

#[derive(Serialize)]
struct Out<'a, C: Serialize> {
    node: &'a str,
    section: &'a Kubernetes,
    cluster: C,
}

/// A cluster that is locked for one object at a time: a change never waits for a file of many large policies.
struct Shared<L>(L);

impl<C: Deref<Target = Cluster>, L: Fn() -> C> Serialize for Shared<L> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        const TABLES: usize = 9;
        let mut out = serializer.serialize_struct("Cluster", TABLES)?;
        let lock = &self.0;
        out.serialize_field("nodes", &SharedTable { lock, table: |cluster| &cluster.nodes })?;
        out.serialize_field("pods", &SharedTable { lock, table: |cluster| &cluster.pods })?;
        out.serialize_field("remote_pods", &SharedTable { lock, table: |cluster| &cluster.remote_pods })?;
        out.serialize_field("namespaces", &SharedTable { lock, table: |cluster| &cluster.namespaces })?;
        out.serialize_field("policies", &SharedTable { lock, table: |cluster| &cluster.policies })?;
        out.serialize_field(
            "namespace_policies",
            &SharedTable { lock, table: |cluster| &cluster.namespace_policies },
        )?;
        out.serialize_field("blocks", &SharedTable { lock, table: |cluster| &cluster.blocks })?;
        out.serialize_field("affinities", &SharedTable { lock, table: |cluster| &cluster.affinities })?;
        out.serialize_field("cilium", &SharedTable { lock, table: |cluster| &cluster.cilium })?;
        out.end()
    }
}

struct SharedTable<'a, L, T> {
    lock: &'a L,
    table: fn(&Cluster) -> &Table<T>,
}

impl<C: Deref<Target = Cluster>, L: Fn() -> C, T: Clone + PartialEq + Serialize> Serialize
    for SharedTable<'_, L, T>
{
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut out = serializer.serialize_struct("Table", 2)?;
        out.serialize_field("items", &SharedItems(self))?;
        let known = (self.table)(&(self.lock)()).is_known();
        out.serialize_field("known", &known)?;
        out.end()
    }
}

struct SharedItems<'a, L, T>(&'a SharedTable<'a, L, T>);

impl<C: Deref<Target = Cluster>, L: Fn() -> C, T: Clone + PartialEq + Serialize> Serialize
    for SharedItems<'_, L, T>
{
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let SharedTable { lock, table } = self.0;
        let mut out = serializer.serialize_map(None)?;
        let mut last: Option<Box<str>> = None;
        loop {
            // The lock ends before the object is written.
            let next =
                table(&lock()).after(last.as_deref()).map(|(key, value)| (Box::from(key), value.clone()));
            let Some((key, value)) = next else { return out.end() };
            out.serialize_entry(&key, &value)?;
            last = Some(key);
        }
    }
}

/// Content of the file.
#[derive(Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct In {
    pub(crate) node: String,
    section: Kubernetes,
    pub(crate) cluster: Cluster,
}

impl In {
    pub(crate) fn read(from: impl io::Read) -> serde_json::Result<Self> {
        serde_json::from_reader(from)
    }

    #[cfg(any(test, fuzzing))]
    pub(crate) fn write(&self) -> serde_json::Result<Vec<u8>> {
        let Self { node, section, cluster } = self;
        serde_json::to_vec(&Out { node, section, cluster })
    }
}

impl Saved {
    pub(super) const fn new(place: PathBuf, node: String, section: Kubernetes) -> Self {
        Self { place, node, section }
    }

    /// Returns the state saved last, if it was of this cluster and this node.
    pub(super) fn load(&self) -> Option<Cluster> {
        let file = match state_directory::open(&self.place) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => {
                tracing::warn!(%error, file = %self.place.display(), "cannot read the saved state of the cluster");
                return None;
            }
        };
        match In::read(BufReader::new(file)) {
            Ok(saved) => (saved.node == self.node && saved.section == self.section).then_some(saved.cluster),
            // Of another version of the agent.
            Err(error) => {
                tracing::info!(%error, file = %self.place.display(), "the saved state of the cluster is ignored");
                None
            }
        }
    }

    /// In one step: a reader never finds half of it. `cluster` is locked for one object at a time.
    pub(super) fn save<C: Deref<Target = Cluster>>(&self, cluster: impl Fn() -> C) -> io::Result<()> {
        files::replace_with(&self.place, Ownership::Private, |file| {
            let out = Out { node: &self.node, section: &self.section, cluster: Shared(&cluster) };
            serde_json::to_writer(file, &out).map_err(io::Error::from)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::cluster::{Node, Pod, Refusal, Stamp};
    use super::*;

    #[test]
    fn what_was_saved_is_found_again_for_the_same_cluster_and_node_alone() {
        let folder = tempfile::tempdir().unwrap();
        let saved =
            |node: &str, section| Saved::new(folder.path().join("kubernetes.json"), node.into(), section);
        let here = saved("b", Kubernetes::default());
        assert_eq!(here.load(), None);
        let mut cluster = Cluster::default();
        let node = Node { addresses: ["192.168.31.17".parse().unwrap()].into(), networks: [].into() };
        cluster.nodes.begin();
        cluster.nodes.listed("b".into(), Some(node));
        cluster.nodes.complete();
        let labels = [(Box::from("app"), Box::from("api"))].into();
        let pod = Pod {
            namespace: "n".into(),
            labels,
            addresses: ["10.200.1.91".parse().unwrap()].into(),
            pool_uid: None,
        };
        cluster.pods.apply("n/c1".into(), Some(pod));
        let refusal = || Refusal { reason: "Invalid".into(), message: "why".into() };
        let policy = |rules| super::super::cluster::Policy {
            generation: 1,
            uid: "u".into(),
            rules,
            reported: Vec::new(),
            stamp: Stamp::default(),
        };
        let json = r#"{"spec": {"rules": [{"name": "a", "direction": "inbound", "protocol": "tcp", "ports": [1, "5-9"], "podSelector": {"matchLabels": {"app": "api"}}}]}}"#;
        cluster.policies.apply(
            "good".into(),
            Some(policy(
                crate::config::policy_rules(json, crate::config::PolicyScope::Cluster).map_err(|_| refusal()),
            )),
        );
        cluster.policies.apply("bad".into(), Some(policy(Err(refusal()))));
        here.save(|| &cluster).unwrap();
        assert_eq!(here.load(), Some(cluster));
        assert_eq!(saved("b2", Kubernetes::default()).load(), None);
        let other = Kubernetes { context: Some("other".into()), ..Kubernetes::default() };
        assert_eq!(saved("b", other).load(), None);
        std::fs::write(folder.path().join("kubernetes.json"), "{").unwrap();
        assert_eq!(here.load(), None);
    }

    #[test]
    fn a_shared_cluster_is_written_as_one_that_nothing_else_uses() {
        let mut cluster = Cluster::default();
        let node = Node { addresses: ["192.168.31.17".parse().unwrap()].into(), networks: [].into() };
        for name in ["a", "b", "c"] {
            cluster.nodes.apply(name.into(), Some(node.clone()));
            cluster.cilium.apply(name.into(), Some(node.clone()));
            cluster.namespaces.apply(name.into(), Some([(Box::from("key"), Box::from(name))].into()));
        }
        for table in 0..5 {
            let mut cluster = cluster.clone();
            match table {
                0 => cluster.pods.absent(),
                1 => cluster.remote_pods.absent(),
                2 => cluster.policies.absent() && cluster.namespace_policies.absent(),
                3 => cluster.blocks.absent() && cluster.nodes.complete(),
                _ => cluster.affinities.absent(),
            };
            let alone = serde_json::to_value(&cluster).unwrap();
            assert_eq!(serde_json::to_value(Shared(|| &cluster)).unwrap(), alone);
        }
    }
}
