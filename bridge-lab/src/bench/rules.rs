//! Policies of any size: a LAN of devices, each with a rule of its own.

use std::fmt::Write as _;

use bridge_agent::model::{Action, Direction, Mode, OnDeny, Policy, PortRange, Protocol, Rule};
use ipnet::{IpNet, Ipv4Net};

/// The network of the devices, and of the pods.
pub(super) const EXTERNAL: &str = "100.64.0.0/10";
pub(super) const PODS: &str = "10.200.0.0/16";

/// Rule `index`: a device, a port and a range of ports; a tenth for one pod only, a tenth denies.
fn rule(index: u32) -> Rule {
    let port = |seed: u32| u16::try_from(1024 + (index * 7919 + seed) % 60_000).expect("below 61024");
    let first = port(1);
    let device = Ipv4Net::new_assert(std::net::Ipv4Addr::from(0x6440_0000 + index), 32);
    let pod = Ipv4Net::new_assert(std::net::Ipv4Addr::from(0x0ac8_0000 + index % 60_000), 32);
    let mut ports = vec![PortRange { first, last: first + 99 }, PortRange { first: 443, last: 443 }];
    ports.sort_unstable();
    Rule {
        name: format!("device-{index}"),
        direction: if index % 4 == 3 { Direction::Outbound } else { Direction::Inbound },
        external: Some(vec![IpNet::V4(device)]),
        pods: (index % 10 == 5).then(|| vec![IpNet::V4(pod)]),
        protocol: if index % 5 == 4 { Protocol::Udp } else { Protocol::Tcp },
        ports,
        source_ports: Vec::new(),
        action: if index % 10 == 9 { Action::Deny } else { Action::Allow },
    }
}

/// A policy of `count` rules; rule `from` is the first.
pub(super) fn policy(from: u32, count: u32) -> Policy {
    Policy {
        mode: Mode::Enforce,
        on_deny: OnDeny::Drop,
        pods: vec![PODS.parse().expect("a network")],
        external: vec![EXTERNAL.parse().expect("a network")],
        nodes: Vec::new(),
        rules: (from..from + count).map(rule).collect(),
        audited: Vec::new(),
        node_ports: None,
    }
}

/// The same as a configuration file.
pub(super) fn configuration(count: u32) -> String {
    let mut yaml = format!(
        "role: node\nnetworks: {{pods: [{PODS}], external: [{EXTERNAL}]}}\n\
         enforcement: {{engines: [ebpf], interfaces: {{external: [eth0], internal: [\"cali*\"]}}}}\n\
         persistence: {{save: never}}\nrules:\n"
    );
    for rule in (0..count).map(rule) {
        let nets = |key: &str, nets: &Option<Vec<IpNet>>| match nets {
            Some(nets) => format!("{key}: [{}], ", nets[0]),
            None => String::new(),
        };
        let ports: Vec<_> = rule.ports.iter().map(|range| format!("\"{range}\"")).collect();
        writeln!(
            yaml,
            "  - {{name: {}, direction: {}, {}{}protocol: {}, ports: [{}], action: {}}}",
            rule.name,
            format!("{:?}", rule.direction).to_lowercase(),
            nets("external", &rule.external),
            nets("pods", &rule.pods),
            format!("{:?}", rule.protocol).to_lowercase(),
            ports.join(", "),
            format!("{:?}", rule.action).to_lowercase(),
        )
        .expect("writing to a string");
    }
    yaml
}
