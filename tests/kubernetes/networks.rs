//! Which node has which pod network: as the nodes say, or Calico, or Cilium.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bridge_lab::agent::Agent;
use bridge_lab::kubernetes::ApiServer;
use bridge_lab::lab::{Family, Lab};
use bridge_lab::traffic::tcp;
use bridge_lab::wait::eventually;
use serde_json::{Value, json};

use crate::support::{
    DEADLINE, EVERY_POD, OPEN, host_config, is_refused, node_config, policy, until_current, until_open,
    until_routes, until_routes_within,
};

/// An agent that runs looks every minute whether definitions have come.
const LATER: Duration = Duration::from_secs(90);

/// Nodes as kubeadm makes them: each with a network that Calico and Cilium care nothing for.
fn nodes(server: &ApiServer) -> Result<()> {
    server.add_node_as("b", &["192.168.31.17".into()], &["10.244.1.0/24".into()])?;
    server.add_node_as("b2", &["192.168.31.18".into()], &["10.244.2.0/24".into()])
}

const OF_NODES: [&str; 2] = ["10.244.1.0/24 via 192.168.31.17", "10.244.2.0/24 via 192.168.31.18"];

/// Router of the pods: an address of the node itself.
const GATEWAY: &str = "10.200.1.1/32";

/// The IPv4 networks that the packet path takes for pods'.
fn judged(agent: &Agent) -> Result<Vec<String>> {
    let map = agent.pins().join(format!("v{}/policy", bridge_common::ABI_VERSION));
    let maps = bridge_agent::datapath::Maps::open(&bridge_agent::datapath::Pins::new(agent.pins()))?;
    let pin = map.join(format!("{}/addresses4", maps.slot()));
    let output = Command::new("bpftool").args(["-j", "map", "dump", "pinned"]).arg(pin).output()?;
    let dump: Value = serde_json::from_slice(&output.stdout).context("bpftool")?;
    let entries = dump.as_array().context("a list")?.iter();
    let network = |entry: &Value| {
        let bytes: Vec<u8> = entry["key"].as_array()?.iter().filter_map(byte).collect();
        let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?);
        let [a, b, c, d] = bytes.get(4..8)?.try_into().ok()?;
        (a == 10).then(|| format!("{a}.{b}.{c}.{d}/{length}"))
    };
    let mut networks: Vec<String> = entries.filter_map(network).filter(|net| net != GATEWAY).collect();
    networks.sort();
    Ok(networks)
}

/// As bpftool writes it in JSON: `"0x0a"`.
fn byte(value: &Value) -> Option<u8> {
    u8::from_str_radix(value.as_str()?.strip_prefix("0x")?, 16).ok()
}

#[track_caller]
fn until_judged(agent: &Agent, wanted: &[&str], deadline: Duration) -> Result<()> {
    eventually(deadline, || judged(agent).ok().filter(|networks| networks == wanted))
        .map(drop)
        .with_context(|| format!("wanted {wanted:?}, found {:?}\n{}", judged(agent), agent.log()))
}

#[test]
fn calicos_blocks_count_from_when_it_is_installed_and_what_one_lends_goes_to_the_borrower() -> Result<()> {
    let lab = Lab::builder().nodes(2).without_routes().build()?;
    let server = ApiServer::start(&lab)?;
    nodes(&server)?;
    let node = Agent::start(&lab, lab.b(), &node_config(&server, ""))?;
    let mut host = Agent::start(&lab, lab.a(), &host_config(&server, "auto"))?;
    until_current(&node)?;
    until_routes(&lab, &OF_NODES)?;
    until_judged(&node, &["10.244.1.0/24", "10.244.2.0/24"], DEADLINE)?;

    // Installed while both agents run. The pods of the lab are in a block of the node.
    server.install_calico()?;
    server.apply_calico_block("10.200.1.64/26", "b", Some((6, "b2")))?;
    server.apply_calico_block("10.200.2.0/26", "b2", None)?;
    // Addresses that Calico gives to services are no pods'.
    server.apply_calico_affinity("10.201.0.0/26", "load-balancer", "virtual")?;
    let by_calico = ["10.200.1.64/26 via 192.168.31.17", "10.200.2.0/26 via 192.168.31.18"];
    let lent = "10.200.1.70 via 192.168.31.18";
    until_routes_within(LATER, &lab, &[by_calico[0], by_calico[1], lent])?;
    until_judged(&node, &["10.200.1.64/26", "10.200.2.0/26"], LATER)?;
    for agent in [&node, &host] {
        ensure!(until_current(agent)?["podNetworksFrom"] == "calico");
    }
    // On real packets: addresses that were no pod's are judged now.
    let (a, c1) = (lab.a(), lab.c1());
    let _server = tcp::Server::echo(&c1.netns, c1.at(Family::V4, OPEN))?;
    ensure!(is_refused(a, c1.at(Family::V4, OPEN))?, "nothing allows it");
    server.apply(&policy("all", EVERY_POD))?;
    server.add_namespace("shop", &json!({}))?;
    server.add_pod("shop", "c1", &json!({}), "b")?;
    server.run_pod("shop", "c1", c1)?;
    until_open(a, c1.at(Family::V4, OPEN), &node)?;

    // The address comes home; a block goes to another node.
    server.apply_calico_block("10.200.1.64/26", "b", None)?;
    until_routes(&lab, &by_calico)?;
    server.kubectl(&["delete", "blockaffinity", "b2-10-200-2-0-26"], "")?;
    server.apply_calico_block("10.200.2.0/26", "b", None)?;
    until_routes(&lab, &[by_calico[0], "10.200.2.0/26 via 192.168.31.17"])?;

    // The named sources are asked, whatever the others contain; a missing one yields nothing.
    host.reload(&host_config(&server, "node"))?;
    until_routes(&lab, &OF_NODES)?;
    host.reload(&host_config(&server, "cilium"))?;
    until_routes(&lab, &[])?;
    host.reload(&host_config(&server, "auto"))?;
    until_routes(&lab, &[by_calico[0], "10.200.2.0/26 via 192.168.31.17"])?;
    server.kubectl(&["delete", "blockaffinity,ipamblock", "--all"], "")?;
    until_routes(&lab, &OF_NODES)?;
    until_judged(&node, &["10.200.1.91/32", "10.244.1.0/24", "10.244.2.0/24"], DEADLINE)
}

#[test]
fn ciliums_networks_count_where_calico_has_none() -> Result<()> {
    let lab = Lab::builder().nodes(2).without_routes().build()?;
    let server = ApiServer::start(&lab)?;
    nodes(&server)?;
    server.install_cilium()?;
    // Those of its mode cluster-pool, which is the default, and of multi-pool.
    server.add_cilium_node("b", "192.168.31.17", &json!({"podCIDRs": ["10.200.1.0/24"], "pools": {}}))?;
    let pools = json!({"requested": [{"pool": "default", "needed": {"ipv4-addrs": 16}}], "allocated": [
        {"pool": "default", "cidrs": ["10.60.2.0/27", "10.60.2.64/27"]}, {"pool": "mars", "cidrs": ["10.61.0.0/27"]},
    ]});
    server.add_cilium_node("b2", "192.168.31.18", &json!({"pools": pools}))?;
    let node = Agent::start(&lab, lab.b(), &node_config(&server, ""))?;
    let mut host = Agent::start(&lab, lab.a(), &host_config(&server, "auto"))?;
    let by_cilium = [
        "10.200.1.0/24 via 192.168.31.17",
        "10.60.2.0/27 via 192.168.31.18",
        "10.60.2.64/27 via 192.168.31.18",
        "10.61.0.0/27 via 192.168.31.18",
    ];
    until_routes(&lab, &by_cilium)?;
    until_judged(&node, &["10.200.1.0/24", "10.60.2.0/27", "10.60.2.64/27", "10.61.0.0/27"], DEADLINE)?;
    ensure!(until_current(&node)?["podNetworksFrom"] == "cilium");
    let c1 = lab.c1();
    let _server = tcp::Server::echo(&c1.netns, c1.at(Family::V4, OPEN))?;
    ensure!(is_refused(lab.a(), c1.at(Family::V4, OPEN))?, "nothing allows it");

    // One pool more, one less; then Cilium goes.
    let change = json!({"spec": {"ipam": {"pools": {"allocated": [{"pool": "default", "cidrs": ["10.60.2.0/27", "10.60.3.0/27"]}]}}}});
    let patch = ["patch", "ciliumnode", "b2", "--type=merge", "-p", &change.to_string()];
    server.kubectl(&patch, "")?;
    until_routes(&lab, &[by_cilium[0], by_cilium[1], "10.60.3.0/27 via 192.168.31.18"])?;
    host.reload(&host_config(&server, "node"))?;
    until_routes(&lab, &OF_NODES)?;
    host.reload(&host_config(&server, "cilium"))?;
    until_routes(&lab, &[by_cilium[0], by_cilium[1], "10.60.3.0/27 via 192.168.31.18"])?;
    host.reload(&host_config(&server, "auto"))?;
    server.kubectl(&["delete", "crd", "ciliumnodes.cilium.io"], "")?;
    until_routes(&lab, &OF_NODES)
}

/// Returns the routes that `routes export` writes, as network and next hop.
fn exported(agent: &Agent) -> Result<Vec<String>> {
    let text = agent.run(&["routes", "export", "--format", "frr"])?;
    let line = |line: &str| line.strip_prefix("ip route ").map(|route| route.replacen(' ', " via ", 1));
    Ok(text.lines().filter_map(line).collect())
}

#[test]
fn an_export_has_the_routes_of_the_cluster_and_follows_them() -> Result<()> {
    let lab = Lab::builder().nodes(2).without_routes().build()?;
    let server = ApiServer::start(&lab)?;
    nodes(&server)?;
    let mut host = Agent::start(&lab, lab.a(), &host_config(&server, "auto"))?;
    until_routes(&lab, &OF_NODES)?;
    ensure!(exported(&host)? == OF_NODES, "{:?}", exported(&host)?);
    let file = lab.directory().join("frr.conf");
    let path = file.display().to_string();
    let export = host.command(&["routes", "export", "--format", "frr", "--watch", "--output", &path]);
    let mut following = lab.a().netns.spawn_command(export)?;
    let has = |wanted: &[&str]| {
        eventually(DEADLINE, || {
            let text = std::fs::read_to_string(&file).ok()?;
            let found: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("ip route ")).collect();
            (found == wanted).then_some(())
        })
        .with_context(|| format!("wanted {wanted:?}, found {:?}", std::fs::read_to_string(&file)))
    };
    has(&["10.244.1.0/24 192.168.31.17", "10.244.2.0/24 192.168.31.18"])?;
    server.kubectl(&["delete", "node", "b2"], "")?;
    has(&["10.244.1.0/24 192.168.31.17"])?;
    // Without its agent the file stays, and a single export is refused: it would be empty.
    host.stop()?;
    server.add_node_as("b2", &["192.168.31.18".into()], &["10.244.2.0/24".into()])?;
    std::thread::sleep(Duration::from_secs(2));
    has(&["10.244.1.0/24 192.168.31.17"])?;
    ensure!(following.wait(Duration::ZERO)?.is_none(), "it keeps running");
    let refused = exported(&host).err().context("an export without the agent succeeds")?.to_string();
    ensure!(refused.contains("no agent answers"), "{refused}");
    Ok(())
}
