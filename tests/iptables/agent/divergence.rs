//! Packets that one engine let through and the other did not.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use bridge_common::ABI_VERSION;
use bridge_lab::agent::Agent;
use bridge_lab::lab::Family;
use bridge_lab::traffic::{icmp, udp};
use bridge_lab::wait::eventually;
use serde_json::Value;

use super::node::{ALLOWED, DEADLINE, DENIED, MORE, Node, RULES, firewall};
use crate::support::BACKENDS;

const NODE_PORTS: &str = "nodePorts: {range: \"30000-32767\", allow: [30080]}\n";

fn divergence(agent: &Agent) -> Result<Value> {
    Ok(firewall(agent)?["divergence"].clone())
}

/// A number in the metrics.
fn metric(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
}

#[test]
fn ordinary_traffic_is_judged_alike_by_both_engines() -> Result<()> {
    for backend in BACKENDS {
        for mode in ["enforce", "audit"] {
            let node = Node::new(backend)?;
            let ping = "  - {name: ping, direction: inbound, protocol: icmp}\n";
            let rules = format!("{NODE_PORTS}{RULES}{ping}");
            let mode = format!("  mode: {mode}\n");
            let mut agent = node.start(&node.config("ebpf, iptables", &mode, &rules))?;
            let (a, b, c1) = (node.lab.a(), node.lab.b(), node.lab.c1());
            let mut denied = 0;
            for family in Family::BOTH {
                for _ in 0..3 {
                    node.connect(family, ALLOWED)?;
                    node.connect(family, DENIED)?;
                }
                let _server = udp::Server::echo(&c1.netns, c1.at(family, DENIED))?;
                udp::ask(&a.netns, 0, c1.at(family, DENIED), b"?", DEADLINE)?;
                ensure!(icmp::echo(&a.netns, c1.ip(family), DEADLINE)?.succeeded());
                let _ = bridge_lab::traffic::tcp::Client::new(&a.netns).connect(b.at(family, 30081))?;
                denied += 5;
            }
            // Each denied packet was reported and followed through the chains.
            let seen = eventually(DEADLINE, || {
                divergence(&agent).ok().filter(|seen| seen["compared"].as_u64() >= Some(denied))
            });
            seen.with_context(|| format!("{mode}{denied} denied: {:?}", divergence(&agent)))?;
            // A reload reads the counters first.
            agent.reload(&node.config("ebpf, iptables", &mode, &format!("{rules}{MORE}")))?;
            node.is_open()?;
            agent.reload(&node.config("ebpf, iptables", &mode, &rules))?;
            let seen = divergence(&agent)?;
            ensure!(
                seen["deniedByIptables"].as_object().is_some_and(serde_json::Map::is_empty),
                "{mode}{seen}"
            );
            assert_eq!((&seen["deniedByEbpf"], &seen["notCompared"]), (&0.into(), &0.into()), "{mode}{seen}");
            let metrics = agent.metrics()?;
            let zero = r#"bridge_divergence_total{denied_by="ebpf",reason="policy"}"#;
            assert_eq!(metric(&metrics, zero), Some(0), "{metrics}");
            ensure!(!agent.log().contains("eBPF let through") && !agent.log().contains("eBPF has denied"));
        }
    }
    Ok(())
}

/// eBPF is made to let everything pass, in the map that its programs read.
fn make_ebpf_lenient(agent: &Agent) -> Result<()> {
    let bpftool = |arguments: &[&str]| {
        let pin = agent.pins().join(format!("v{ABI_VERSION}/settings"));
        let mut command = Command::new("bpftool");
        command.args(["--json", "map", arguments[0], "pinned"]).arg(pin).args(&arguments[1..]);
        let output = command.output()?;
        ensure!(output.status.success(), "{output:?}");
        Ok(output.stdout)
    };
    let dump: Value = serde_json::from_slice(&bpftool(&["dump"])?)?;
    for (slot, entry) in (0..).zip(dump.as_array().context("slots")?) {
        let bytes = entry["value"].as_array().context("a value")?;
        let offset = std::mem::offset_of!(bridge_common::filter::control::Settings, audit);
        let bytes = bytes.iter().enumerate().map(|(at, byte)| {
            if at == offset { "0x01".to_owned() } else { byte.as_str().unwrap_or("0x00").to_owned() }
        });
        let mut arguments = vec!["update".to_owned(), "key".to_owned(), "hex".to_owned()];
        arguments.extend([format!("{slot:02x}"), "00".into(), "00".into(), "00".into()]);
        arguments.extend(["value".into(), "hex".into()]);
        arguments.extend(bytes.map(|byte| byte.trim_start_matches("0x").to_owned()));
        bpftool(&arguments.iter().map(String::as_str).collect::<Vec<_>>())?;
    }
    Ok(())
}

#[test]
fn what_iptables_alone_denies_is_counted_exactly_and_named() -> Result<()> {
    for backend in BACKENDS {
        let node = Node::new(backend)?;
        let config = node.config("ebpf, iptables", "", &format!("{NODE_PORTS}{RULES}"));
        let mut agent = node.start(&config)?;
        node.holds()?;
        make_ebpf_lenient(&agent)?;
        for family in Family::BOTH {
            for _ in 0..3 {
                let attempt = node.connect(family, DENIED)?;
                ensure!(attempt.refused(), "iptables does not hold by itself: {attempt}");
            }
        }
        let name = r#"bridge_divergence_total{denied_by="iptables",reason="no-rule"}"#;
        eventually(DEADLINE, || (metric(&agent.metrics().ok()?, name)? >= 6).then_some(()))
            .with_context(|| format!("not counted: {:?}", divergence(&agent)))?;
        let seen = divergence(&agent)?;
        assert_eq!(seen["deniedByIptables"], serde_json::json!({ "bridge:no-rule": 6 }), "{seen}");
        let logged = eventually(DEADLINE, || {
            let log = agent.log();
            log.lines()
                .find(|line| line.contains("iptables has denied packets that eBPF let through"))
                .map(str::to_owned)
        });
        let logged = logged.with_context(|| format!("not logged:\n{}", agent.log()))?;
        let (a, c1) = (node.lab.a(), node.lab.c1());
        let named = Family::BOTH.into_iter().any(|family| {
            logged.contains(&format!(" to {}", c1.at(family, DENIED)))
                && logged.contains(&a.ip(family).to_string())
        });
        ensure!(named, "no packet is named: {logged}");
        let text = agent.run(&["status"])?;
        ensure!(text.contains("6 packets denied by iptables alone (bridge:no-rule 6)"), "{text}");

        // Counted packets are not counted again after a reload: the next one reads the same counters.
        agent.reload(&config)?;
        agent.reload(&config)?;
        assert_eq!(divergence(&agent)?["deniedByIptables"], serde_json::json!({ "bridge:no-rule": 6 }));

        // A foreign rule among bridge's is a valid reason.
        agent.reload(&config.replace("[40002]", "[40002, 40004]"))?;
        let before = divergence(&agent)?["deniedByIptables"]["foreign"].clone();
        ensure!(before.is_null(), "{before}");
        let counted = eventually(DEADLINE, || {
            node.run("iptables -I BRIDGE-FORWARD -p tcp -m tcp --dport 40002 -j DROP").ok()?;
            send_syn(&node, ALLOWED).ok()?;
            divergence(&agent).ok()?["deniedByIptables"]["foreign"].as_u64()
        });
        counted.with_context(|| format!("not counted: {:?}", divergence(&agent)))?;
    }
    Ok(())
}

/// A SYN, without waiting for long whether anything comes back.
fn send_syn(node: &Node, port: u16) -> Result<()> {
    let to = node.lab.c1().at(Family::V4, port);
    let client = bridge_lab::traffic::tcp::Client::new(&node.lab.a().netns);
    client.deadline(std::time::Duration::from_millis(20)).connect(to)?;
    Ok(())
}

#[test]
fn what_ebpf_alone_denies_is_counted_and_named() -> Result<()> {
    for backend in BACKENDS {
        let node = Node::new(backend)?;
        let agent = node.start(&node.config("ebpf, iptables", "", RULES))?;
        // The watch puts it right within a second: again and again, until a packet comes in between.
        let counted = eventually(DEADLINE, || {
            node.run("iptables -I BRIDGE-FORWARD -s 192.168.31.67/32 -j ACCEPT").ok()?;
            send_syn(&node, DENIED).ok()?;
            divergence(&agent).ok()?["deniedByEbpf"].as_u64().filter(|packets| *packets > 0)
        });
        counted.with_context(|| format!("not counted: {:?}", divergence(&agent)))?;
        let to = node.lab.c1().at(Family::V4, DENIED);
        let (seen, from) = (divergence(&agent)?, node.lab.a().v4);
        let last = seen["lastDeniedByEbpf"].as_str().context("the last one")?.to_owned();
        ensure!(last.starts_with(&format!("tcp {from}:")) && last.ends_with(&format!(" to {to}")), "{last}");
        let logged = eventually(DEADLINE, || {
            let log = agent.log();
            log.lines().find(|line| line.contains("that iptables would have allowed")).map(str::to_owned)
        });
        let logged = logged.with_context(|| format!("not logged:\n{}", agent.log()))?;
        ensure!(logged.contains(&format!(" to {to}")), "{logged}");
        let text = agent.run(&["status"])?;
        ensure!(text.contains("by eBPF alone, last tcp "), "{text}");
        let name = r#"bridge_divergence_total{denied_by="ebpf",reason="policy"}"#;
        ensure!(metric(&agent.metrics()?, name) > Some(0));
    }
    Ok(())
}

#[test]
fn one_engine_has_nothing_to_be_compared_with() -> Result<()> {
    let node = Node::new(BACKENDS[0])?;
    let mut agent = node.start(&node.config("iptables", "", RULES))?;
    node.holds()?;
    ensure!(divergence(&agent)?.is_null());
    ensure!(!agent.metrics()?.contains("bridge_divergence"));
    agent.reload(&node.config("ebpf, iptables", "", RULES))?;
    assert_eq!(divergence(&agent)?["deniedByEbpf"], 0);
    agent.reload(&node.config("iptables", "", RULES))?;
    ensure!(divergence(&agent)?.is_null());
    Ok(())
}
