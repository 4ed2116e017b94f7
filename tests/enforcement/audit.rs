//! Rules in audit mode: they open nothing and close nothing, whichever engine enforces, and each is counted.

use anyhow::{Context as _, Result, ensure};
use bridge_lab::agent::Agent;
use bridge_lab::lab::{Family, Lab};
use bridge_lab::traffic::tcp;
use bridge_lab::wait::eventually;
use serde_json::Value;

use crate::support::{DEADLINE, DENIED, INBOUND, OUTBOUND, USUAL_RULES, config, json};

/// Rules in audit mode that would do the opposite of [`USUAL_RULES`].
const OPPOSITE: &str =
    "  - {name: would-close, direction: inbound, protocol: tcp, ports: [40002], action: deny, mode: audit}
  - {name: would-open, direction: inbound, protocol: tcp, ports: ['40000-40100'], mode: audit}
  - {name: would-close-out, direction: outbound, protocol: any, action: deny, mode: audit}
";

fn hits(agent: &Agent, rule: &str, engine: &str) -> Result<u64> {
    let rules = json(agent, &["rules"])?;
    let row =
        rules.as_array().into_iter().flatten().find(|row| row["name"] == rule).context(rules.to_string())?;
    ensure!(row["mode"] == if rule.starts_with("would") { "audit" } else { "enforce" }, "{row}");
    let hits = if engine == "ebpf" { &row["hits"] } else { &row[engine]["packets"] };
    hits.as_u64().with_context(|| format!("{engine}: {row}"))
}

#[test]
fn rules_in_audit_mode_change_no_verdict_and_count_in_every_engine() -> Result<()> {
    for engines in ["ebpf", "iptables", "nftables", "ebpf, iptables", "ebpf, nftables"] {
        let lab = Lab::builder().pods(1).build()?;
        let config = config("", &format!("{USUAL_RULES}{OPPOSITE}"))
            .replace("engines: [ebpf]", &format!("engines: [{engines}]"));
        let agent = Agent::start(&lab, lab.b(), &config)?;
        let (a, c1) = (lab.a(), lab.c1());
        for family in Family::BOTH {
            for (from, to, port, is_open) in [
                (a, c1, INBOUND, true),
                (a, c1, DENIED, false),
                (c1, a, OUTBOUND, true),
                (c1, a, DENIED, false),
            ] {
                let _server = tcp::Server::echo(&to.netns, to.at(family, port))?;
                let attempt = tcp::Client::new(&from.netns).connect(to.at(family, port))?.split().1;
                let as_wanted = if is_open { attempt.succeeded() } else { attempt.refused() };
                ensure!(as_wanted, "{engines}, {family:?}, port {port}: {attempt}");
            }
        }
        // A packet that eBPF denies does not come to the packet filter.
        for engine in engines.split(", ") {
            let sees_all = engine == engines.split(", ").next().unwrap_or_default();
            for (rule, all, passed) in
                [("in-tcp", 2, 2), ("would-close", 2, 2), ("would-open", 2, 0), ("would-close-out", 4, 2)]
            {
                let wanted = if sees_all { all } else { passed };
                let seen = hits(&agent, rule, engine)?;
                ensure!(seen == wanted, "{engines}: {rule} has {seen} hits in {engine}, and not {wanted}");
            }
        }
    }
    Ok(())
}

#[test]
fn rules_in_audit_mode_are_events_with_their_name() -> Result<()> {
    let lab = Lab::builder().pods(1).build()?;
    let agent = Agent::start(&lab, lab.b(), &config("", &format!("{USUAL_RULES}{OPPOSITE}")))?;
    let monitor = |verdict: &str| {
        let mut command = agent.command(&["monitor", "--json", "--verdict", verdict, "--count", "1"]);
        command.stdout(std::process::Stdio::piped()).spawn()
    };
    for (port, verdict, rule) in [(INBOUND, "audit", "would-close"), (DENIED, "audit-allow", "would-open")] {
        let mut reader = monitor(verdict)?;
        let to = lab.c1().at(Family::V4, port);
        let _server = tcp::Server::echo(&lab.c1().netns, to)?;
        let ended = eventually(DEADLINE, || {
            drop(tcp::Client::new(&lab.a().netns).connect(to));
            reader.try_wait().ok().flatten()
        });
        if ended.is_none() {
            reader.kill()?;
        }
        let output = reader.wait_with_output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let event: Value = serde_json::from_str(text.lines().next().context("no event")?)?;
        ensure!(event["verdict"] == verdict && event["rule"] == rule, "{event}");
    }
    Ok(())
}
