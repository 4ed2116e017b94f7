//! Counters of the packet filters, as the agent answers with them, and as they go on.

use anyhow::{Context as _, Result, ensure};
use bridge_lab::agent::Agent;
use bridge_lab::lab::Family;
use bridge_lab::wait::eventually;
use serde_json::Value;

use crate::node::{ALLOWED, DEADLINE, DENIED, MORE, Node, RULES, config, firewall};

/// Hits of a rule, and packets denied since no rule matches, as the API answers.
fn counted(agent: &Agent, rule: &str) -> Result<(u64, u64)> {
    let get = |path: &str| -> Result<Value> { Ok(serde_json::from_str(&agent.get(path)?)?) };
    let number = |list: &Value, key: &str, name: &str, value: &str| -> Result<u64> {
        let found = list.as_array().into_iter().flatten().find(|row| row[key] == name);
        found.and_then(|row| row[value].as_u64()).with_context(|| format!("no {name} in {list}"))
    };
    let (rules, counters) = (get("/v1/rules")?, get("/v1/counters")?);
    Ok((number(&rules, "name", rule, "hits")?, number(&counters, "reason", "no_rule", "packets")?))
}

/// Waits until the answer is this one: it may be some moments old.
fn becomes(agent: &Agent, rule: &str, expected: (u64, u64)) -> Result<()> {
    let same = || (counted(agent, rule).ok()? == expected).then_some(());
    ensure!(eventually(DEADLINE, same).is_some(), "{:?} instead of {expected:?}", counted(agent, rule));
    Ok(())
}

#[test]
fn the_agent_answers_with_the_counters_of_a_packet_filter_alone() -> Result<()> {
    for engine in ["nftables", "iptables"] {
        let node = Node::new()?;
        let agent = node.start(&config(engine, RULES))?;
        // A connection to the allowed port and one to the denied port, of each family.
        node.holds()?;
        becomes(&agent, "api", (2, 2))?;
        let metrics = agent.metrics()?;
        for line in [
            r#"bridge_rule_hits_total{rule="api",direction="inbound",action="allow"} 2"#,
            r#"bridge_packets_total{direction="both",reason="no_rule",verdict="deny"} 2"#,
        ] {
            ensure!(metrics.contains(line), "{engine}: no {line} in {metrics}");
        }
        let status = agent.run(&["status"])?;
        ensure!(status.contains("both no_rule: 2 packets, 0 in audit mode"), "{engine}: {status}");
        let rules = agent.run(&["rules"])?;
        ensure!(rules.lines().any(|line| line.contains("api") && line.trim_end().ends_with('2')), "{rules}");
    }
    Ok(())
}

/// One connection to the allowed port and one to another, of each of these families.
fn knock(node: &Node, families: &[Family], other: u16) -> Result<()> {
    for port in [ALLOWED, other] {
        families.iter().try_for_each(|family| node.connect(*family, port).map(drop))?;
    }
    Ok(())
}

#[test]
fn counters_go_on_over_restarts_and_repairs() -> Result<()> {
    // ip6tables-restore of iptables 1.8.9 (nf_tables) ignores the counters that it is given.
    for (engine, families, damage) in [
        ("nftables", &Family::BOTH[..], "nft insert rule inet bridge-agent forward accept"),
        ("iptables", &[Family::V4], "iptables -I BRIDGE-INBOUND -j ACCEPT"),
    ] {
        let count = families.len() as u64;
        let node = Node::new()?;
        let mut agent = node.start(&config(engine, RULES))?;
        knock(&node, families, DENIED)?;
        becomes(&agent, "api", (count, count))?;
        agent.restart()?;
        becomes(&agent, "api", (count, count))?;
        knock(&node, families, DENIED)?;
        becomes(&agent, "api", (2 * count, 2 * count))?;
        // A file with one more rule that is read at a start.
        agent.stop()?;
        let agent = node.start(&config(engine, &format!("{RULES}{MORE}")))?;
        becomes(&agent, "more", (0, 2 * count))?;
        knock(&node, families, DENIED)?;
        becomes(&agent, "more", (count, 2 * count))?;
        node.run(damage)?;
        let repaired = || (firewall(&agent).ok()?["repairs"] == 1).then_some(());
        ensure!(eventually(DEADLINE, repaired).is_some(), "{}", firewall(&agent)?);
        becomes(&agent, "api", (3 * count, 2 * count))?;
        becomes(&agent, "more", (count, 2 * count))?;
    }
    Ok(())
}
