//! Changes by other programs to the rules while the agent runs.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bridge_lab::agent::Agent;
use bridge_lab::wait::eventually;

use super::node::{DEADLINE, Node, RULES, firewall};
use crate::support::BACKENDS;

/// How long damage may last.
const LIMIT: Duration = Duration::from_secs(1);

#[test]
fn damage_is_mended_within_a_second_told_and_counted() -> Result<()> {
    for backend in BACKENDS {
        let node = Node::new(backend)?;
        node.add_foreign_rules()?;
        let agent = node.start(&node.config("ebpf, iptables", "", RULES))?;
        let before = node.dump()?;
        let (mut times, mut repairs) = (Vec::new(), 0);
        for (damage, reason) in [
            ("iptables -F BRIDGE-INBOUND", "chain BRIDGE-INBOUND was changed"),
            ("ip6tables -F FORWARD", "the jump to bridge was removed"),
            ("iptables -D BRIDGE-OUTBOUND 3", "chain BRIDGE-OUTBOUND was changed"),
            ("iptables -I FORWARD -s 198.51.100.7/32 -j ACCEPT", "the jump to bridge is no longer first"),
        ] {
            let start = Instant::now();
            node.run(damage)?;
            eventually(DEADLINE, || {
                let dump = node.dump().ok()?;
                let own = |dump: &str| {
                    let lines =
                        dump.lines().filter(|line| line.contains("BRIDGE-") && !line.contains("not for"));
                    lines.map(str::to_owned).collect::<Vec<_>>()
                };
                let first = dump.lines().find(|line| line.starts_with("-A FORWARD"))?;
                (own(&dump) == own(&before) && first.ends_with("BRIDGE-FORWARD")).then_some(())
            })
            .with_context(|| format!("{damage}: not mended:\n{}", node.dump().unwrap_or_default()))?;
            times.push(start.elapsed());
            repairs += 1;
            let status = eventually(DEADLINE, || {
                firewall(&agent).ok().filter(|status| status["repairs"].as_u64() == Some(repairs))
            });
            let status = status.with_context(|| format!("{damage}: not counted"))?;
            ensure!(
                status["lastRepair"].as_str().is_some_and(|last| last.contains(reason)),
                "{damage}: {status}"
            );
            let line = format!("bridge_iptables_repairs_total {repairs}");
            let metrics = agent.metrics()?;
            ensure!(metrics.lines().any(|other| other == line), "{line} is not in\n{metrics}");
        }
        eprintln!("mended after {times:?}");
        times.sort();
        // Other tests run beside this one, and may take the processor for a while.
        ensure!(times[times.len() / 2] < LIMIT, "{times:?}");
        let text = agent.run(&["status"])?;
        ensure!(text.contains("restored 4 times") && text.contains("no longer first"), "{text}");
        ensure!(
            node.dump()?.contains("-A FORWARD -s 198.51.100.7/32 -j ACCEPT"),
            "a foreign rule was taken away"
        );
        node.holds()?;
    }
    Ok(())
}

#[test]
fn a_repair_leaves_the_other_chains_and_their_counters() -> Result<()> {
    for backend in BACKENDS {
        let node = Node::new(backend)?;
        let agent = node.start(&node.config("iptables", "", RULES))?;
        node.holds()?;
        let inbound = || -> Result<Vec<String>> {
            let saved = node.run("iptables-save -c -t filter")?;
            Ok(saved.lines().filter(|line| line.contains("-A BRIDGE-INBOUND")).map(str::to_owned).collect())
        };
        let before = inbound()?;
        ensure!(before.iter().any(|line| line.starts_with("[1:")), "{before:?}");
        node.run("iptables -F BRIDGE-OUTBOUND")?;
        let repaired = || firewall(&agent).ok()?["repairs"].as_u64().filter(|repairs| *repairs == 1);
        eventually(DEADLINE, repaired).context("not mended")?;
        assert_eq!(inbound()?, before);
        ensure!(node.run("iptables -S BRIDGE-OUTBOUND")?.contains("devices"));
    }
    Ok(())
}

/// `BRIDGE_AGENT=target/release/bridge-agent cargo test -p bridge-tests --test iptables ten_thousand_rules_cost -- \
/// --ignored --nocapture`
#[test]
#[ignore = "prints figures; of use with a release build of the agent only"]
fn ten_thousand_rules_cost() -> Result<()> {
    for backend in BACKENDS {
        let node = Node::new(backend)?;
        let mut rules = RULES.to_owned();
        for n in 0..10_000 {
            let host = n % 250 + 1;
            let port = n + 1000;
            let sources = "sourcePorts: [\"61001-61100\"]";
            let rule = format!(
                "name: rule-{n}, direction: inbound, protocol: tcp, external: [192.168.31.{host}/32]"
            );
            writeln!(rules, "  - {{{rule}, ports: [{port}], {sources}}}")?;
        }
        let start = Instant::now();
        let mut agent = node.start(&node.config("ebpf, iptables", "", &rules))?;
        println!("started in {:?}; {:?} of CPU", start.elapsed(), cpu(&agent)?);
        let start = Instant::now();
        agent.reload(&node.config("ebpf, iptables", "", &rules.replace("40002", "40005")))?;
        println!("reloaded in {:?}", start.elapsed());
        let lines = node.run("iptables-save -t filter")?.matches("-A BRIDGE-INBOUND -s ").count();
        ensure!(lines == 10_000, "{lines}");
        for damage in ["iptables -F BRIDGE-OUTBOUND", "iptables -F BRIDGE-INBOUND", "iptables -D FORWARD 1"] {
            let repairs = || firewall(&agent).ok()?["repairs"].as_u64();
            let before = repairs();
            node.run(damage)?;
            let start = Instant::now();
            // By the cheapest question: reading all rules takes longer than the measured time.
            let rule = if damage.contains("FORWARD") { "FORWARD 1" } else { damage.split_at(12).1 };
            eventually(DEADLINE, || {
                let listed = node.run(&format!("iptables -S {rule}")).ok()?;
                listed.contains("--comment").then_some(())
            })
            .context("not mended")?;
            println!("{damage}: mended after {:?}", start.elapsed());
            eventually(DEADLINE, || (repairs() > before).then_some(())).context("not counted")?;
        }
        let (before, begun) = (cpu(&agent)?, Instant::now());
        std::thread::sleep(Duration::from_secs(20));
        println!("{:?} of CPU in {:?}, its children's included", cpu(&agent)? - before, begun.elapsed());
    }
    Ok(())
}

/// CPU time of the agent and of the programs that it has run.
fn cpu(agent: &Agent) -> Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", agent.pid()))?;
    // proc_pid_stat(5): utime, stime, cutime and cstime are fields 14 to 17, in ticks of 10 ms; the name is the second.
    let after_name = stat.rsplit_once(')').context("a name")?.1;
    let ticks = after_name.split_whitespace().skip(11).take(4).map(str::parse::<u64>);
    Ok(Duration::from_millis(ticks.sum::<Result<u64, _>>()? * 10))
}
