//! Combines the configuration file and the cluster: a configuration as if all of it stood in the file. Pure.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::IpAddr;

use ipnet::IpNet;

use super::budgets::Budgets;
use super::cluster::{Cluster, namespace_of};
use super::networks::{self, Origin};
use super::policy_sets::PolicySets;
use super::quarantine::Quarantine;
use super::resources::{NAMESPACE_POLICIES_OFF, ObservedPolicy, RefusedPolicy};
use super::selector::{self, Reach};
use crate::config::{
    Config, Engine, FollowedPods, HostOrNetwork, Network, PodNetworks, Role, Rule, RuleName,
    family_without_external,
};
use crate::iptables::{self, render, ruleset::Family};
use crate::model::{Action, Direction, Protocol};
use crate::policy::budget::{self, Cost};
use crate::routes::{DesiredRoute, SourceKind};

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Planned {
    /// The configuration file with the additions of the cluster. No rule in it selects by labels any more.
    pub(crate) config: Config,
    /// The routes to pods.
    pub(crate) routes: Vec<DesiredRoute>,
    /// Who says which pod networks a node has.
    pub(crate) origin: Origin,
    /// The pods of this node that take part in the transparent port pool.
    pub(crate) pool_pods: BTreeSet<String>,
    /// The policies that are in it.
    pub(crate) policies: Vec<ObservedPolicy>,
    /// The policies that are not, although they exist.
    pub(crate) refused: Vec<RefusedPolicy>,
    /// Whether everything had been listed once when this was planned: until then nothing is withdrawn because it is not known.
    pub(crate) synced: bool,
    /// The sets of policies that exist.
    pub(crate) sets: PolicySets,
    /// Objects that cannot be followed, with the reason.
    pub(crate) remarks: Vec<String>,
}

#[cfg(any(test, fuzzing))]
/// Adds the cluster to the configuration file. `node` is the name of this node; LAN hosts have none.
pub(crate) fn plan(file: &Config, cluster: &Cluster, node: Option<&str>) -> Planned {
    plan_with(file, cluster, node, &mut Budgets::default(), &Quarantine::default())
}

/// As [`plan`], without the policies in quarantine, and with the budgets of earlier plans.
pub(super) fn plan_with(
    file: &Config,
    cluster: &Cluster,
    node: Option<&str>,
    budgets: &mut Budgets,
    quarantine: &Quarantine,
) -> Planned {
    let wanted = file.kubernetes.as_ref().map_or(PodNetworks::Auto, |section| section.pod_networks);
    let origin = networks::origin(wanted, cluster);
    let mut planned = Planned {
        config: file.clone(),
        routes: Vec::new(),
        origin,
        pool_pods: cluster
            .pods
            .iter()
            .filter_map(|(_, pod)| Some(pod.pool_uid.as_ref()?.to_string()))
            .collect(),
        policies: Vec::new(),
        refused: Vec::new(),
        synced: false,
        sets: PolicySets::default(),
        remarks: Vec::new(),
    };
    if file.routes.is_some() {
        let own = node.filter(|_| file.role == Role::Node);
        planned.routes = networks::description(origin, cluster, own).routes_of(SourceKind::Kubernetes);
    }
    planned.leave_pods_out(cluster, node);
    planned.add_networks(cluster);
    if file.role == Role::Node {
        planned.add_rules(cluster, node, budgets, quarantine);
    }
    let namespaces = file.kubernetes.as_ref().is_some_and(|section| section.namespace_policies);
    planned.sets = PolicySets::new(cluster, namespaces, &planned.refused);
    planned
}

/// Rules with the pods of every node.
struct RemoteRules {
    /// Those of the file.
    file: Vec<Rule>,
    /// Those of each policy; `None`: it selects no pods, or its namespace is closed.
    policies: Vec<Option<Vec<Rule>>>,
    /// Namespaces whose policies exceed a limit with the pods of every node, and why.
    closed: BTreeMap<String, String>,
}

/// A policy that this node enforces.
struct AcceptedPolicy {
    policy: ObservedPolicy,
    /// As written, inside the external networks of this node; none, if they select no pods.
    unresolved: Vec<Rule>,
    /// With the pods of this node in place of selectors.
    rules: Vec<Rule>,
    /// Of `rules`.
    cost: Cost,
}

/// Remarks of one kind; more are not made.
const REMARKS: usize = 10;

impl Planned {
    /// Leaves pods out of an external network that contains the pods of this very node, such as 10.0.0.0/8: an address is a
    /// pod or a LAN host. A network elsewhere that claims addresses of the LAN gets none.
    fn leave_pods_out(&mut self, cluster: &Cluster, node: Option<&str>) {
        let networks = networks::by_node(self.origin, cluster);
        let addresses = cluster.pods.iter().flat_map(|(_, pod)| &pod.addresses).map(|address| host(*address));
        let own: Vec<IpNet> = node
            .and_then(|node| networks.get(node))
            .into_iter()
            .flatten()
            .copied()
            .chain(addresses)
            .collect();
        let contains = |outer: &IpNet, net: &IpNet| outer.contains(net) && outer != net;
        let pods: Vec<IpNet> = networks.values().flatten().chain(&own).copied().collect();
        let mut external = Vec::new();
        for network in self.config.networks.external_nets() {
            if !own.iter().any(|own| contains(&network, own)) {
                external.push(network);
                continue;
            }
            let inside: Vec<IpNet> =
                IpNet::aggregate(&pods.iter().filter(|pod| contains(&network, pod)).copied().collect());
            self.remarks.push(format!(
                "{network} of `networks.external` contains {} pod networks of the cluster, such as {}: their addresses are \
                 pods, and not external",
                inside.len(),
                inside[0]
            ));
            external.extend(without(network, &inside));
        }
        self.config.networks.external = external.into_iter().map(Network::from).collect();
    }

    /// Pods of the cluster become pods here, and nodes nodes.
    fn add_networks(&mut self, cluster: &Cluster) {
        let external = self.config.networks.external_nets();
        let mut pods: Vec<IpNet> = networks::by_node(self.origin, cluster).into_values().flatten().collect();
        // Addresses outside every network are judged all the same: a pod of this very node.
        let own = cluster.pods.iter().flat_map(|(_, pod)| &pod.addresses).map(|address| host(*address));
        pods = IpNet::aggregate(&pods);
        pods.sort_unstable();
        let uncovered: Vec<IpNet> = own.filter(|own| !covered(own, &pods)).collect();
        pods.extend(uncovered);
        let before = self.config.networks.pod_nets();
        let mut conflicts = 0;
        pods.retain(|network| {
            let conflict = external.iter().find(|external| overlap(external, network));
            if let Some(external) = conflict {
                conflicts += 1;
                if conflicts <= REMARKS {
                    self.remarks.push(format!(
                        "{network} is a pod network of the cluster and overlaps {external} of `networks.external`: it is not \
                         judged; write external networks that hold no pods"
                    ));
                }
            }
            conflict.is_none() && !before.iter().any(|known| known.contains(network))
        });
        self.config.networks.pods.extend(pods.into_iter().map(Network::from));
        let family = family_without_external(&self.config.networks.pod_nets(), &external);
        if let Some(family) = family.filter(|_| !external.is_empty()) {
            self.remarks.push(format!(
                "pods of the cluster have {family} networks and `networks.external` names none, so no rule covers {family}; \
                 add the {family} networks of the LAN"
            ));
        }
        // Only where they would be taken for LAN hosts or pods do nodes have to be named.
        let addresses =
            cluster.nodes.iter().flat_map(|(_, node)| &node.addresses).map(|address| host(*address));
        let mut judged = IpNet::aggregate(&[external, self.config.networks.pod_nets()].concat());
        judged.sort_unstable();
        let nodes = IpNet::aggregate(&addresses.filter(|address| covered(address, &judged)).collect());
        self.config.networks.nodes.extend(nodes.into_iter().map(HostOrNetwork::from));
    }

    /// Labels become addresses; policies become rules behind those of the file.
    fn add_rules(
        &mut self,
        cluster: &Cluster,
        node: Option<&str>,
        budgets: &mut Budgets,
        quarantine: &Quarantine,
    ) {
        let wanted = self.config.kubernetes.as_ref().map(|section| section.pods).unwrap_or_default();
        let file = self.config.rules.clone();
        for rule in &mut self.config.rules {
            resolve(rule, cluster, Reach::Own, None);
        }
        let mut accepted = self.accept(cluster, budgets, quarantine);
        budgets.retain(cluster);
        let remote = match wanted {
            FollowedPods::Own => Err("`kubernetes.pods` is `own`".to_owned()),
            FollowedPods::All if !cluster.remote_pods.is_known() => Err("they are not known yet".to_owned()),
            FollowedPods::All => self.with_remote_pods(&file, &accepted, cluster, budgets),
        };
        let denied = match remote {
            Ok(RemoteRules { file, policies, closed }) => {
                self.config.rules = file;
                for (accepted, rules) in accepted.iter_mut().zip(policies) {
                    if let Some(rules) = rules {
                        accepted.rules = rules;
                    }
                }
                Ok(closed)
            }
            Err(reason) => Err(reason),
        };
        for accepted in accepted {
            self.config.rules.extend(accepted.rules);
            self.policies.push(accepted.policy);
        }
        match denied {
            Ok(closed) => self.deny_remote_pods_of(&closed, cluster),
            Err(reason) => self.deny_remote_pods(cluster, node, &reason),
        }
        self.refused.sort_by(|a, b| a.name.cmp(&b.name));
    }

    /// Returns the policies that are valid and within the limits, their selectors resolved among the pods of this node: pods of
    /// other nodes keep no policy of this node from being accepted.
    fn accept(
        &mut self,
        cluster: &Cluster,
        budgets: &mut Budgets,
        quarantine: &Quarantine,
    ) -> Vec<AcceptedPolicy> {
        let external = self.config.networks.external_nets();
        let pods = self.config.networks.pod_nets();
        let mut names: HashSet<String> =
            self.config.rules.iter().map(|rule| rule.name.as_str().to_owned()).collect();
        let surroundings = budgets.surroundings(&external, &pods, cluster);
        let mut outside = Vec::new();
        let mut candidates = Vec::new();
        let allowed = self.config.kubernetes.as_ref().is_some_and(|section| section.namespace_policies);
        for (policy, content) in cluster.all_policies() {
            let namespace = namespace_of(policy);
            if namespace.is_some() && !allowed {
                self.refused.push(RefusedPolicy::new(policy, content.generation, NAMESPACE_POLICIES_OFF));
                continue;
            }
            let rules = match &content.rules {
                Ok(rules) => rules,
                Err(refusal) => {
                    self.refused.push(RefusedPolicy::new(policy, content.generation, &refusal.message));
                    continue;
                }
            };
            if let Some(reason) = quarantine.reason(policy, &content.revision()) {
                self.refused.push(RefusedPolicy::new(policy, content.generation, reason));
                continue;
            }
            let observed = ObservedPolicy {
                name: policy.to_owned(),
                observed_generation: content.generation,
                uid: content.uid.clone(),
            };
            let selects = namespace.is_some() || rules.iter().any(Rule::selects);
            let from = (content.stamp, surroundings[usize::from(selects)]);
            let known = budgets.of(policy, from).cloned();
            if let Some(Err(exceeded)) = &known {
                self.refuse(&observed, exceeded);
                continue;
            }
            let mut unresolved = Vec::with_capacity(if selects { rules.len() } else { 0 });
            let mut resolved = Vec::with_capacity(rules.len());
            let mut nowhere = Vec::new();
            for rule in rules {
                let mut rule = rule.clone();
                let name = unique(&format!("{}.{}", policy.replace('/', "."), rule.name), &mut names);
                rule.name = name;
                // Other nodes may have networks that this node does not judge.
                let mut note = |list: &mut Option<Vec<Network>>, scope: &[IpNet], key: &'static str| {
                    let named = list.as_ref().is_some_and(|list| !list.is_empty());
                    restrict(list, scope);
                    if named && list.as_ref().is_some_and(Vec::is_empty) {
                        nowhere.push((rule.name.clone(), key));
                    }
                };
                note(&mut rule.external, &external, "external");
                if !rule.selects() {
                    note(&mut rule.pods, &pods, "pods");
                }
                if selects {
                    unresolved.push(rule.clone());
                }
                resolve(&mut rule, cluster, Reach::Own, namespace);
                restrict(&mut rule.pods, &pods);
                resolved.push(rule);
            }
            let outcome = known.unwrap_or_else(|| budgets.check(policy, Reach::Own, &resolved, Some(from)));
            match outcome {
                Ok(cost) => {
                    outside.append(&mut nowhere);
                    candidates.push(AcceptedPolicy { policy: observed, unresolved, rules: resolved, cost });
                }
                Err(exceeded) => {
                    // Its names are free for others.
                    for rule in &resolved {
                        names.remove(rule.name.as_str());
                    }
                    self.refuse(&observed, &exceeded);
                }
            }
        }
        self.remarks.extend(outside.iter().take(REMARKS).map(|(rule, key)| {
            format!("rule {rule} matches nothing here: its `{key}` is outside `networks.{key}` of this node")
        }));
        let costs: Vec<(Option<&str>, Cost)> = candidates
            .iter()
            .map(|candidate| (namespace_of(&candidate.policy.name), candidate.cost))
            .collect();
        let chosen = shared_limits(&self.config).choose_by_namespace(&costs);
        let mut accepted = Vec::with_capacity(candidates.len());
        for (candidate, chosen) in candidates.into_iter().zip(chosen) {
            match chosen {
                Ok(()) => accepted.push(candidate),
                Err(exceeded) => self.refuse(&candidate.policy, &exceeded),
            }
        }
        accepted
    }

    fn refuse(&mut self, policy: &ObservedPolicy, exceeded: &budget::Exceeded) {
        let reason = exceeded.to_string();
        self.refused.push(RefusedPolicy::new(&policy.name, policy.observed_generation, &reason));
    }

    /// Returns the rules of the file and of the accepted policies with the pods of every node, or why that is too much. All of
    /// them or none: a rule that denies must not be missing where one that allows is there. The policies of a namespace are
    /// about its pods alone, so that they close no other's.
    fn with_remote_pods(
        &self,
        file: &[Rule],
        accepted: &[AcceptedPolicy],
        cluster: &Cluster,
        budgets: &mut Budgets,
    ) -> Result<RemoteRules, String> {
        let pods = self.config.networks.pod_nets();
        let mut rules = file.to_vec();
        for rule in &mut rules {
            resolve(rule, cluster, Reach::All, None);
        }
        let limits = shared_limits(&Config { rules: rules.clone(), ..self.config.clone() });
        let mut costs = Vec::with_capacity(accepted.len());
        let mut with_remote = Vec::with_capacity(accepted.len());
        let mut closed = BTreeMap::new();
        for accepted in accepted {
            let namespace = namespace_of(&accepted.policy.name);
            if accepted.unresolved.is_empty() {
                costs.push((namespace, accepted.cost));
                with_remote.push(None);
                continue;
            }
            let mut resolved = accepted.unresolved.clone();
            for rule in &mut resolved {
                resolve(rule, cluster, Reach::All, namespace);
                restrict(&mut rule.pods, &pods);
            }
            match budgets.check(&accepted.policy.name, Reach::All, &resolved, None) {
                Ok(cost) => {
                    costs.push((namespace, cost));
                    with_remote.push(Some(resolved));
                }
                Err(exceeded) => {
                    let reason = format!("policy {}: {exceeded}", accepted.policy.name);
                    closed.insert(namespace.ok_or_else(|| reason.clone())?.to_owned(), reason);
                    costs.push((namespace, accepted.cost));
                    with_remote.push(None);
                }
            }
        }
        if limits.lines == 0 && !file.is_empty() {
            return Err(
                "the rules of the configuration file need too many iptables rules with them".to_owned()
            );
        }
        loop {
            for (index, accepted) in accepted.iter().enumerate() {
                if costs[index].0.is_some_and(|namespace| closed.contains_key(namespace)) {
                    (costs[index].1, with_remote[index]) = (accepted.cost, None);
                }
            }
            let chosen = limits.choose_by_namespace(&costs).into_iter().zip(accepted);
            let mut exceeded = chosen.filter_map(|(chosen, one)| Some((chosen.err()?, &one.policy.name)));
            let Some((exceeded, policy)) = exceeded.next() else {
                return Ok(RemoteRules { file: rules, policies: with_remote, closed });
            };
            let namespace = namespace_of(policy).filter(|namespace| !closed.contains_key(*namespace));
            let Some(namespace) = namespace else { return Err(exceeded.to_string()) };
            closed.insert(namespace.to_owned(), format!("policy {policy}: {exceeded}"));
        }
    }

    /// As [`Self::deny_remote_pods`], for the pods of some namespaces.
    fn deny_remote_pods_of(&mut self, closed: &BTreeMap<String, String>, cluster: &Cluster) {
        let remote = cluster.remote_pods.iter().filter(|(_, pod)| closed.contains_key(&*pod.namespace));
        let mut judged = IpNet::aggregate(&self.config.networks.pod_nets());
        judged.sort_unstable();
        let addresses = remote.flat_map(|(_, pod)| &pod.addresses).map(|address| host(*address));
        let addresses: Vec<IpNet> = addresses.filter(|address| covered(address, &judged)).collect();
        for (namespace, reason) in closed.iter().take(REMARKS) {
            self.remarks.push(format!(
                "LAN hosts reach pods of namespace {namespace} on other nodes by their own nodes only, not through a NodePort or \
                 Service of this one: {reason}"
            ));
        }
        self.deny(&addresses);
    }

    /// Denies connections that this node translates to pods of other nodes: the rules cannot distinguish such pods, and their
    /// own node sees this node as the peer.
    fn deny_remote_pods(&mut self, cluster: &Cluster, node: Option<&str>, reason: &str) {
        let own: Vec<IpNet> =
            cluster.pods.iter().flat_map(|(_, pod)| &pod.addresses).map(|address| host(*address)).collect();
        let judged = self.config.networks.pod_nets();
        let others: Vec<IpNet> = networks::by_node(self.origin, cluster)
            .into_iter()
            .filter(|(name, _)| Some(*name) != node)
            .flat_map(|(_, networks)| networks)
            .filter(|network| judged.iter().any(|judged| judged.contains(network)))
            .flat_map(|network| without(network, &own))
            .collect();
        if others.is_empty() || self.config.rules.is_empty() {
            return;
        }
        self.deny(&others);
        self.remarks.push(format!(
            "LAN hosts reach pods of other nodes by their own nodes only, not through a NodePort or Service of this one: {reason}"
        ));
    }

    /// Denies everything from LAN hosts to pods.
    fn deny(&mut self, pods: &[IpNet]) {
        if pods.is_empty() {
            return;
        }
        let mut names = self.config.rules.iter().map(|rule| rule.name.as_str().to_owned()).collect();
        let deny = Rule {
            name: unique("pods-of-other-nodes", &mut names),
            direction: Direction::Inbound,
            external: None,
            pods: Some(IpNet::aggregate(&pods.to_vec()).into_iter().map(Network::from).collect()),
            pod_selector: None,
            namespace_selector: None,
            protocol: Protocol::Any,
            ports: None,
            source_ports: None,
            action: Action::Deny,
            mode: None,
        };
        self.config.rules.insert(0, deny);
    }
}

/// The limits of all policies together: the file comes first.
fn shared_limits(config: &Config) -> budget::Shared {
    // Elements of nftables are fewer than the rules of iptables, but for lists of single ports.
    if config.enforcement.engines.iter().all(|engine| *engine == Engine::Ebpf) {
        return budget::Shared::EBPF;
    }
    let policy = config.policy();
    let file = Family::ALL.map(|family| render::line_count(&policy, family)).into_iter().max();
    let left = iptables::MAX_LINES.saturating_sub(file.unwrap_or_default()) as u64;
    budget::Shared { lines: left.min(budget::Shared::LINES), ..budget::Shared::EBPF }
}

fn host(address: IpAddr) -> IpNet {
    address.into()
}

fn overlap(a: &IpNet, b: &IpNet) -> bool {
    a.contains(b) || b.contains(a)
}

/// Returns the networks that cover `network` but for `holes`.
fn without(network: IpNet, holes: &[IpNet]) -> Vec<IpNet> {
    let holes: Vec<IpNet> = holes.iter().filter(|hole| overlap(hole, &network)).copied().collect();
    if holes.is_empty() {
        return vec![network];
    }
    if holes.iter().any(|hole| hole.contains(&network)) {
        return Vec::new();
    }
    let halves = network.subnets(network.prefix_len() + 1).into_iter().flatten();
    halves.flat_map(|half| without(half, &holes)).collect()
}

/// Whether one of disjoint, sorted networks contains `net`.
fn covered(net: &IpNet, sorted: &[IpNet]) -> bool {
    let after = sorted.partition_point(|outer| outer <= net);
    after > 0 && sorted[after - 1].contains(net)
}

/// The pods that a rule selects take the place of its selectors; none, if none is known: it matches nothing then. A rule of a
/// namespace selects among its pods.
fn resolve(rule: &mut Rule, cluster: &Cluster, reach: Reach, namespace: Option<&str>) {
    if namespace.is_none() && !rule.selects() {
        return;
    }
    let addresses = selector::pods(rule, cluster, reach, namespace).flat_map(|pod| &pod.addresses);
    let mut pods: Vec<Network> = addresses.map(|address| host(*address).into()).collect();
    pods.sort_unstable();
    pods.dedup();
    (rule.pods, rule.pod_selector, rule.namespace_selector) = (Some(pods), None, None);
}

/// Reduces `list` to the networks inside `scope`.
fn restrict(list: &mut Option<Vec<Network>>, scope: &[IpNet]) {
    let Some(networks) = list else { return };
    let mut inside: Vec<Network> = Vec::with_capacity(networks.len());
    for network in networks.iter().map(|network| network.net()) {
        for scope in scope {
            if scope.contains(&network) {
                inside.push(network.into());
            } else if network.contains(scope) {
                inside.push((*scope).into());
            }
        }
    }
    inside.sort_unstable();
    inside.dedup();
    *networks = inside;
}

/// Maximum length of a rule's name, in bytes.
const LONGEST: usize = 63;

/// Returns `wanted`, or where it is too long or taken, its beginning and a number that distinguishes it.
fn unique(wanted: &str, names: &mut HashSet<String>) -> RuleName {
    let mut name = wanted.to_owned();
    let mut salt = 0_u32;
    while name.len() > LONGEST || names.contains(&name) {
        let mut hasher = DefaultHasher::new();
        (wanted, salt).hash(&mut hasher);
        salt += 1;
        let number = format!(".{:08x}", hasher.finish() & 0xffff_ffff);
        name = format!("{}{number}", &wanted[..wanted.len().min(LONGEST - number.len())]);
    }
    names.insert(name.clone());
    RuleName::new(&name).expect("names of policies and rules have letters, digits, `.`, `_` and `-` only")
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
