//! Which engine enforces, and what a reload makes of it.

use anyhow::{Context as _, Result, ensure};
use bridge_lab::lab::Family;
use serde_json::Value;

use super::node::{ALLOWED, DENIED, MORE, Node, Privilege, RULES, firewall, json};
use crate::support::BACKENDS;

/// A rule in what `bridge-agent rules --json` lists.
fn rule(rules: &Value, name: &str) -> Result<Value> {
    let mut all = rules.as_array().into_iter().flatten();
    all.find(|rule| rule["name"] == name).cloned().with_context(|| format!("no {name} in {rules}"))
}

#[test]
fn both_engines_hold_the_same_rules_and_count_the_same_packets() -> Result<()> {
    for backend in BACKENDS {
        let node = Node::new(backend)?;
        let agent = node.start(&node.config("ebpf, iptables", "", RULES))?;
        let dump = node.dump()?;
        for (family, net) in [("IPv4", "192.168.31.0/24"), ("IPv6", "fd31::/64")] {
            ensure!(dump.contains(&format!("-A BRIDGE-PEER -s {net} ")), "{family}:\n{dump}");
        }
        node.holds()?;
        let rules = json(&agent, &["rules"])?;
        let api = rule(&rules, "api")?;
        // A flow in each family; iptables sees its first packet, then connection tracking knows it.
        assert_eq!((api["hits"].as_u64(), api["iptables"]["packets"].as_u64()), (Some(2), Some(2)), "{api}");
        // What eBPF refuses does not come as far as iptables.
        let saved = node.run("iptables-save -c -t filter")?;
        let denies = saved.lines().filter(|line| line.contains("-A BRIDGE-DENY"));
        assert!(denies.clone().count() > 0 && denies.clone().all(|l| l.starts_with("[0:0]")), "{saved}");
        assert_eq!(firewall(&agent)?["backend"], backend.name());
        ensure!(agent.run(&["status"])?.contains(&format!("active ({})", backend.name())));
    }
    Ok(())
}

#[test]
fn iptables_alone_works_with_no_bpf_at_all() -> Result<()> {
    for backend in BACKENDS {
        let node = Node::with_privilege(backend, Privilege::WithoutBpf)?;
        let refused = node.start(&node.config("ebpf, iptables", "", RULES)).unwrap_err().to_string();
        ensure!(refused.contains("the agent ended"), "bpf(2) is not refused here: {refused}");
        ensure!(!node.dump()?.contains("BRIDGE-"), "a start that failed has left rules");
        node.is_open()?;

        let mut agent = node.start(&node.config("iptables", "", RULES))?;
        node.holds()?;
        for program in ["iptables", "ip6tables"] {
            let saved = node.run(&format!("{program}-save -c -t filter"))?;
            let rejected =
                saved.lines().find(|line| line.contains("-A BRIDGE-DENY -p tcp")).context("a rule")?;
            ensure!(rejected.starts_with("[1:"), "{program}: {rejected}");
        }
        let pins: Vec<_> = std::fs::read_dir(agent.pins())?.collect();
        ensure!(pins.is_empty(), "{pins:?}");
        let rules = json(&agent, &["rules"])?;
        assert_eq!(rule(&rules, "api")?["iptables"]["packets"], 2, "{rules}");
        ensure!(agent.run(&["status"])?.contains(&format!("active ({})", backend.name())));
        ensure!(agent.run(&["rules"])?.contains("devices"));

        agent.reload(&node.config("iptables", "", &format!("{RULES}{MORE}")))?;
        node.is_open()?;
        agent.reload(&node.config("iptables", "", RULES))?;
        node.holds()?;
        agent.stop()?;
        node.holds()?;
        agent.run(&["down"])?;
        node.is_open()?;
    }
    Ok(())
}

#[test]
fn a_reload_switches_both_engines() -> Result<()> {
    for backend in BACKENDS {
        let node = Node::new(backend)?;
        let less = node.config("ebpf, iptables", "", RULES);
        let more = node.config("ebpf, iptables", "", &format!("{RULES}{MORE}"));
        let mut agent = node.start(&less)?;
        node.holds()?;
        let before = node.dump()?;
        agent.reload(&more)?;
        ensure!(node.dump()?.contains("\"more\"") || node.dump()?.contains("--comment more "));
        for family in Family::BOTH {
            for port in [ALLOWED, DENIED] {
                let attempt = node.connect(family, port)?;
                ensure!(attempt.succeeded(), "{family:?} {port}: {attempt}");
            }
        }
        let opened = rule(&json(&agent, &["rules"])?, "more")?;
        assert_eq!(
            (opened["hits"].as_u64(), opened["iptables"]["packets"].as_u64()),
            (Some(2), Some(2)),
            "{opened}"
        );
        agent.reload(&less)?;
        assert_eq!(node.dump()?, before);
        node.holds()?;
    }
    Ok(())
}

#[test]
fn an_engine_that_is_not_wanted_any_more_leaves_no_rules() -> Result<()> {
    for backend in BACKENDS {
        let node = Node::new(backend)?;
        node.add_foreign_rules()?;
        let before = node.dump()?;
        let both = node.config("ebpf, iptables", "", RULES);
        let mut agent = node.start(&both)?;
        let enforced = node.dump()?;
        ensure!(enforced.contains("BRIDGE-FORWARD"));

        agent.reload(&node.config("ebpf", "", RULES))?;
        assert_eq!(node.dump()?, before);
        ensure!(firewall(&agent)?.is_null());
        node.holds()?;

        agent.reload(&node.config("iptables", "", RULES))?;
        assert_eq!(node.dump()?, enforced);
        ensure!(json(&agent, &["status"])?["enforcement"].is_null(), "eBPF is still there");
        node.holds()?;

        agent.reload(&both)?;
        assert_eq!(node.dump()?, enforced);
        node.holds()?;
    }
    Ok(())
}

#[test]
fn another_back_end_mark_and_log_rate_take_effect_with_a_reload() -> Result<()> {
    let [nft, legacy] = BACKENDS;
    let mut node = Node::new(nft)?;
    let section = "nodePorts: {range: \"30000-32767\", allow: [30080]}\n";
    let first = node.config("iptables", "", &format!("{section}{RULES}"));
    let mut agent = node.start(&first)?;
    ensure!(node.dump()?.contains("0x2000/0x2000") && !node.dump()?.contains("-j LOG"));

    let second = first.replace("lockWait: 1s", "lockWait: 2s, mark: 0x100000, logRate: 7");
    agent.reload(&second)?;
    let dump = node.dump()?;
    ensure!(dump.contains("0x100000/0x100000") && !dump.contains("0x2000/"), "{dump}");
    ensure!(dump.contains("--limit 7/sec") && dump.contains("bridge denied: "), "{dump}");
    node.holds()?;

    agent.reload(&second.replace("backend: nft", "backend: legacy"))?;
    ensure!(!node.dump()?.contains("BRIDGE-"), "rules are left in nf_tables");
    node.backend = legacy;
    ensure!(node.dump()?.contains("0x100000/0x100000"));
    assert_eq!(firewall(&agent)?["backend"], "legacy");
    node.holds()?;
    Ok(())
}
