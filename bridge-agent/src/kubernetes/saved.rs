//! The cluster as last known, for a start while its API server is away: enforcement must not become less by it. It is in the
//! state directory and survives a reboot, so that a node that boots without the API server is closed from the start.

use std::io::{self, BufReader};
use std::ops::Deref;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::cluster::Cluster;
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
struct Out<'a> {
    node: &'a str,
    section: &'a Kubernetes,
    cluster: &'a Cluster,
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

    /// In one step: a reader never finds half of it. `cluster` is locked while it is written, and not while the disk is waited
    /// for.
    pub(super) fn save<C: Deref<Target = Cluster>>(&self, cluster: impl FnOnce() -> C) -> io::Result<()> {
        files::replace_with(&self.place, Ownership::Private, |file| {
            let cluster = cluster();
            let out = Out { node: &self.node, section: &self.section, cluster: &cluster };
            serde_json::to_writer(file, &out).map_err(io::Error::from)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::cluster::{Node, Pod, Refusal};
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
        let policy = |rules| super::super::cluster::Policy { generation: 1, rules, reported: Vec::new() };
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
}
