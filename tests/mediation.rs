//! Every known way past the default deny, with each engine and both. `cargo xtask mediation` prints the table. Needs root.

use anyhow::{Result, ensure};
use bridge_lab::mediation::{ATTEMPTS, Row, Setting};

/// Attempts that do not hold yet: engines, name. An entry that begins to hold fails the test, and is to be removed.
const NOT_YET: &[(&str, &str)] = &[
    ("ebpf", "a flow opened in a pod's name"),
    ("ebpf", "a simultaneous open in a pod's name"),
    ("ebpf", "foreign, node's, mapped and pods' sources from the LAN"),
    ("ebpf", "a pod with another's address"),
    ("ebpf", "a pod resets another's connection"),
    ("ebpf", "many VLAN tags of id 0"),
    ("ebpf", "later fragments and ICMP errors without a flow"),
    ("ebpf", "an allowed NodePort opens another"),
    ("ebpf", "a NodePort by a link-local address"),
    ("ebpf", "NodePort, no nodePorts section"),
    ("ebpf", "pod -> Service -> LAN host"),
    ("ebpf", "pod -> Service -> LAN host, masqueraded"),
    ("ebpf", "hostPort, LoadBalancer and ClusterIP from the LAN"),
    ("ebpf", "the same, masqueraded"),
    ("ebpf", "a second network card"),
    ("ebpf", "a pod of another node, through an overlay"),
    ("ebpf", "tunnel packets of a LAN host"),
    ("ebpf", "one node as the gateway of all pods"),
    ("ebpf", "a SYN of an established flow whose rule is gone"),
    ("ebpf", "a SYN-ACK with a wrong acknowledgement"),
    ("ebpf", "an SCTP association on the ports of an ended one"),
    ("ebpf", "a reused pod address"),
    ("ebpf", "a LAN interface that flaps"),
    ("ebpf", "a detached program"),
    ("ebpf", "forged RSTs and FINs"),
    ("ebpf", "a half-closed connection"),
    ("ebpf", "a stranger's datagrams against idle connections"),
    ("ebpf, iptables", "NodePort, no nodePorts section"),
    ("ebpf, iptables", "pod -> Service -> LAN host"),
    ("ebpf, iptables", "hostPort, LoadBalancer and ClusterIP from the LAN"),
    ("ebpf, iptables", "a pod of another node, through an overlay"),
    ("ebpf, iptables", "one node as the gateway of all pods"),
    ("ebpf, iptables", "a SYN-ACK with a wrong acknowledgement"),
    ("ebpf, iptables", "a detached program"),
    ("ebpf, iptables", "forged RSTs and FINs"),
    ("ebpf, iptables", "a half-closed connection"),
    ("ebpf, iptables", "a stranger's datagrams against idle connections"),
];

fn play(engines: &'static str) -> Result<()> {
    let mut wrong = Vec::new();
    for attempt in ATTEMPTS {
        let known = NOT_YET.contains(&(engines, attempt.name));
        let mut rows = Vec::new();
        for &rp_filter in attempt.rp_filters {
            rows.push(attempt.play(Setting { engines, rp_filter })?);
        }
        match (rows.iter().all(Row::holds), known) {
            (true, false) | (false, true) => {}
            (true, true) => wrong.push(format!("{} holds now: remove it from the list", attempt.name)),
            (false, false) => wrong.push(format!("{}: {rows:#?}", attempt.name)),
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

#[test]
fn no_attempt_passes_ebpf() -> Result<()> {
    play("ebpf")
}

#[test]
fn no_attempt_passes_iptables() -> Result<()> {
    play("iptables")
}

#[test]
fn no_attempt_passes_both_engines() -> Result<()> {
    play("ebpf, iptables")
}

#[test]
fn the_list_names_attempts() {
    for (engines, name) in NOT_YET {
        assert!(Setting::ENGINES.contains(engines), "{engines}");
        assert!(ATTEMPTS.iter().any(|attempt| attempt.name == *name), "{name}");
    }
}
