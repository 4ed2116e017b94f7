//! Ten thousand rules: how long they take, and what a change of one of them leaves alone.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bridge_agent::config;
use bridge_agent::firewall::Firewall as _;
use bridge_agent::model::Policy;
use bridge_agent::nftables::{self, Nftables, save::Saving};
use bridge_lab::lab::Family;
use bridge_lab::wait::{eventually, patience};
use rustix::time::{ClockId, clock_gettime};
use serde_json::Value;

use crate::node::{ALLOWED, DEADLINE, Node, RULES, firewall};

const COUNT: u32 = 10_000;
/// A port of the rule that is changed, before and after.
const CHANGED: [u16; 2] = [9, 10];

/// [`RULES`] and as many more, each for one device; that in the middle allows `port`.
fn large(port: u16) -> String {
    let mut rules = RULES.to_owned();
    for index in 0..COUNT {
        let device = Ipv4Addr::from(0x6440_0000 + index);
        let ports = if index == COUNT / 2 { port } else { 1024 + u16::try_from(index % 60_000).unwrap_or(0) };
        // Writing to a string does not fail.
        let _ = writeln!(
            rules,
            "  - {{name: device-{index}, direction: inbound, external: [{device}/32], protocol: tcp, ports: [{ports}]}}"
        );
    }
    rules
}

fn configuration(port: u16) -> String {
    crate::node::config("nftables", &large(port))
        .replace("192.168.31.0/24,", "192.168.31.0/24, 100.64.0.0/10,")
}

fn policy(port: u16) -> Result<Policy> {
    Ok(config::parse(&configuration(port), None)?.config.policy())
}

/// Packets and handle-like identity of every element, as the kernel has them: by the name of the rule.
fn counters(node: &Node) -> Result<BTreeMap<String, u64>> {
    let document: Value = serde_json::from_str(&node.run("nft --json list table inet bridge-agent")?)?;
    let mut found = BTreeMap::new();
    for object in document["nftables"].as_array().context("objects")? {
        for element in object["map"]["elem"].as_array().into_iter().flatten() {
            let element = &element[0]["elem"];
            if let (Some(rule), Some(packets)) =
                (element["comment"].as_str(), element["counter"]["packets"].as_u64())
            {
                *found.entry(rule.to_owned()).or_default() += packets;
            }
        }
    }
    Ok(found)
}

/// CPU time of this thread, and of nft; other work on the machine does not count.
fn worked(work: impl FnOnce() -> Result<()>) -> Result<[Duration; 2]> {
    let now = || -> Result<[Duration; 2]> {
        let own = clock_gettime(ClockId::ThreadCPUTime);
        let fields = std::fs::read_to_string("/proc/self/stat")?;
        // Behind the name in parentheses: cutime and cstime are fields 16 and 17 (proc(5)).
        let fields: Vec<_> = fields.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks: u64 = fields[13].parse::<u64>()? + fields[14].parse::<u64>()?;
        let own = Duration::new(own.tv_sec.unsigned_abs(), u32::try_from(own.tv_nsec)?);
        Ok([own, Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second())])
    };
    let before = now()?;
    work()?;
    let after = now()?;
    Ok([after[0] - before[0], after[1] - before[1]])
}

#[test]
fn one_changed_rule_of_ten_thousand_leaves_the_counters_of_the_others() -> Result<()> {
    let node = Node::new()?;
    let (before, after) = (policy(CHANGED[0])?, policy(CHANGED[1])?);
    let (all, one) = node.lab.b().netns.run(|| -> Result<_> {
        let saving = Saving { enabled: false, ..Saving::default() };
        let mut firewall = Nftables::new(nftables::Config { saving, ..nftables::Config::default() })?;
        let all = worked(|| Ok(firewall.converge(&before)?))?;
        // A packet for two of them, then the change, and none after it.
        for _ in 0..3 {
            node.connect(Family::V4, ALLOWED)?;
        }
        let counted = counters(&node)?;
        ensure!(counted.len() > COUNT as usize && counted["api"] == 3, "{:?}", counted.get("api"));
        let one = worked(|| Ok(firewall.converge(&after)?))?;
        ensure!(counters(&node)? == counted, "the counters of others have changed");
        ensure!(firewall.hits()?["api"].packets == 3);
        Ok((all, one))
    })?;
    eprintln!("{COUNT} rules written in {all:?}, one changed in {one:?}");
    for (what, [own, of_nft], limit) in [("all", all, 2_000), ("one", one, 100)] {
        // Unoptimised, as the tests are, the agent's own part takes some ten times as long.
        let own = if cfg!(debug_assertions) { own / 10 } else { own };
        let limit = patience(Duration::from_millis(limit));
        ensure!(own + of_nft < limit, "{what} of {COUNT} rules: {own:?} and {of_nft:?} of nft");
    }
    let rule = node.run("nft list map inet bridge-agent in4-allow-tcp-hdx-0")?;
    ensure!(
        rule.contains(&format!(". {} counter", CHANGED[1]))
            && !rule.contains(&format!(". {} counter", CHANGED[0]))
    );
    Ok(())
}

#[test]
fn ten_thousand_flushed_rules_are_back_within_a_second() -> Result<()> {
    let node = Node::new()?;
    let agent = node.start(&configuration(CHANGED[0]))?;
    node.holds()?;
    let repairs = || firewall(&agent).ok()?["repairs"].as_u64();
    let mut took = Vec::new();
    for time in 1..=5 {
        let start = Instant::now();
        node.run("nft flush ruleset")?;
        let back = || node.has_chain("forward").then_some(());
        ensure!(eventually(DEADLINE, back).is_some(), "{}", agent.log());
        took.push(start.elapsed());
        ensure!(
            eventually(DEADLINE, || (repairs() == Some(time)).then_some(())).is_some(),
            "{}",
            agent.log()
        );
    }
    eprintln!("repaired after {took:?}");
    // The best of five: other work on the machine counts against the others.
    let best = took.iter().min().copied().unwrap_or_default();
    ensure!(best < patience(Duration::from_secs(1)), "{COUNT} rules are back after {took:?}");
    node.holds()
}
