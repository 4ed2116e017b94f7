//! What starts, reloads, trials and damage make of the rules.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use bridge_lab::lab::Family;
use bridge_lab::wait::{eventually, patience};
use serde_json::json;

use crate::node::{ALLOWED, DEADLINE, DENIED, MORE, Node, RULES, config, firewall, hits, json};

#[test]
fn nftables_alone_enforces_and_counts() -> Result<()> {
    let node = Node::new()?;
    let mut agent = node.start(&config("nftables", RULES))?;
    node.holds()?;
    ensure!(hits(&agent, "api")? == 2, "{}", agent.run(&["rules"])?);
    let counters = node.run("nft list counter inet bridge-agent no-rule")?;
    ensure!(counters.contains("packets 2 "), "{counters}");
    ensure!(agent.run(&["status"])?.contains("active (inet bridge-agent)"));
    ensure!(firewall(&agent)?["engine"] == "nftables");
    // Enforcement goes on without the agent, and a restart keeps it.
    agent.stop()?;
    node.holds()?;
    agent.run(&["down"])?;
    ensure!(!node.has_table()?, "{}", node.dump()?);
    node.is_open()
}

#[test]
fn a_changed_rule_leaves_the_counters_of_others() -> Result<()> {
    let node = Node::new()?;
    let mut agent = node.start(&config("ebpf, nftables", RULES))?;
    node.holds()?;
    ensure!(hits(&agent, "api")? == 2);
    agent.reload(&config("ebpf, nftables", &format!("{RULES}{MORE}")))?;
    for family in Family::BOTH {
        let opened = node.connect(family, DENIED)?;
        ensure!(opened.succeeded(), "{family:?}: {opened}");
    }
    ensure!((hits(&agent, "api")?, hits(&agent, "more")?) == (2, 2), "{}", agent.run(&["rules"])?);
    agent.reload(&config("ebpf, nftables", RULES))?;
    node.holds()?;
    ensure!(hits(&agent, "api")? == 4, "{}", agent.run(&["rules"])?);
    Ok(())
}

#[test]
fn a_rule_that_moves_to_another_map_keeps_its_counters() -> Result<()> {
    let node = Node::new()?;
    let wide = "  - {name: wide, direction: inbound, protocol: tcp, ports: [40000-40010]}\n";
    let other = "  - {name: other, direction: inbound, protocol: tcp, ports: [40005-40020]}\n";
    let both = config("nftables", &format!("rules:\n{wide}{other}"));
    let mut agent = node.start(&both)?;
    let layer = |number: u8| -> Result<bool> {
        let map = node.run("nft list table inet bridge-agent")?;
        Ok(map
            .split("\n\tmap ")
            .any(|map| map.starts_with(&format!("in4-allow-tcp-d-{number} ")) && map.contains("\"other\"")))
    };
    ensure!(layer(1)?, "{}", node.dump()?);
    for family in Family::BOTH {
        let opened = node.connect(family, 40015)?;
        ensure!(opened.succeeded(), "{family:?}: {opened}");
    }
    let counted = hits(&agent, "other")?;
    ensure!(counted > 0, "{}", agent.run(&["rules"])?);
    agent.reload(&config("nftables", &format!("rules:\n{other}")))?;
    ensure!(layer(0)? && hits(&agent, "other")? == counted, "{}", agent.run(&["rules"])?);
    agent.reload(&both)?;
    ensure!(layer(1)? && hits(&agent, "other")? == counted, "{}", agent.run(&["rules"])?);
    ensure!(firewall(&agent)?["repairs"] == 0, "{}", firewall(&agent)?);
    Ok(())
}

#[test]
fn damage_is_repaired_within_a_second() -> Result<()> {
    let node = Node::new()?;
    let agent = node.start(&config("nftables", RULES))?;
    let repaired = |times: u64| -> Result<Option<()>> {
        Ok((firewall(&agent)?["repairs"].as_u64() == Some(times)).then_some(()))
    };
    let rules = node.dump()?;
    let foreign = "nft insert rule inet bridge-agent forward accept";
    let element = "nft delete element inet bridge-agent in4-allow-tcp-dx-0 { 6 . 40002 }";
    // What was done to the rules is seen by the count of repairs: they may be back at once.
    for (damage, times) in [("nft flush ruleset", 1), (foreign, 2), (element, 3)] {
        // The agent has read its rules back.
        std::thread::sleep(Duration::from_secs(2));
        let begun = Instant::now();
        node.run(damage)?;
        let same = || (node.dump().ok()? == rules).then_some(());
        ensure!(eventually(DEADLINE, same).is_some(), "{damage}:\n{}\n{}", node.dump()?, agent.log());
        let took = begun.elapsed();
        eprintln!("{damage}: repaired after {took:?}");
        ensure!(took < patience(Duration::from_secs(1)), "{damage}: {took:?}");
        ensure!(eventually(DEADLINE, || repaired(times).ok().flatten()).is_some(), "{}", firewall(&agent)?);
        node.holds()?;
    }
    Ok(())
}

#[test]
fn the_engine_changes_and_one_alone_is_left() -> Result<()> {
    let node = Node::new()?;
    let mut agent = node.start(&config("iptables", RULES))?;
    ensure!(node.dump()?.contains("BRIDGE-FORWARD"));
    agent.reload(&config("nftables", RULES))?;
    node.holds()?;
    ensure!(node.has_table()? && !node.dump()?.contains("BRIDGE-"), "{}", node.dump()?);
    agent.reload(&config("iptables", RULES))?;
    node.holds()?;
    ensure!(!node.has_table()? && node.dump()?.contains("BRIDGE-FORWARD"), "{}", node.dump()?);
    // A refused one leaves the former engine.
    agent.reload(&config("iptables, nftables", RULES))?;
    ensure!(agent.log().contains("both would write the same rules"), "{}", agent.log());
    ensure!(!node.has_table()? && node.dump()?.contains("BRIDGE-FORWARD"), "{}", node.dump()?);
    node.holds()?;
    // A file that was changed while no agent ran.
    agent.stop()?;
    let agent = node.start(&config("nftables", RULES))?;
    node.holds()?;
    ensure!(node.has_table()? && !node.dump()?.contains("BRIDGE-"), "{}", node.dump()?);
    drop(agent);
    Ok(())
}

#[test]
fn a_restart_with_ebpf_alone_removes_the_rules_of_the_packet_filter() -> Result<()> {
    let node = Node::new()?;
    for (former, name) in [("nftables", "nftables"), ("ebpf, nftables", "nftables"), ("iptables", "iptables")]
    {
        let mut agent = node.start(&config(former, RULES))?;
        node.holds()?;
        agent.stop()?;
        let agent = node.start(&config("ebpf", &format!("{RULES}{MORE}")))?;
        let rules = node.dump()?;
        ensure!(!node.has_table()? && !rules.contains("BRIDGE-"), "{former}: {rules}");
        node.is_open()?;
        let said = format!("removed the rules that an earlier run left in {name}");
        ensure!(agent.log().contains(&said), "{former}: {}", agent.log());
        agent.run(&["status"])?;
    }
    Ok(())
}

#[test]
fn status_and_rules_answer_while_maps_are_missing() -> Result<()> {
    let node = Node::new()?;
    let mut agent = node.start(&config("ebpf, nftables", RULES))?;
    // As in the middle of a load. A running agent may pin the map again.
    agent.stop()?;
    node.run(&format!("find {} -name digests -delete", agent.pins().display()))?;
    let status = agent.run(&["status"])?;
    ensure!(status.contains("eBPF is not loaded yet: map digests is not pinned"), "{status}");
    ensure!(json(&agent, &["status"])?["enforcement"].is_null());
    ensure!(hits(&agent, "api")? == 0);
    Ok(())
}

#[test]
fn without_an_agent_the_rules_that_enforce_are_shown() -> Result<()> {
    let node = Node::new()?;
    let mut agent = node.start(&config("nftables", RULES))?;
    agent.stop()?;
    let status = agent.run(&["status"])?;
    ensure!(status.contains("not running; enforcement stays active"), "{status}");
    ensure!(status.contains("nftables     table inet bridge-agent active, and not maintained"), "{status}");
    ensure!(json(&agent, &["status"])?["packetFilters"] == json!({"nftables": "table inet bridge-agent"}));
    let planned = agent.run(&["down", "--dry-run"])?;
    ensure!(planned.contains("- table inet bridge-agent in nftables\n"), "{planned}");
    let done = agent.run(&["down"])?;
    ensure!(done.contains("Removed table inet bridge-agent.\n") && !node.has_table()?, "{done}");
    ensure!(agent.run(&["down", "--dry-run"])? == "Nothing to remove.\n");
    let mut agent = node.start(&config("iptables", RULES))?;
    agent.stop()?;
    let status = agent.run(&["status"])?;
    ensure!(status.contains("rules in iptables active, and not maintained"), "{status}");
    let done = agent.run(&["down"])?;
    ensure!(done.contains("rules in iptables.\n"), "{done}");
    ensure!(!agent.run(&["status"])?.contains("iptables"));
    Ok(())
}

/// `auto` takes `engine`, which `check` says before the start, and `status` after it, with the reason.
fn auto_takes(node: &Node, engine: &str, why: &str) -> Result<()> {
    let agent = node.start(&config("auto", RULES))?;
    node.holds()?;
    ensure!(firewall(&agent)?["engine"] == engine, "{}", firewall(&agent)?);
    let chosen = firewall(&agent)?["chosen"].as_str().unwrap_or_default().to_owned();
    ensure!(chosen == why, "{chosen} is not {why}");
    let status = agent.run(&["status"])?;
    ensure!(status.contains(&format!("chosen by auto: {why}\n")), "{status}");
    let file = agent.config().to_string_lossy().into_owned();
    let checked = agent.run(&["check", &file])?;
    ensure!(checked.contains(&format!("# engine auto is {engine} on this node: {why}\n")), "{checked}");
    let checked = json(&agent, &["check", &file])?;
    ensure!(checked["auto"] == json!({"engine": engine, "why": why}), "{checked}");
    Ok(())
}

#[test]
fn auto_takes_nftables_unless_rules_of_legacy_are_in_use() -> Result<()> {
    let node = Node::new()?;
    let without = "nft is installed, and no rules of iptables-legacy are in use";
    auto_takes(&node, "nftables", without)?;
    // A list makes an empty table.
    let node = Node::new()?;
    node.run("iptables-legacy -t nat -L")?;
    ensure!(node.run("cat /proc/thread-self/net/ip_tables_names")? == "nat\n");
    auto_takes(&node, "nftables", without)?;
    for rule in ["iptables-legacy -A INPUT -p tcp --dport 22 -j ACCEPT", "ip6tables-legacy -N OWN"] {
        let node = Node::new()?;
        node.run(rule)?;
        auto_takes(&node, "iptables", "rules of iptables-legacy are in use, in filter")?;
    }
    Ok(())
}

#[test]
fn an_engine_that_is_named_was_not_chosen() -> Result<()> {
    let node = Node::new()?;
    let mut agent = node.start(&config("nftables", RULES))?;
    ensure!(firewall(&agent)?["chosen"].is_null(), "{}", firewall(&agent)?);
    let file = agent.config().to_string_lossy().into_owned();
    ensure!(json(&agent, &["check", &file])?["auto"].is_null());
    // A reload keeps the packet filter that is active.
    node.run("iptables-legacy -A INPUT -p tcp --dport 22 -j ACCEPT")?;
    agent.reload(&config("auto", RULES))?;
    node.holds()?;
    ensure!(firewall(&agent)?["engine"] == "nftables", "{}", firewall(&agent)?);
    ensure!(firewall(&agent)?["chosen"] == "it was active before; a restart chooses again");
    Ok(())
}

#[test]
fn saved_rules_hold_after_a_reboot() -> Result<()> {
    let node = Node::new()?;
    let file = node.etc().join("bridge/rules.nft");
    let mut agent = node.start(&config("nftables", RULES))?;
    ensure!(!file.exists(), "nothing loads the file at boot");
    agent.stop()?;
    fs::write(
        node.etc().join("systemd/system/bridge-nftables.service"),
        include_str!("../../deploy/systemd/bridge-nftables.service"),
    )?;
    let others = fs::read(node.etc().join("nftables.conf")).ok();
    let mut agent = node.start(&config("nftables", RULES))?;
    node.holds()?;
    agent.reload(&config("nftables", &format!("{RULES}{MORE}")))?;
    node.is_open()?;
    agent.reload(&config("nftables", RULES))?;
    agent.stop()?;
    // A boot: no rules, then the unit.
    node.run("nft flush ruleset")?;
    node.is_open()?;
    node.run(&format!("nft -f {}", file.display()))?;
    node.holds()?;
    ensure!(fs::read(node.etc().join("nftables.conf")).ok() == others);
    agent.run(&["down"])?;
    ensure!(!file.exists() && !node.has_table()?);
    Ok(())
}

#[test]
fn saved_rules_that_cannot_be_removed_are_removed_later() -> Result<()> {
    let node = Node::new()?;
    let file = node.etc().join("bridge/rules.nft");
    fs::write(
        node.etc().join("systemd/system/bridge-nftables.service"),
        include_str!("../../deploy/systemd/bridge-nftables.service"),
    )?;
    let mut agent = node.start(&config("nftables", RULES))?;
    fs::remove_file(&file)?;
    fs::create_dir(&file)?;
    agent.reload(&config("ebpf", RULES))?;
    node.holds()?;
    ensure!(!node.has_table()? && file.is_dir(), "{}", node.dump()?);
    ensure!(agent.log().contains("nftables rules are left; the agent tries again"), "{}", agent.log());
    fs::remove_dir(&file)?;
    let removed = || agent.log().contains("removed the nftables rules that were left").then_some(());
    ensure!(eventually(patience(DEADLINE), removed).is_some(), "{}", agent.log());
    Ok(())
}

#[test]
fn a_trial_that_expires_restores_the_rules() -> Result<()> {
    let node = Node::new()?;
    let agent = node.start(&config("ebpf, nftables", RULES))?;
    node.holds()?;
    let before = node.dump()?;
    let candidate = node.lab.directory().join("try.yaml");
    let api = format!("api: {{socket: {}}}\n", agent.socket().display());
    fs::write(&candidate, config("ebpf, nftables", &format!("{RULES}{MORE}{api}")))?;
    agent.run(&["apply", &candidate.to_string_lossy(), "--confirm", "2s"])?;
    for port in [ALLOWED, DENIED] {
        let attempt = node.connect(Family::V4, port)?;
        ensure!(attempt.succeeded(), "{port}: {attempt}");
    }
    let same = || (node.dump().ok()? == before).then_some(());
    ensure!(eventually(DEADLINE, same).is_some(), "{}", node.dump()?);
    node.holds()
}
