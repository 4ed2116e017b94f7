//! A failed change is reported, and the active rules stay active.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bridge_agent::iptables::Backend;
use bridge_lab::agent::Agent;
use bridge_lab::wait::{eventually, patience};
use rustix::fs::{FlockOperation, flock};

use super::node::{MORE, Node, RULES, json};
use crate::support::BACKENDS;

/// Why the last reload was refused.
fn refusal(agent: &Agent) -> Result<String> {
    let last = json(agent, &["status"])?["agent"]["reloads"]["last"].clone();
    Ok(last["error"].as_str().with_context(|| format!("not refused: {last}\n{}", agent.log()))?.to_owned())
}

/// Rules that iptables can hold, and eBPF cannot: too many pairs of addresses.
fn too_many_pairs() -> String {
    let address = |base: &str, n: u32| format!("{base}.{}.{}/32", n / 250, n % 250 + 1);
    let list = |base: &str| (0..2_100).map(|n| address(base, n)).collect::<Vec<_>>().join(", ");
    let mut rules = RULES.to_owned();
    for n in 0..2_000 {
        let (host, pod) = (address("10.10", n), address("10.20", n));
        let _ = writeln!(
            rules,
            "  - {{name: small-{n}, direction: inbound, protocol: tcp, external: [{host}], pods: [{pod}], ports: [80]}}"
        );
    }
    let (hosts, pods) = (list("10.10"), list("10.20"));
    let all = "{name: everybody-to-all, direction: inbound, protocol: tcp, ports: [81]";
    rules + &format!("  - {all}, external: [{hosts}], pods: [{pods}]}}\n")
}

#[test]
fn a_policy_that_ebpf_refuses_does_not_reach_iptables() -> Result<()> {
    for backend in BACKENDS {
        let node = Node::new(backend)?;
        let config = node.config("ebpf, iptables", "", RULES);
        let mut agent = node.start(&config)?;
        let before = node.dump()?;
        // Other settings of iptables, too.
        let other = node
            .config("ebpf, iptables", "  scope: strict\n", &too_many_pairs())
            .replace("10.200.1.0/24,", "10.200.1.0/24, 10.20.0.0/16,")
            .replace("192.168.31.0/24,", "192.168.31.0/24, 10.10.0.0/16,")
            .replace("lockWait: 1s", "lockWait: 1s, logRate: 3");
        agent.reload(&other)?;
        let error = refusal(&agent)?;
        ensure!(error.contains("everybody-to-all") && error.contains("pairs of address lists"), "{error}");
        let log = agent.log();
        ensure!(log.matches("iptables rules active").count() == 1, "iptables was changed:\n{log}");
        let as_before = || {
            eventually(patience(Duration::from_secs(10)), || (node.dump().ok()? == before).then_some(()))
                .with_context(|| {
                    format!("{}\nand not\n{before}\n{}", node.dump().unwrap_or_default(), agent.log())
                })
        };
        // The file and the signal may have set off a reload each, of which the second may be going on: the agent reports
        // the first meanwhile.
        as_before()?;
        node.holds()?;

        // And the watch goes on with the rules of before.
        node.run("iptables -F BRIDGE-INBOUND")?;
        as_before()?;
    }
    Ok(())
}

#[test]
fn a_rule_that_takes_too_many_iptables_rules_is_refused_at_once() -> Result<()> {
    // A rule for each pair of fifteen ports: 147,456 of them, in a minute.
    let list = |first: u16| (0..5_759).map(|n| (first + n * 2).to_string()).collect::<Vec<_>>().join(", ");
    let rule = format!(
        "  - {{name: every-pair, direction: inbound, protocol: tcp, ports: [{}], sourcePorts: [{}]}}\n",
        list(1),
        list(20_001)
    );
    for engines in ["iptables", "ebpf, iptables"] {
        let node = Node::new(Backend::Nft)?;
        let mut agent = node.start(&node.config(engines, "", RULES))?;
        let before = node.dump()?;
        let start = Instant::now();
        agent.reload(&node.config(engines, "", &format!("{RULES}{rule}")))?;
        ensure!(start.elapsed() < patience(Duration::from_secs(5)), "{:?}", start.elapsed());
        let error = refusal(&agent)?;
        ensure!(error.contains("needs 147458 iptables rules, and 20000 are allowed"), "{error}");
        ensure!(error.contains("`every-pair`"), "{error}");
        ensure!(node.dump()? == before, "{}", node.dump()?);
        node.holds()?;
        let status = fs::read_to_string(format!("/proc/{}/status", agent.pid()))?;
        let peak = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse().ok());
        ensure!(peak.is_some_and(|kib: u64| kib < 128 * 1024), "{peak:?} KiB");
    }
    Ok(())
}

#[test]
fn a_rule_that_the_kernel_refuses_is_named_and_the_rules_of_before_stay() -> Result<()> {
    for backend in BACKENDS {
        let node = Node::new(backend)?;
        let mut agent = node.start(&node.config("ebpf, iptables", "", RULES))?;
        let before = node.dump()?;
        // As if the kernel lacked a feature of the rule: this iptables-restore asks it for a reset as the answer to a
        // datagram, which it refuses. The programs are looked up again with each call.
        let program = format!("iptables-{}-restore", backend.name());
        let fake = node.programs().join(&program);
        let edit = "/--comment \"more\"/s/-p tcp.*/-p udp -j REJECT --reject-with tcp-reset/";
        fs::write(&fake, format!("#!/bin/sh\nsed '{edit}' | exec /usr/sbin/{program} \"$@\"\n"))?;
        fs::set_permissions(&fake, fs::Permissions::from_mode(0o755))?;

        agent.reload(&node.config("ebpf, iptables", "", &format!("{RULES}{MORE}")))?;
        let error = refusal(&agent)?;
        ensure!(error.contains("rule \"more\" is refused, the rules are as before"), "{error}");
        assert_eq!(node.dump()?, before);
        node.holds()?;
        fs::remove_file(&fake)?;
        agent.reload(&node.config("ebpf, iptables", "", &format!("{RULES}{MORE}")))?;
        node.is_open()?;
    }
    Ok(())
}

#[test]
fn a_held_lock_is_an_error_in_time_and_the_rules_of_before_stay() -> Result<()> {
    // The one that has a lock; nf_tables commits in transactions.
    let node = Node::new(Backend::Legacy)?;
    let lock = File::options().write(true).create(true).truncate(false).open(node.lock_file())?;
    flock(&lock, FlockOperation::LockExclusive)?;
    let begun = Instant::now();
    let error = node.start(&node.config("iptables", "", RULES)).unwrap_err().to_string();
    ensure!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    ensure!(error.contains("has held the xtables lock for 1 s") && error.contains("fuser -v"), "{error}");
    node.is_open()?;
    flock(&lock, FlockOperation::Unlock)?;

    let mut agent = node.start(&node.config("ebpf, iptables", "", RULES))?;
    let before = node.dump()?;
    flock(&lock, FlockOperation::LockExclusive)?;
    let more = node.config("ebpf, iptables", "", &format!("{RULES}{MORE}"));
    let begun = Instant::now();
    agent.reload(&more)?;
    ensure!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    let error = refusal(&agent)?;
    ensure!(
        error.contains("has held the xtables lock for 1 s") && error.contains("rules are as before"),
        "{error}"
    );
    flock(&lock, FlockOperation::Unlock)?;
    assert_eq!(node.dump()?, before);
    node.holds()?;
    agent.reload(&more)?;
    node.is_open()
}
