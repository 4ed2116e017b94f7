//! The configuration file: YAML to a validated desired state.
//!
//! Three steps, each of which goes on after a mistake so that all are reported at once: the text becomes a tree
//! that knows its places ([`yaml`], [`node`]), the tree is held against the JSON schema of [`Config`] ([`shape`]), and the
//! values are held against each other (`check` of each section).

mod api;
pub(crate) mod bounds;
mod convert;
mod effective;
mod enforcement;
mod flow;
mod interface;
mod iptables;
mod kubernetes;
pub(crate) mod labels;
pub mod leaf;
mod names;
mod network;
mod networks;
mod nftables;
pub(crate) mod node;
mod node_ports;
mod path;
mod persistence;
mod port_pool;
pub(crate) mod ports;
pub mod report;
mod resource;
mod role;
mod routes;
pub(crate) mod rules;
mod shadow;
mod shape;
pub(crate) mod special;
mod static_route;
mod syslog;
#[cfg(test)]
mod tests;
mod time_span;
pub(crate) mod yaml;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path as FilePath;
use std::sync::LazyLock;

use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use api::{Api, DEFAULT_SOCKET};
pub(crate) use convert::{Conversion, convert};
pub use enforcement::{Enforcement, Engine, Events, FastPath, Flows, Interfaces, Scope, Timeouts, Xdp};
pub use interface::{InterfaceName, InterfacePattern};
pub use iptables::{Backend, Iptables, PacketMark};
pub use kubernetes::{FollowedPods, Kubernetes, PodNetworks};
pub(crate) use kubernetes::{check_node_name, node_variable};
pub use labels::{LabelOperator, LabelRequirement, LabelSelector};
pub use leaf::AbsolutePath;
pub use network::{HostOrNetwork, Network};
pub use networks::Networks;
pub(crate) use networks::family_without_external;
pub use nftables::Nftables;
pub use node_ports::NodePorts;
pub use persistence::{Persistence, Save};
pub use port_pool::{CgroupPath, PoolScope, PortPool, Transparent};
pub use ports::{PortItem, Ports};
pub use report::{ConfigErrors, Diagnostic, Diagnostics};
pub use resource::{GROUP, PolicyScope, VERSION, check_policy};
pub(crate) use resource::{Manifests, NAMESPACE_POLICY, POLICY, is_manifest, manifests, policy_rules};
pub use role::Role;
pub use routes::{DEFAULT_METRIC, Discovery, Health, OnWithdraw, Routes, TABLE_MAIN};
pub use rules::{MAX_RULES, Rule, RuleName};
pub(crate) use shape::{inlined_schema_of as schema_of, whole_number};
pub use static_route::{DetailedVia, OneOrMany, StaticRoute, TABLE_LOCAL, Via};
pub use syslog::Syslog;
pub use time_span::TimeSpan;

use self::leaf::Problem;
use self::node::Node;
use self::report::{Findings, Path, Report, Severity};
use self::shape::Shape;
use crate::{
    kernel::{files, memory},
    model::Policy,
};

/// The largest file that is read, in bytes.
const MAX_FILE: u64 = files::MAX_CONFIGURATION;

/// The configuration of bridge-agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Config {
    /// Role of this machine: a node of the cluster, or a host of the LAN around it.
    pub role: Role,
    /// Who is a pod, who is a LAN host.
    #[serde(default)]
    pub networks: Networks,
    /// How the rules are made to hold.
    #[serde(default)]
    pub enforcement: Enforcement,
    /// Which flows may be opened between pods and LAN hosts. A flow that no rule allows is denied.
    #[serde(default)]
    pub rules: Vec<Rule>,
    /// Which NodePorts of this node the LAN may use. Left out: traffic to NodePorts is not judged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_ports: Option<NodePorts>,
    /// The source ports that clients may take. Left out: there is no pool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port_pool: Option<PortPool>,
    /// Routes to pod networks. Left out: none is wanted, and those of an earlier configuration are withdrawn.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub routes: Option<Routes>,
    /// Learns pods, nodes and rules from a cluster. Left out: nothing is asked of a cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kubernetes: Option<Kubernetes>,
    /// Names of LAN hosts and networks, for tables and events, such as `{192.168.31.67: plc-7}`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub names: BTreeMap<String, String>,
    /// State that outlives a reboot.
    #[serde(default)]
    pub persistence: Persistence,
    /// How the agent is talked to.
    #[serde(default)]
    pub api: Api,
}

/// A configuration without errors.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The configuration, defaults filled in where they do not depend on other values.
    pub config: Config,
    /// Valid, but probably not intended.
    pub warnings: Diagnostics,
}

/// Reads and checks a configuration file.
///
/// # Errors
/// All faults: description, place, and remedy.
pub fn load(path: &FilePath) -> Result<Loaded, ConfigErrors> {
    let text = read_text(path)?;
    let loaded = parse(&text, Some(path));
    drop(text);
    memory::trim();
    loaded
}

/// As [`load`], for a process that goes on: it refuses a FIFO and a device, which could block it for ever.
///
/// # Errors
/// As [`load`].
pub(crate) fn load_regular(path: &FilePath) -> Result<Loaded, ConfigErrors> {
    load_content(files::read_regular(path, MAX_FILE), path)
}

/// Checks the content of a configuration file that was read already, or could not be read.
///
/// # Errors
/// As [`load`].
pub(crate) fn load_content(content: io::Result<Vec<u8>>, path: &FilePath) -> Result<Loaded, ConfigErrors> {
    let text =
        content.and_then(text).map_err(|error| ConfigErrors::of_file(path, unreadable(path, &error)))?;
    let loaded = parse(&text, Some(path));
    drop(text);
    memory::trim();
    loaded
}

/// The text of a configuration file, which need not be valid.
///
/// # Errors
/// If it cannot be read.
pub fn read_text(path: &FilePath) -> Result<String, ConfigErrors> {
    read(path).map_err(|error| ConfigErrors::of_file(path, unreadable(path, &error)))
}

/// Checks the text of a configuration; messages call it `file`.
///
/// # Errors
/// As [`load`].
pub fn parse(text: &str, file: Option<&FilePath>) -> Result<Loaded, ConfigErrors> {
    let mut findings = Findings::default();
    let config = yaml::parse(text, &mut findings).and_then(|mut tree| config_of(&mut tree, &mut findings));
    let failed = findings.has_errors();
    let diagnostics = findings.into_diagnostics(file, Some(text));
    match config {
        Some(config) if !failed => Ok(Loaded { config, warnings: diagnostics }),
        _ => Err(ConfigErrors(diagnostics)),
    }
}

/// Identifies the JSON schema of the configuration; `deploy/bridge.schema.json` is a copy for editors.
const SCHEMA_ID: &str = "https://bridge.lan/schemas/bridge.schema.json";

/// The JSON schema of the configuration file (draft 2020-12).
#[must_use]
pub fn schema() -> serde_json::Value {
    let mut schema = shape::schema_of::<Config>(false);
    shape::remove_marks(&mut schema);
    schema["title"] = "bridge-agent configuration".into();
    schema["$id"] = SCHEMA_ID.into();
    schema
}

fn config_of(tree: &mut Node<'_>, findings: &mut Findings) -> Option<Config> {
    static SHAPE: LazyLock<Shape> = LazyLock::new(Shape::of::<Config>);
    if !SHAPE.fit(tree, &Path::Root, findings) {
        return None;
    }
    match Config::deserialize(&*tree) {
        Ok(config) => {
            config.check(&mut Report::new(tree, findings));
            Some(config)
        }
        // The schema accepts it and the types do not, so the place is unknown. The tests look for such a value.
        Err(error) => {
            let help = "compare the file with `bridge-agent check --schema`";
            findings.push(Severity::Error, &Path::Root, None, Problem::new(error.to_string(), help));
            None
        }
    }
}

impl Config {
    fn check(&self, report: &mut Report<'_>) {
        let (root, kubernetes) = (Path::Root, self.kubernetes.is_some());
        self.networks.check(&root.key("networks"), self.role, kubernetes, report);
        self.enforcement.check(&root.key("enforcement"), report);
        rules::check(&self.rules, &root.key("rules"), &self.networks, kubernetes, report);
        shadow::check(&self.rules, &root.key("rules"), report);
        if let Some(node_ports) = &self.node_ports {
            node_ports.check(&root.key("nodePorts"), report);
        }
        if let Some(pool) = &self.port_pool {
            let implied = kubernetes || !self.pool_destinations().is_empty();
            let path = root.key("portPool");
            pool.check(&path, self.node_ports.as_ref(), implied, report);
            if pool.masquerade {
                pool.check_masquerade(&path, self.role, &self.networks, report);
            }
        }
        if let Some(routes) = &self.routes {
            let pods = kubernetes || !self.networks.pods.is_empty();
            routes.check(pods, &root.key("routes"), report);
        }
        if let Some(section) = &self.kubernetes {
            section.check(&root.key("kubernetes"), report);
        }
        names::check(&self.names, &root.key("names"), report);
        self.api.check(&root.key("api"), report);
        if self.role == Role::Host {
            for (key, there) in [("rules", !self.rules.is_empty()), ("nodePorts", self.node_ports.is_some())]
            {
                if there {
                    report.error(
                        &root.key(key),
                        Problem::new(
                            format!("`{key}` is enforced on a node, and this is a host"),
                            "write `role: node`, or remove the section",
                        ),
                    );
                }
            }
        }
    }

    /// The policy that the rules come to. Rules that select pods by label match nothing in it, until the pods
    /// are filled in from the cluster.
    #[must_use]
    pub fn policy(&self) -> Policy {
        Policy {
            mode: self.enforcement.mode,
            on_deny: self.enforcement.on_deny,
            pods: self.networks.pod_nets(),
            external: self.networks.external_nets(),
            nodes: self.networks.node_nets(),
            rules: self.rules.iter().filter(|rule| !rule.is_audited()).map(Rule::to_model).collect(),
            audited: self.rules.iter().filter(|rule| rule.is_audited()).map(Rule::to_model).collect(),
            node_ports: self.node_ports.as_ref().map(NodePorts::to_model),
        }
    }

    /// Returns the networks that the port pool serves, according to the file.
    #[must_use]
    pub fn pool_destinations(&self) -> Vec<IpNet> {
        match self.port_pool.as_ref().and_then(|pool| pool.destinations.as_ref()) {
            Some(networks) => networks.iter().map(|network| network.net()).collect(),
            None if self.role == Role::Node => self.networks.external_nets(),
            None => self.networks.pod_nets(),
        }
    }
}

impl Config {
    /// Returns the pool, if there is one.
    #[must_use]
    pub fn pool_scope(&self) -> Option<PoolScope> {
        let pool = self.port_pool.as_ref()?;
        let cgroups = pool.transparent.iter().flat_map(|transparent| &transparent.cgroups);
        Some(PoolScope {
            ports: pool.available(),
            destinations: self.pool_destinations(),
            cgroups: cgroups.map(ToString::to_string).collect(),
            strict: pool.strict,
        })
    }
}

impl Loaded {
    /// See [`Config::policy`].
    #[must_use]
    pub fn policy(&self) -> Policy {
        self.config.policy()
    }
}

fn read(path: &FilePath) -> io::Result<String> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
    text(bytes)
}

fn text(content: Vec<u8>) -> io::Result<String> {
    if content.len() as u64 > MAX_FILE {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("larger than {MAX_FILE} bytes")));
    }
    String::from_utf8(content).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.utf8_error()))
}

fn unreadable(path: &FilePath, error: &io::Error) -> Problem {
    let help = match error.kind() {
        io::ErrorKind::NotFound => {
            "write the file, starting from deploy/examples, or name another one with --config FILE".into()
        }
        io::ErrorKind::PermissionDenied => format!("run as a user who may read it: ls -l {}", path.display()),
        io::ErrorKind::Unsupported => "move a regular file in its place, or a link to one".into(),
        io::ErrorKind::IsADirectory => "name a file in this directory with --config FILE".into(),
        io::ErrorKind::InvalidData => "save the file as UTF-8".into(),
        io::ErrorKind::FileTooLarge => "join rules: one rule takes several networks and port ranges".into(),
        _ => "check the file and its file system".to_owned(),
    };
    Problem::new(format!("cannot read the configuration: {error}"), help)
}
