//! `cluster.yaml`: a description of the cluster, watched.
//!
//! ```yaml
//! nodes:
//!   - name: node-1
//!     addresses: [192.168.31.17, "fd31::17"]     # first of a family: next hop; others of it: backups
//!     podNetworks: [10.200.1.0/24, "fd00:200:1::/64"]
//!   - {name: node-2, addresses: [192.168.31.18], podNetworks: [10.200.2.0/24], ready: false}   # withdrawn
//! pods:
//!   - {address: 10.200.9.91, node: node-1}       # outside its node's networks
//! ```
//!
//! A file that cannot be read or understood changes nothing: the routes of the last good one stay.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize, de::Error as _};
use thiserror::Error;

use super::{Publisher, Source, SourceError};
use crate::config::{Network, leaf::Leaf, special};
use crate::kernel::file_watch::FileWatch;
use crate::kernel::files::{MAX_CONFIGURATION, read_regular};
use crate::routes::model::{DesiredRoute, NextHop, SourceKind, Target};
use crate::routes::prefix_map::host;

/// The whole file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct ClusterFile {
    /// The nodes that forward to pods.
    #[serde(default)]
    pub nodes: Vec<Node>,
    /// Single pods outside the networks of their node.
    #[serde(default)]
    pub pods: Vec<Pod>,
}

/// A cluster node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Node {
    /// Unique.
    pub name: String,
    /// Its addresses on the LAN, preferred first.
    #[serde(deserialize_with = "leaves::<_, IpAddr, _>")]
    pub addresses: Vec<IpAddr>,
    /// The networks of its pods.
    #[serde(default, deserialize_with = "leaves::<_, Network, _>")]
    pub pod_networks: Vec<IpNet>,
    /// A node that is not ready has no routes.
    #[serde(default = "yes")]
    pub ready: bool,
}

/// A single pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Pod {
    #[serde(deserialize_with = "leaf")]
    pub address: IpAddr,
    /// The name of its node.
    pub node: String,
}

const fn yes() -> bool {
    true
}

/// Reads a value as the configuration file has it.
fn leaf<'de, D: Deserializer<'de>, T: Leaf>(deserializer: D) -> Result<T, D::Error> {
    T::parse(&String::deserialize(deserializer)?).map_err(D::Error::custom)
}

/// Reads a list of such values.
fn leaves<'de, D: Deserializer<'de>, T: Leaf + Into<U>, U>(deserializer: D) -> Result<Vec<U>, D::Error> {
    let texts = Vec::<String>::deserialize(deserializer)?;
    let parse = |text: &String| T::parse(text).map(Into::into).map_err(D::Error::custom);
    texts.iter().map(parse).collect()
}

/// Refuses an address that no host has.
fn check_host(address: IpAddr) -> Result<(), String> {
    match special::no_hosts(&host(address)) {
        Some(problem) if !matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local()) => {
            Err(problem.to_string())
        }
        _ => Ok(()),
    }
}

/// What is wrong with `cluster.yaml`.
#[derive(Debug, Error)]
pub enum FileError {
    /// It cannot be read.
    #[error("{}: {error}; create it, or take `routes.file` out of the configuration", path.display())]
    Read {
        path: PathBuf,
        #[source]
        error: std::io::Error,
    },
    /// It is not YAML, or not of this form.
    #[error("{}: {text}; write lists `nodes` and `pods` as docs/routes.md has them", path.display())]
    Syntax {
        path: PathBuf,
        /// Place and reason.
        text: String,
    },
    /// It contradicts itself.
    #[error("{}: {text}", path.display())]
    Content {
        path: PathBuf,
        /// What, and what to write instead.
        text: String,
    },
}

impl FileError {
    /// Returns whether the file does not exist.
    #[must_use]
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::Read { error, .. } if error.kind() == std::io::ErrorKind::NotFound)
    }
}

impl ClusterFile {
    /// Reads and checks a file.
    pub fn read(path: &Path) -> Result<Self, FileError> {
        let text = read_regular(path, MAX_CONFIGURATION)
            .map_err(|error| FileError::Read { path: path.into(), error })?;
        Self::parse(&String::from_utf8_lossy(&text), path)
    }

    /// Checks the text of a file; `path` is what messages call it.
    ///
    /// # Errors
    /// As [`ClusterFile::read`].
    pub fn parse(text: &str, path: &Path) -> Result<Self, FileError> {
        // The first line has place and reason; the others show the text.
        let one_line = |error: serde_saphyr::Error| {
            let text = error.to_string();
            text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned()
        };
        let file: Self = serde_saphyr::from_str(text)
            .map_err(|error| FileError::Syntax { path: path.into(), text: one_line(error) })?;
        file.check().map_err(|text| FileError::Content { path: path.into(), text })?;
        Ok(file)
    }

    fn check(&self) -> Result<(), String> {
        let mut owners = BTreeMap::new();
        let mut names = BTreeSet::new();
        for node in &self.nodes {
            let name = &node.name;
            if !names.insert(name.as_str()) {
                return Err(format!(
                    "node {name} is written twice; write one entry with all its podNetworks"
                ));
            }
            if name.trim() != name || name.is_empty() {
                return Err(format!("{name:?} is no name; write one without spaces at its ends"));
            }
            node.addresses.iter().try_for_each(|address| check_host(*address))?;
            if node.addresses.is_empty() {
                return Err(format!("node {name} has no addresses; write its addresses on the LAN"));
            }
            for net in &node.pod_networks {
                if net.prefix_len() == 0 || special::never_routed(net).is_some() {
                    return Err(format!("node {name}: {net} is no network of pods; write its own networks"));
                }
                if let Some(other) = owners.insert(*net, name) {
                    return Err(format!(
                        "{net} is a pod network of both {other} and {name}; write it at the node that has it"
                    ));
                }
                if node.next_hops(*net).is_empty() {
                    return Err(format!(
                        "node {name}: {net} is IPv6, and the node has no IPv6 address; add one to addresses"
                    ));
                }
            }
        }
        let nodes = self.nodes_by_name();
        for pod in &self.pods {
            check_host(pod.address)?;
            let node = nodes.get(pod.node.as_str());
            let node = node.ok_or_else(|| {
                format!("pod {} is on node {}, which is not among the nodes", pod.address, pod.node)
            })?;
            if node.next_hops(host(pod.address)).is_empty() {
                return Err(format!(
                    "pod {}: node {} has no IPv6 address; add one to addresses",
                    pod.address, node.name
                ));
            }
        }
        Ok(())
    }

    fn nodes_by_name(&self) -> BTreeMap<&str, &Node> {
        self.nodes.iter().map(|node| (node.name.as_str(), node)).collect()
    }

    /// The routes the file describes.
    #[must_use]
    pub fn routes(&self) -> Vec<DesiredRoute> {
        self.routes_of(SourceKind::File)
    }

    /// The routes of this description, which `source` has given. What no address of its node can carry is left out.
    #[must_use]
    pub fn routes_of(&self, source: SourceKind) -> Vec<DesiredRoute> {
        let segments = self
            .nodes
            .iter()
            .filter(|node| node.ready)
            .flat_map(|node| node.pod_networks.iter().filter_map(|net| node.route(*net, source)));
        let nodes = self.nodes_by_name();
        let pods = self.pods.iter().filter_map(|pod| {
            let node = nodes.get(pod.node.as_str()).filter(|node| node.ready)?;
            node.route(host(pod.address), source)
        });
        segments.chain(pods).collect()
    }
}

impl Node {
    /// The addresses that can carry `net`: those of its own family, or IPv6 for IPv4 if there is nothing else.
    fn next_hops(&self, net: IpNet) -> Vec<NextHop> {
        let of = |v4: bool| {
            self.addresses.iter().filter(move |address| address.is_ipv4() == v4).copied().map(NextHop::new)
        };
        let same: Vec<_> = of(matches!(net, IpNet::V4(_))).collect();
        if same.is_empty() && matches!(net, IpNet::V4(_)) { of(false).collect() } else { same }
    }

    fn route(&self, to: IpNet, source: SourceKind) -> Option<DesiredRoute> {
        let mut via = self.next_hops(to);
        if via.is_empty() {
            return None;
        }
        let backup = via.split_off(via.len().min(1));
        let target = Target::Forward { via, backup };
        Some(DesiredRoute { to, target, metric: None, table: None, source, origin: self.name.clone() })
    }
}

/// Publishes the routes of a file each time it changes.
#[derive(Debug)]
pub struct FileSource {
    path: PathBuf,
}

impl FileSource {
    /// Does not touch the file yet.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    async fn watch(self, publisher: Publisher) -> Result<(), SourceError> {
        let failed = |error: std::io::Error| SourceError {
            kind: SourceKind::File,
            reason: format!(
                "{} cannot be watched: {error}; see fs.inotify.max_user_instances",
                self.path.display()
            ),
        };
        let mut watch = FileWatch::open(&self.path).map_err(failed)?;
        publish(ClusterFile::read(&self.path), &publisher);
        loop {
            let file = match watch.changed().await {
                Ok(content) => ClusterFile::parse(&String::from_utf8_lossy(&content), &self.path),
                Err(error) => Err(FileError::Read { path: self.path.clone(), error }),
            };
            publish(file, &publisher);
        }
    }
}

fn publish(file: Result<ClusterFile, FileError>, publisher: &Publisher) {
    match file {
        Ok(file) => _ = publisher.publish(file.routes()),
        Err(error) => {
            tracing::warn!(%error, "cluster.yaml is not used; the routes of the last good file stay")
        }
    }
}

impl Source for FileSource {
    fn kind(&self) -> SourceKind {
        SourceKind::File
    }

    fn run(
        self: Box<Self>,
        publisher: Publisher,
    ) -> Pin<Box<dyn Future<Output = Result<(), SourceError>> + Send>> {
        Box::pin(self.watch(publisher))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(yaml: &str) -> Result<String, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), yaml).unwrap();
        let cluster = ClusterFile::read(file.path()).map_err(|error| error.to_string())?;
        Ok(cluster.routes().iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))
    }

    #[test]
    fn nodes_and_pods_become_routes() {
        let yaml = r#"
nodes:
  - name: node-1
    addresses: [192.168.31.17, "fd31::17", 192.168.32.17]
    podNetworks: [10.200.1.0/24, "fd00:200:1::/64"]
  - {name: node-2, addresses: [192.168.31.18], podNetworks: [10.200.2.0/24], ready: false}
  - {name: node-3, addresses: ["fd31::19"], podNetworks: [10.200.3.0/24]}
pods:
  - {address: 10.200.9.91, node: node-1}
  - {address: 10.200.9.92, node: node-2}
"#;
        insta::assert_snapshot!(read(yaml).unwrap(), @r"
        10.200.1.0/24 via 192.168.31.17 backup 192.168.32.17 (file node-1)
        fd00:200:1::/64 via fd31::17 (file node-1)
        10.200.3.0/24 via fd31::19 (file node-3)
        10.200.9.91/32 via 192.168.31.17 backup 192.168.32.17 (file node-1)
        ");
    }

    #[test]
    fn what_contradicts_itself_is_refused_with_what_to_write() {
        for (yaml, text) in [
            ("nodes: [{name: a, addresses: [], podNetworks: []}]", "no addresses"),
            (
                "nodes: [{name: a, addresses: [192.0.2.1]}, {name: a, addresses: [192.0.2.2]}]",
                "written twice",
            ),
            ("nodes: [{name: a, addresses: [192.0.2.1], podNetworks: [10.1.0.1/24]}]", "write 10.1.0.0/24"),
            (
                "nodes: [{name: a, addresses: [192.0.2.1], podNetworks: [10.1.0.0/24]}, {name: b, addresses: [192.0.2.2], podNetworks: [10.1.0.0/24]}]",
                "of both a and b",
            ),
            ("nodes: [{name: a, addresses: [192.0.2.1], podNetworks: ['fd00::/64']}]", "no IPv6 address"),
            ("pods: [{address: 10.1.0.1, node: x}]", "not among the nodes"),
            ("nodes: [{name: a, addresses: [192.0.2.1], cidr: 10.1.0.0/24}]", "cidr"),
            ("nodes: {", "line"),
        ] {
            let error = read(yaml).unwrap_err();
            assert!(error.contains(text), "{yaml}: {error}");
        }
    }
}
