//! Cilium as the network plugin: its real agent, operator and eBPF programs, with the configuration of bridge that is shipped.
//!
//! `cargo xtask cluster --build --cni cilium` builds it, in eight minutes; then
//! `cargo test -p bridge-tests --test cluster cilium -- --ignored --test-threads 1`.

use std::{collections::BTreeSet, net::SocketAddr, process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use aya::programs::{SchedClassifier, tc::TcAttachType};
use bridge_lab::{
    cluster::{Cluster, Cni, Node, Options, Pod},
    lab::{Family, Host, Netns},
    traffic::tcp,
    wait::eventually,
};
use serde_json::{Value, json};

use crate::{
    life::{DEADLINE, EVENT, policy, restarted, under_traffic, ways},
    play,
};

/// Ports that bridge allows: Cilium's policy allows the first of them alone.
const BOTH_ALLOW: u16 = 8090;
const CILIUM_DENIES: u16 = 8091;
/// How long a refused connection is waited for.
const SILENCE: Duration = Duration::from_millis(700);

fn options() -> Options {
    Options { cni: Cni::Cilium, ..Options::default() }
}

#[test]
#[ignore = "needs Cilium, which takes 8 minutes to build: cargo xtask cluster --build --cni cilium"]
fn cilium_with_native_routing() -> Result<()> {
    play(options())
}

/// Names of the programs at a hook of an interface, in the order in which they run, each with its id.
fn programs(netns: &Netns, interface: &str, hook: TcAttachType) -> Result<Vec<(String, u32)>> {
    let (_, programs) = netns.run(|| SchedClassifier::query_tcx(interface, hook))?;
    programs
        .iter()
        .map(|program| Ok((program.name_as_str().context("a name")?.to_owned(), program.id())))
        .collect()
}

/// The interface on the node that leads to the pod.
fn interface_of(node: &Host, pod: &Pod) -> Result<String> {
    let mut ip = Command::new("ip");
    ip.args(["--json", "link", "show", "dev", "eth0"]);
    let links: Value = serde_json::from_str(&pod.netns.output(ip)?)?;
    let index = links[0]["link_index"].as_u64().context("the index of the other end")?;
    let mut ip = Command::new("ip");
    ip.args(["--json", "link", "show"]);
    let links: Value = serde_json::from_str(&node.netns.output(ip)?)?;
    let link = links.as_array().into_iter().flatten().find(|link| link["ifindex"] == index);
    Ok(link
        .and_then(|link| link["ifname"].as_str())
        .context("the other end of the pod's interface")?
        .to_owned())
}

/// The ids of Cilium's programs at the hooks that bridge shares with it. The programs of bridge must come before them.
fn shared_hooks(node: &Host, pod: &Pod) -> Result<BTreeSet<u32>> {
    let lxc = interface_of(node, pod)?;
    let mut ciliums = BTreeSet::new();
    for (interface, hook) in [("eth0", TcAttachType::Ingress), (lxc.as_str(), TcAttachType::Ingress)] {
        let found = programs(&node.netns, interface, hook)?;
        let is_ciliums = |(name, _): &&(String, u32)| name.starts_with("cil_");
        ensure!(
            found.len() >= 2 && !is_ciliums(&&found[0]) && found.iter().any(|one| is_ciliums(&one)),
            "{interface}, {hook:?}: {found:?}"
        );
        ciliums.extend(found.iter().filter(is_ciliums).map(|(_, id)| *id));
    }
    Ok(ciliums)
}

/// Restarts Cilium's agent, and waits until its programs are attached again.
fn restart_cilium(cluster: &Cluster, node: &Node, pod: &Pod) -> Result<()> {
    let before = shared_hooks(&node.host, pod)?;
    restarted(cluster, 0, "cilium-agent")?;
    let attached = || {
        let now = shared_hooks(&node.host, pod).ok()?;
        now.is_disjoint(&before).then_some(())
    };
    eventually(EVENT, attached).with_context(|| {
        format!("other programs than {before:?}: {:?}\n{}", shared_hooks(&node.host, pod), node.logs())
    })
}

/// Removes the links of Cilium's programs, which detaches them.
fn detach_cilium(node: &Node, pod: &Pod) -> Result<()> {
    let lxc = interface_of(&node.host, pod)?;
    let mut find = node.command("find");
    find.args([
        "/sys/fs/bpf/cilium",
        "-type",
        "f",
        "-path",
        "*/links/*",
        "-name",
        "cil_*",
        "-print",
        "-delete",
    ]);
    let output = find.output()?;
    ensure!(output.status.success() && !output.stdout.is_empty(), "{output:?}");
    for interface in ["eth0", &lxc] {
        let left = programs(&node.host.netns, interface, TcAttachType::Ingress)?;
        ensure!(left.iter().all(|(name, _)| !name.starts_with("cil_")), "{interface}: {left:?}");
    }
    Ok(())
}

#[test]
#[ignore = "needs Cilium, which takes 8 minutes to build: cargo xtask cluster --build --cni cilium"]
fn cilium_restarts_under_traffic_and_bridge_stays_before_it() -> Result<()> {
    let cluster = Cluster::up(Options { nodes: 1, ..options() })?;
    cluster.install_bridge(None)?;
    let pod = cluster.make_pod("peer", 0, &json!({"app": "peer"}), &json!({}))?;
    cluster.apply_policies(&[policy(&cluster)])?;
    let ways = ways(&cluster, &pod)?;
    let reaches = || {
        let all = ways.iter().all(|way| way.is_open().unwrap_or_default());
        all.then_some(())
    };
    let node = &cluster.nodes()[0];
    for engines in [&["ebpf", "iptables"][..], &["ebpf"]] {
        cluster.set_engines(engines)?;
        eventually(EVENT, reaches).context("the policy does not reach the pod's node")?;
        let event = format!("{}: Cilium's agent restarted", engines.join(", "));
        under_traffic(&event, &ways, || restart_cilium(&cluster, node, &pod))?;
    }
    // Detached programs come back at the end, behind those of bridge.
    detach_cilium(node, &pod)?;
    restarted(&cluster, 0, "cilium-agent")?;
    let attached = || shared_hooks(&node.host, &pod).ok().map(drop);
    eventually(EVENT, attached)
        .with_context(|| format!("{:?}\n{}", shared_hooks(&node.host, &pod), node.logs()))?;
    eventually(EVENT, reaches).context("after the programs were detached")?;
    under_traffic("eBPF: after Cilium's programs were detached", &ways, || Ok(()))
}

/// A policy of bridge that allows both ports in both directions, or one of Kubernetes, which Cilium enforces, that allows one.
fn wide_policy(cluster: &Cluster) -> Value {
    let mut wide = policy(cluster);
    for rule in wide["spec"]["rules"].as_array_mut().into_iter().flatten() {
        rule["ports"] = json!([BOTH_ALLOW, CILIUM_DENIES]);
    }
    wide
}

fn ciliums_policy(cluster: &Cluster) -> Value {
    let host = cluster.allowed_host();
    let peers: Vec<_> = [format!("{}/32", host.v4), format!("{}/128", host.v6)]
        .map(|cidr| json!({"ipBlock": {"cidr": cidr}}))
        .into();
    let ports = json!([{"protocol": "TCP", "port": BOTH_ALLOW}]);
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": "one-port", "namespace": "default"},
        "spec": {
            "podSelector": {"matchLabels": {"app": "peer"}}, "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": peers, "ports": ports}], "egress": [{"to": peers, "ports": ports}],
        },
    })
}

#[test]
#[ignore = "needs Cilium, which takes 8 minutes to build: cargo xtask cluster --build --cni cilium"]
fn ciliums_network_policy_holds_beside_bridge() -> Result<()> {
    let cluster = Cluster::up(Options { nodes: 1, ..options() })?;
    cluster.install_bridge(None)?;
    let pod = cluster.make_pod("peer", 0, &json!({"app": "peer"}), &json!({}))?;
    cluster.apply_policies(&[wide_policy(&cluster)])?;
    let (host, mut servers, mut ways) = (cluster.allowed_host(), Vec::new(), Vec::new());
    for family in Family::BOTH {
        for port in [BOTH_ALLOW, CILIUM_DENIES] {
            let inside = SocketAddr::new(pod.ip(family), port);
            servers.push(tcp::Server::echo(&pod.netns, inside)?);
            servers.push(tcp::Server::echo(&host.netns, host.at(family, port))?);
            ways.extend([(&host.netns, inside), (&pod.netns, host.at(family, port))]);
        }
    }
    let open = |from: &Netns, to: SocketAddr, deadline| -> bool {
        let connection =
            tcp::Client::new(from).deadline(deadline).connect(to).ok().and_then(|a| a.reached().ok());
        connection.is_some_and(|mut open| open.round_trip(deadline).is_ok())
    };
    let all_are = |expected: &dyn Fn(u16) -> bool| {
        ways.iter().all(|(from, to)| {
            let deadline = if expected(to.port()) { DEADLINE } else { SILENCE };
            open(from, *to, deadline) == expected(to.port())
        })
    };
    for engines in [&["ebpf"][..], &["ebpf", "iptables"], &["nftables"]] {
        cluster.set_engines(engines)?;
        eventually(EVENT, || all_are(&|_| true).then_some(()))
            .with_context(|| format!("{engines:?}: bridge allows both ports, and no other policy exists"))?;
        cluster.apply(&[ciliums_policy(&cluster)])?;
        eventually(EVENT, || all_are(&|port| port == BOTH_ALLOW).then_some(()))
            .with_context(|| format!("{engines:?}: Cilium allows one port"))?;
        cluster.kubectl(&["delete", "networkpolicy", "one-port"])?;
    }
    Ok(())
}
