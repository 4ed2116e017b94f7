//! Beside the rules of others, as those programs write them: neither touches the other, and both hold.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use bridge_lab::lab::Family;
use bridge_lab::traffic::tcp;
use bridge_lab::wait::eventually;

use crate::node::{ALLOWED, DEADLINE, DENIED, Node, RULES, config, firewall};

/// A port that bridge allows, and some of the others deny.
const REFUSED: u16 = 40009;
const ENGINES: [&str; 3] = ["nftables", "iptables", "ebpf, nftables"];

/// A program with rules of its own. Its files are in `foreign`, whose README says how they were made.
#[derive(Clone, Copy, Debug)]
struct Program {
    /// Begins the names of its files.
    name: &'static str,
    /// Whether its files are of iptables-save.
    by_iptables: bool,
    /// Whether it denies connections to [`REFUSED`].
    refuses: bool,
    /// Commands by which it removes its own rules, before it writes them again.
    flush: &'static [&'static str],
    /// Whether it has Services.
    services: bool,
}

const FIREWALLD: Program = Program {
    name: "firewalld",
    by_iptables: false,
    refuses: true,
    flush: &["nft delete table inet firewalld"],
    services: false,
};
const UFW: Program = Program {
    name: "ufw",
    by_iptables: true,
    refuses: true,
    // With its files, iptables-restore replaces whole tables.
    flush: &[],
    services: false,
};
const DOCKER: Program = Program {
    name: "docker",
    by_iptables: true,
    refuses: true,
    // Its start puts its own jumps first.
    flush: &[
        "iptables -F DOCKER",
        "iptables -D FORWARD -j DOCKER-USER",
        "iptables -I FORWARD -j DOCKER-USER",
        "iptables -D FORWARD -j DOCKER-ISOLATION-STAGE-1",
        "iptables -I FORWARD -j DOCKER-ISOLATION-STAGE-1",
        // The administrator's chain may accept everything.
        "iptables -I DOCKER-USER -j ACCEPT",
    ],
    services: false,
};
const KUBE_PROXY: Program = Program {
    name: "kube-proxy",
    by_iptables: false,
    refuses: false,
    flush: &["nft delete table ip kube-proxy", "nft delete table ip6 kube-proxy"],
    services: true,
};
const KUBE_PROXY_BY_IPTABLES: Program = Program {
    by_iptables: true,
    flush: &["iptables -F KUBE-FORWARD", "iptables -F KUBE-SERVICES"],
    ..KUBE_PROXY
};

fn file(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("nftables/foreign").join(name)
}

impl Program {
    /// Loads its rules: in place of the tables that it finds, if they are those of iptables.
    fn load(&self, node: &Node) -> Result<()> {
        if !self.by_iptables {
            return node.run(&format!("nft -f {}", file(&format!("{}.nft", self.name)).display())).map(drop);
        }
        for (program, ending) in [("iptables-nft-restore", "v4"), ("ip6tables-nft-restore", "v6")] {
            node.run(&format!("{program} {}", file(&format!("{}.{ending}", self.name)).display()))?;
        }
        Ok(())
    }

    /// Beside `engines`, through start, reload, their own reload, and `down`.
    fn beside(&self, engines: &str) -> Result<()> {
        let name = self.name;
        let node = Node::new()?;
        self.load(&node)?;
        let before = foreign(&node.dump()?);
        let more =
            format!("{RULES}  - {{name: other, direction: inbound, protocol: tcp, ports: [{REFUSED}]}}\n");
        let mut agent = node.start(&config(engines, &more))?;
        let unchanged = |when: &str| -> Result<()> {
            let now = foreign(&node.dump()?);
            ensure!(now == before, "{name}, {engines}, {when}:\n{now:#?}\ninstead of\n{before:#?}");
            Ok(())
        };
        node.holds()?;
        unchanged("after the start")?;
        // bridge only restricts: what others deny stays denied.
        let refused = !node.connect(Family::V4, REFUSED)?.succeeded();
        ensure!(refused == self.refuses, "{name}, {engines}: {REFUSED}");
        if self.services {
            services(&node)?;
        }
        agent.reload(&config(engines, RULES))?;
        node.holds()?;
        unchanged("after a reload")?;

        let repairs = || firewall(&agent).ok()?["repairs"].as_u64();
        let undisturbed = repairs();
        for command in self.flush {
            node.run(command)?;
        }
        self.load(&node)?;
        node.settles(&agent)?;
        unchanged("after a reload of theirs")?;
        if engines.contains("nftables") {
            ensure!(repairs() == undisturbed, "{name}, {engines}: the table was damaged: {}", agent.log());
        }
        if self.services {
            services(&node)?;
        }
        // As nftables.service and some installations of firewalld begin.
        node.run("nft flush ruleset")?;
        self.load(&node)?;
        node.settles(&agent)?;
        unchanged("after the ruleset was flushed")?;
        let noticed = eventually(DEADLINE, || (repairs() > undisturbed).then_some(()));
        ensure!(noticed.is_some(), "{name}, {engines}: {}", firewall(&agent)?);

        agent.stop()?;
        agent.run(&["down"])?;
        unchanged("after `down`")?;
        let left = node.dump()?;
        ensure!(!left.contains("BRIDGE-") && !node.has_table()?, "{name}, {engines}:\n{left}");
        Ok(())
    }
}

/// The tables of others with their content; those of iptables without the chains of bridge and the jumps to them, and without
/// tables that hold nothing else.
fn foreign(dump: &str) -> BTreeMap<String, String> {
    let mut tables = BTreeMap::new();
    for table in dump.split("\n}\n").filter(|table| !table.trim().is_empty()) {
        let (header, content) = table.trim_start().split_once('\n').unwrap_or((table, ""));
        let chains = content.split("\n\n").filter(|chain| !chain.trim_start().starts_with("chain BRIDGE-"));
        let chains: Vec<String> = chains
            .map(|chain| {
                let lines = chain.lines().filter(|line| !line.contains("BRIDGE-"));
                lines.collect::<Vec<_>>().join("\n")
            })
            .collect();
        let is_empty = chains.iter().all(|chain| chain.lines().count() <= 3 && chain.contains("hook "));
        if !header.contains("inet bridge-agent ") && !is_empty {
            tables.insert(header.to_owned(), chains.join("\n\n"));
        }
    }
    tables
}

/// Connections through Services are judged by the pod's port.
fn services(node: &Node) -> Result<()> {
    let lab = &node.lab;
    let (a, c1) = (lab.a(), lab.c1());
    let _routes = [Family::V4, Family::V6].map(|family| {
        let (network, via) = match family {
            Family::V4 => ("10.96.0.0/16", "192.168.31.17"),
            Family::V6 => ("fd96::/112", "fd31::17"),
        };
        a.netns.ip(&format!("route replace {network} via {via}"))
    });
    let mut servers = Vec::new();
    for family in Family::BOTH {
        for port in [ALLOWED, DENIED] {
            servers.push(tcp::Server::echo(&c1.netns, c1.at(family, port))?);
        }
    }
    for (to, passes) in [
        ("192.168.31.17:30080", true),
        ("192.168.31.17:30081", false),
        ("[fd31::17]:30080", true),
        ("[fd31::17]:30081", false),
        ("10.96.0.10:80", true),
        ("10.96.0.11:80", false),
        ("[fd96::10]:80", true),
        ("[fd96::11]:80", false),
    ] {
        let to: SocketAddr = to.parse()?;
        let attempt = tcp::Client::new(&a.netns).deadline(DEADLINE / 4).connect(to)?;
        ensure!(attempt.succeeded() == passes, "{to}: {}", attempt.split().1);
    }
    Ok(())
}

fn beside_each_engine(program: Program) -> Result<()> {
    for engines in ENGINES {
        eprintln!("{}: {engines}", program.name);
        program.beside(engines)?;
    }
    Ok(())
}

#[test]
fn beside_firewalld() -> Result<()> {
    beside_each_engine(FIREWALLD)
}

#[test]
fn beside_ufw() -> Result<()> {
    beside_each_engine(UFW)
}

#[test]
fn beside_docker() -> Result<()> {
    beside_each_engine(DOCKER)
}

#[test]
fn beside_kube_proxy_in_nftables_mode() -> Result<()> {
    beside_each_engine(KUBE_PROXY)
}

#[test]
fn beside_kube_proxy_in_iptables_mode() -> Result<()> {
    beside_each_engine(KUBE_PROXY_BY_IPTABLES)
}

#[test]
fn the_files_of_others_have_no_rule_of_bridge() -> Result<()> {
    for entry in fs::read_dir(file(""))? {
        let path = entry?.path();
        let text = fs::read_to_string(&path)?;
        ensure!(!text.contains("BRIDGE-") && !text.contains("bridge-agent"), "{}", path.display());
    }
    Ok(())
}

#[test]
fn a_chain_of_others_that_accepts_opens_nothing() -> Result<()> {
    let node = Node::new()?;
    node.load(
        "table inet ufw {\n chain forward {\n  type filter hook forward priority -20; policy accept;\n  accept\n }\n}\n",
    )?;
    let _agent = node.start(&config("nftables", RULES))?;
    node.holds()?;
    let allowed = node.connect(Family::V6, ALLOWED)?;
    ensure!(allowed.succeeded(), "{allowed}");
    Ok(())
}
