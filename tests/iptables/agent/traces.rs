//! What stays when the agent ends, and what goes with `down`.

use std::{
    fs,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Result, ensure};
use bridge_agent::iptables::Backend;

use super::node::{MORE, Node, RULES, plain};
use crate::support::{BACKENDS, FOREIGN};

const NODE_PORTS: &str = "nodePorts: {range: \"30000-32767\", allow: [30080]}\n";

/// A first start, a reload, a crash, a second start, a stop.
fn live(node: &Node, engines: &str) -> Result<bridge_lab::agent::Agent> {
    let config = node.config(engines, "", &format!("{NODE_PORTS}{RULES}"));
    let mut agent = node.start(&config)?;
    agent.reload(&format!("{config}{MORE}"))?;
    agent.kill()?;
    agent.restart()?;
    agent.stop()?;
    ensure!(node.dump()?.contains("BRIDGE-NODEPORT"));
    Ok(agent)
}

#[test]
fn down_leaves_the_tables_as_they_were_before_the_first_start() -> Result<()> {
    for backend in BACKENDS {
        for engines in ["ebpf, iptables", "iptables"] {
            let node = Node::new(backend)?;
            node.add_foreign_rules()?;
            let before = node.dump()?;
            assert_eq!(
                before.matches("COMMIT").count(),
                6,
                "raw, mangle and filter, IPv4 and IPv6:\n{before}"
            );
            let agent = live(&node, engines)?;
            agent.run(&["down"])?;
            assert_eq!(node.dump()?, before);
            // A second time there is nothing to do.
            agent.run(&["down"])?;
            assert_eq!(node.dump()?, before);
            node.is_open()?;
        }
    }
    Ok(())
}

#[test]
fn down_leaves_nothing_where_there_was_nothing() -> Result<()> {
    let node = Node::new(Backend::Nft)?;
    let before = node.dump()?;
    ensure!(before.is_empty(), "{before}");
    live(&node, "ebpf, iptables")?.run(&["down"])?;
    assert_eq!(node.dump()?, before);

    // x_tables cannot remove a table: it stays, empty, and that is said.
    let node = Node::new(Backend::Legacy)?;
    ensure!(node.dump()?.is_empty());
    let said = live(&node, "ebpf, iptables")?.run(&["down"])?;
    for table in
        ["raw", "mangle", "filter"].iter().flat_map(|t| ["IPv4", "IPv6"].map(|f| format!("{f} table {t}")))
    {
        ensure!(said.contains(&format!("{table} of iptables-legacy was not there before")), "{said}");
    }
    let after = node.dump()?;
    let rules =
        after.lines().find(|l| !(l.starts_with('*') || l.ends_with(" ACCEPT [0:0]") || *l == "COMMIT"));
    ensure!(rules.is_none(), "{after}");
    Ok(())
}

#[test]
fn down_leaves_nothing_while_another_program_writes_to_nf_tables() -> Result<()> {
    let node = Node::new(Backend::Nft)?;
    let agent = live(&node, "ebpf, iptables")?;
    let end = AtomicBool::new(false);
    thread::scope(|scope| {
        let busy = scope.spawn(|| -> Result<()> {
            while !end.load(Ordering::Relaxed) {
                node.run("iptables -t nat -N BUSY")?;
                thread::sleep(Duration::from_millis(20));
                node.run("iptables -t nat -X BUSY")?;
                thread::sleep(Duration::from_millis(20));
            }
            Ok(())
        });
        let down = agent.run(&["down"]);
        end.store(true, Ordering::Relaxed);
        busy.join().map_err(|_| anyhow::anyhow!("the other program panicked"))??;
        down
    })?;
    let after = node.dump()?;
    let left: Vec<_> = after.lines().filter(|line| line.starts_with('*') && *line != "*nat").collect();
    ensure!(left.is_empty(), "{left:?} of\n{after}");
    Ok(())
}

#[test]
fn rules_outlive_the_agent_and_are_not_doubled_by_the_next() -> Result<()> {
    for backend in BACKENDS {
        let node = Node::new(backend)?;
        node.add_foreign_rules()?;
        let mut agent = node.start(&node.config("ebpf, iptables", "", RULES))?;
        let running = node.dump()?;
        agent.stop()?;
        assert_eq!(node.dump()?, running, "SIGTERM");
        node.holds()?;
        for _ in 0..2 {
            agent.restart()?;
            assert_eq!(node.dump()?, running, "started again");
            agent.kill()?;
            assert_eq!(node.dump()?, running, "kill -9");
            node.holds()?;
        }
    }
    Ok(())
}

#[test]
fn the_saved_file_alone_gives_the_same_chains_and_the_same_verdicts() -> Result<()> {
    for backend in BACKENDS {
        let node = Node::new(backend)?;
        let path = |name: &str| node.etc().join(name);
        fs::create_dir_all(path("iptables"))?;
        let others = FOREIGN.replace(":FORWARD DROP", ":FORWARD ACCEPT");
        fs::write(path("iptables/rules.v4"), &others)?;
        node.feed("iptables-restore", &others)?;

        let mut agent = node.start(&node.config("iptables", "", &format!("{NODE_PORTS}{RULES}")))?;
        let running = node.dump()?;
        agent.reload(&node.config("iptables", "", &format!("{NODE_PORTS}{RULES}{MORE}")))?;
        ensure!(fs::read_to_string(path("iptables/rules.v4"))?.contains("40003"), "a reload is not saved");
        agent.reload(&node.config("iptables", "", &format!("{NODE_PORTS}{RULES}")))?;
        agent.stop()?;

        // As a reboot would.
        for program in ["iptables", "ip6tables"] {
            for table in ["raw", "mangle", "filter"] {
                node.run(&format!("{program} -t {table} -F"))?;
                node.run(&format!("{program} -t {table} -X"))?;
            }
        }
        node.is_open()?;
        for (program, file) in [("iptables", "iptables/rules.v4"), ("ip6tables", "iptables/rules.v6")] {
            node.feed(&format!("{program}-restore"), &fs::read_to_string(path(file))?)?;
        }
        assert_eq!(node.dump()?, plain(&running));
        node.holds()?;

        agent.run(&["down"])?;
        assert_eq!(fs::read_to_string(path("iptables/rules.v4"))?, others);
        ensure!(!path("iptables/rules.v6").exists(), "was not there before");
        node.is_open()?;
    }
    Ok(())
}

#[test]
fn never_saves_nothing() -> Result<()> {
    let node = Node::new(Backend::Nft)?;
    let file = node.etc().join("iptables/rules.v4");
    fs::create_dir_all(node.etc().join("iptables"))?;
    fs::write(&file, FOREIGN)?;
    let _agent =
        node.start(&node.config("iptables", "", &format!("persistence: {{save: never}}\n{RULES}")))?;
    ensure!(node.dump()?.contains("BRIDGE-FORWARD"));
    assert_eq!(fs::read_to_string(&file)?, FOREIGN);
    Ok(())
}
