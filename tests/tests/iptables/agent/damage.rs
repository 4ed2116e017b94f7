//! What other programs do to the rules while the agent runs.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bridge_tests::wait::eventually;

use super::node::{DEADLINE, Node, RULES, firewall, metrics};
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
        for (damage, told) in [
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
                status["lastRepair"].as_str().is_some_and(|last| last.contains(told)),
                "{damage}: {status}"
            );
            let line = format!("bridge_iptables_repairs_total {repairs}");
            let metrics = metrics(&node, &agent)?;
            ensure!(metrics.lines().any(|other| other == line), "{line} is not in\n{metrics}");
        }
        eprintln!("mended after {times:?}");
        times.sort();
        // Other tests run beside this one, and may take the processor for a while.
        ensure!(times[times.len() / 2] < LIMIT, "{times:?}");
        let text = agent.run(&["status"])?;
        ensure!(text.contains("put back 4 times") && text.contains("no longer first"), "{text}");
        ensure!(
            node.dump()?.contains("-A FORWARD -s 198.51.100.7/32 -j ACCEPT"),
            "a foreign rule was taken away"
        );
        node.holds()?;
    }
    Ok(())
}
