//! Beside the rules of others: neither touches the other, and both hold.

use anyhow::{Result, ensure};
use bridge_lab::lab::Family;
use bridge_lab::wait::eventually;

use crate::node::{ALLOWED, DEADLINE, Node, RULES, config};

/// As firewalld 2, kube-proxy in its nftables mode, docker (through iptables-nft) and ufw leave them, shortened.
const OTHERS: [(&str, &str); 3] = [
    (
        "firewalld",
        "table inet firewalld {\n chain filter_PREROUTING {\n  type filter hook prerouting priority filter + 10; policy accept;\n\
         icmpv6 type { nd-router-advert, nd-neighbor-solicit } accept\n }\n chain filter_FORWARD {\n  type filter hook forward \
         priority filter + 10; policy accept;\n  ct state { established, related } accept\n  ct status dnat accept\n \
         tcp dport 40009 reject\n }\n}\n",
    ),
    (
        "kube-proxy",
        "table ip kube-proxy {\n set cluster-ips {\n  type ipv4_addr\n  elements = { 10.96.0.1 }\n }\n map service-ips {\n \
         type ipv4_addr . inet_proto . inet_service : verdict\n }\n chain nat-prerouting {\n  type nat hook prerouting priority \
         dstnat; policy accept;\n  ip daddr . meta l4proto . th dport vmap @service-ips\n }\n chain filter-forward {\n  type filter hook \
         forward priority filter - 1; policy accept;\n  ct state new ip daddr @cluster-ips reject\n }\n}\n",
    ),
    (
        "docker",
        "table ip filter {\n chain DOCKER-USER {\n }\n chain FORWARD {\n  type filter hook forward priority filter; policy accept;\n \
         counter jump DOCKER-USER\n  tcp dport 40009 drop\n }\n}\ntable ip nat {\n chain POSTROUTING {\n  type nat hook postrouting \
         priority srcnat; policy accept;\n  ip saddr 172.17.0.0/16 oifname != \"docker0\" masquerade\n }\n}\n",
    ),
];

fn foreign(dump: &str) -> String {
    let own = dump.find("table inet bridge-agent {").unwrap_or(dump.len());
    let end = dump[own..].find("\n}\n").map_or(dump.len(), |end| own + end + 3);
    dump[..own].to_owned() + &dump[end..]
}

#[test]
fn rules_of_others_stay_and_hold() -> Result<()> {
    for (name, rules) in OTHERS {
        eprintln!("{name}");
        let node = Node::new()?;
        node.load(rules)?;
        let before = node.dump()?;
        let mut agent = node.start(&config(
            "nftables",
            &format!("{RULES}  - {{name: other, direction: inbound, protocol: tcp, ports: [40009]}}\n"),
        ))?;
        node.holds()?;
        ensure!(foreign(&node.dump()?) == before, "{name}:\n{}", node.dump()?);
        // bridge only restricts: what others deny stays denied.
        if rules.contains("40009") {
            let denied = node.connect(Family::V4, 40009)?;
            ensure!(!denied.succeeded(), "{name}: {denied}");
        }
        agent.reload(&config("nftables", RULES))?;
        // The other program starts again.
        node.run("nft flush ruleset")?;
        node.load(rules)?;
        let back = || node.has_table().ok()?.then_some(());
        ensure!(eventually(DEADLINE, back).is_some(), "{name}: {}", agent.log());
        node.holds()?;
        agent.stop()?;
        agent.run(&["down"])?;
        ensure!(node.dump()? == before, "{name}:\n{}", node.dump()?);
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
