//! nftables where the kernel refuses bpf(2): everything but what needs eBPF.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use bridge_agent::pool::attach::mount_point;
use bridge_lab::agent::{Agent, program};
use bridge_lab::lab::Family;
use bridge_lab::wait::eventually;

use crate::node::{DEADLINE, DENIED, MORE, Node, RULES, config, firewall, hits, json};

/// CHOWN, DAC_OVERRIDE, NET_ADMIN and NET_RAW (capabilities(7)): neither BPF nor SYS_ADMIN, which stands for it.
const LEFT: &str = "-all,+cap_0,+cap_1,+cap_12,+cap_13";

const POOL: &str = "portPool: {ports: 61001-61100}\n";

/// A program that is the agent without the capabilities of BPF.
fn without_bpf(node: &Node) -> Result<PathBuf> {
    let path = node.lab.directory().join("without-bpf");
    let agent = program()?;
    let script =
        format!("#!/bin/sh\nexec setpriv --bounding-set {LEFT} --inh-caps -all {} \"$@\"\n", agent.display());
    fs::write(&path, script)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

#[test]
fn without_bpf_nftables_gives_all_but_the_pools_hooks_and_events() -> Result<()> {
    let node = Node::new()?;
    let (program, b) = (without_bpf(&node)?, node.lab.b());
    let start = |config: &str| Agent::start_program(program.clone(), &node.lab, b, config);
    let save = "persistence: {save: never}\n";

    // bpf(2) is refused, and the error names the way out.
    let refused = start(&config("ebpf, nftables", &format!("{RULES}{save}"))).err();
    let refused = format!("{:#}", refused.context("eBPF was loaded without CAP_BPF")?);
    ensure!(refused.contains("missing CAP_BPF") && refused.contains("engines: [nftables]"), "{refused}");
    node.is_open()?;

    let mut agent = start(&config("nftables", &format!("{RULES}{POOL}{save}")))?;
    node.holds()?;
    let status = agent.run(&["status"])?;
    let without = "no eBPF enforcement: without it there are no events of `monitor`, and no fast path";
    ensure!(status.contains(without), "{status}");
    ensure!(status.contains("in the agent alone, without hooks"), "{status}");
    ensure!(firewall(&agent)?["engine"] == "nftables" && firewall(&agent)?["failure"].is_null());
    ensure!(json(&agent, &["status"])?["enforcement"].is_null());
    agent.run(&["status", "--ready"])?;
    // A connection to the allowed port of each family; and by the counters of the kernel.
    ensure!(hits(&agent, "api")? == 2, "{}", agent.run(&["rules"])?);
    ensure!(node.run("nft list counter inet bridge-agent no-rule")?.contains("packets 2 "));

    // Reloads, trials, repairs, restarts.
    agent.reload(&config("nftables", &format!("{RULES}{MORE}{POOL}{save}")))?;
    node.is_open()?;
    agent.reload(&config("nftables", &format!("{RULES}{POOL}{save}")))?;
    node.holds()?;
    let candidate = node.lab.directory().join("try.yaml");
    let api = format!("api: {{socket: {}}}\n", agent.socket().display());
    fs::write(&candidate, config("nftables", &format!("{RULES}{MORE}{POOL}{save}{api}")))?;
    let applied = agent.run(&["apply", &candidate.to_string_lossy(), "--confirm", "2s"])?;
    ensure!(applied.contains("Without eBPF the agent goes back"), "{applied}");
    node.is_open()?;
    node.settles(&agent)?;
    node.run("nft flush ruleset")?;
    node.settles(&agent)?;
    let explained = agent.run(&["explain", "192.168.31.67", &format!("10.200.1.91:{DENIED}")]);
    ensure!(format!("{explained:?}").contains("no rule"), "{explained:?}");
    let repaired = || agent.metrics().ok()?.contains("bridge_nftables_repairs_total 1\n").then_some(());
    ensure!(eventually(DEADLINE, repaired).is_some(), "{}", agent.metrics()?);
    // A port of the pool for a client that asks.
    let lease = agent.run(&["ports", "lease", "--to", "192.168.31.67:80"]);
    eprintln!("{lease:?}");
    let monitored = agent.run(&["monitor"]);
    ensure!(monitored.is_err(), "events without eBPF: {monitored:?}");
    agent.restart()?;
    node.holds()?;
    agent.stop()?;
    node.holds()?;
    agent.run(&["down"])?;
    let open = node.connect(Family::V4, DENIED)?;
    ensure!(open.succeeded() && !node.has_table()?, "{open}");
    Ok(())
}

#[test]
fn the_port_pool_has_its_hooks_beside_nftables_alone() -> Result<()> {
    let node = Node::new()?;
    let mut agent = node.start(&config("nftables", &format!("{RULES}{POOL}")))?;
    let status = agent.run(&["status"])?;
    ensure!(!status.contains("without hooks"), "{status}");
    let explained = agent.run(&["explain", "10.200.1.91", "192.168.31.67:40002"])?;
    ensure!(explained.contains("portPool.transparent has no control group"), "{explained}");
    let group = node.lab.cgroup("clients")?;
    let group = format!("/{}", group.strip_prefix(mount_point()?)?.display());
    let transparent = POOL.replace('}', &format!(", transparent: {{cgroups: [{group}]}}}}"));
    agent.reload(&config("nftables", &format!("{RULES}{transparent}")))?;
    let explained = agent.run(&["explain", "10.200.1.91", "192.168.31.67:40002"])?;
    ensure!(explained.contains(&format!("the pool is for {group}")), "{explained}");
    Ok(())
}

#[test]
fn a_second_agent_of_a_network_namespace_is_refused() -> Result<()> {
    let node = Node::new()?;
    let mut agent = node.start(&config("nftables", RULES))?;
    let second = node.lab.directory().join("second");
    fs::create_dir_all(&second)?;
    let socket = format!("api: {{socket: {}}}\n", second.join("agent.sock").display());
    fs::write(second.join("agent.yaml"), config("nftables", &format!("{RULES}{MORE}{socket}")))?;
    let (program, at) = (program()?.display().to_string(), second.display());
    let start = format!("timeout 60 {program} run --config {at}/agent.yaml --pin-root {at} --state-dir {at}");
    let refused = format!("{:#}", node.run(&start).err().context("two agents keep the same rules")?);
    ensure!(refused.contains(&format!("another agent, process {}", agent.pid())), "{refused}");
    node.holds()?;
    ensure!(firewall(&agent)?["repairs"] == 0, "{}", firewall(&agent)?);
    // The claim goes with the process.
    agent.kill()?;
    agent.restart()?;
    node.holds()
}
