//! Pods as Cilium connects them: routes to all of them lead to `cilium_host`, and programs bring packets from there to the
//! interfaces of the pods.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use bridge_lab::agent::Agent;
use bridge_lab::lab::{Family, Lab, Netns};
use bridge_lab::packet::Packet;
use bridge_lab::traffic::{tcp, udp};
use bridge_lab::wait::eventually;
use bridge_lab::wire::Injector;

use crate::support::{DEADLINE, DENIED, INBOUND, OUTBOUND, SECOND, SILENCE, USUAL_RULES, config, open};

fn tc(netns: &Netns, words: &str) -> Result<()> {
    let mut tc = Command::new("tc");
    tc.args(words.split(' '));
    netns.output(tc).map(drop).with_context(|| words.to_owned())
}

/// Gives the node `cilium_host`, and its pods interfaces whose names begin with `lxc`, which no route leads to.
fn connect_pods_by_gateway(lab: &Lab) -> Result<()> {
    let b = &lab.b().netns;
    for words in [
        "link add cilium_host type veth peer name cilium_net",
        "link set cilium_net up",
        "link set cilium_host up",
        "address add 10.200.1.250/32 dev cilium_host",
        "route add 10.200.1.0/24 via 10.200.1.250 dev cilium_host",
        "route add fd20:1::/64 dev cilium_host",
    ] {
        b.ip(words)?;
    }
    tc(b, "qdisc add dev cilium_host clsact")?;
    for (number, pod) in lab.pods().iter().enumerate() {
        let (old, new) = (&pod.peer_interface, format!("lxc{number}"));
        b.ip(&format!("link set {old} name {new}"))?;
        let mac = pod.mac_text();
        for (family, protocol, selector) in [(Family::V4, "ip", "ip"), (Family::V6, "ipv6", "ip6")] {
            let (ip, length) = (pod.ip(family), if family == Family::V4 { 32 } else { 128 });
            b.ip(&format!("route delete {ip}/{length} dev {new}"))?;
            b.ip(&format!("neighbour replace {ip} lladdr {mac} dev cilium_host nud permanent"))?;
            tc(
                b,
                &format!(
                    "filter add dev cilium_host egress protocol {protocol} prio {} u32 match {selector} dst {ip}/{length} \
                     action mirred egress redirect dev {new}",
                    if family == Family::V4 { 1 } else { 2 }
                ),
            )?;
        }
    }
    Ok(())
}

#[test]
fn pods_behind_cilium_host_are_found_and_judged() -> Result<()> {
    let lab = Lab::builder().second_host().build()?;
    connect_pods_by_gateway(&lab)?;
    let (a, a2, c1, c2) = (lab.a(), lab.a2(), lab.c1(), lab.c2());
    let rules = USUAL_RULES
        .replace("direction: inbound", "direction: inbound, external: [192.168.31.67/32, \"fd31::67/128\"]");
    let by_name = ", internal: [\"lxc*\"]";
    let cases =
        [("ebpf", ""), ("ebpf", by_name), ("iptables", ""), ("nftables", ""), ("ebpf, iptables", by_name)];
    for (engines, named) in cases {
        let text = config("", &rules)
            .replace("[ebpf]", &format!("[{engines}]"))
            .replace(", internal: [\"cali*\"]", named);
        let mut agent = Agent::start(&lab, lab.b(), &text)?;
        let case = || format!("{engines}{named}");
        let ready = eventually(DEADLINE, || agent.run(&["status", "--ready"]).ok());
        ready.with_context(|| format!("{}: {:?}", case(), agent.run(&["status", "--ready"])))?;
        for family in Family::BOTH {
            let inbound = c1.at(family, INBOUND);
            let outbound = a.at(family, OUTBOUND);
            let _servers = [
                tcp::Server::echo(&c1.netns, inbound)?,
                tcp::Server::echo(&c1.netns, c1.at(family, DENIED))?,
                tcp::Server::echo(&a.netns, outbound)?,
                tcp::Server::echo(&a.netns, a.at(family, DENIED))?,
                tcp::Server::echo(&c2.netns, c2.at(family, DENIED))?,
            ];
            let datagrams = [udp::Server::echo(&c1.netns, inbound)?, udp::Server::echo(&a.netns, outbound)?];
            open(a, inbound).with_context(case)?;
            open(c1, outbound).with_context(case)?;
            // Not judged: between pods.
            open(c1, c2.at(family, DENIED)).with_context(case)?;
            for (from, to) in [(a, inbound), (c1, outbound)] {
                let attempt = udp::ask(&from.netns, 0, to, b"hello", SECOND)?;
                ensure!(attempt.succeeded(), "{}: UDP to {to}: {attempt}", case());
            }
            for (from, to) in [(a2, inbound), (a, c1.at(family, DENIED)), (c1, a.at(family, DENIED))] {
                let attempt = tcp::Client::new(&from.netns).deadline(SILENCE).connect(to)?;
                ensure!(!attempt.succeeded(), "{}: {} reaches {to}", case(), from.name);
            }
            let before = datagrams[0].received().len();
            let attempt = udp::ask(&a2.netns, 0, inbound, b"no", SILENCE)?;
            ensure!(!attempt.succeeded(), "{}: UDP to {inbound}: {attempt}", case());
            ensure!(datagrams[0].received().len() == before, "{}: a datagram came through", case());
            // A pod in the name of another one. Packet filters only see that it is a pod of this node.
            if engines.starts_with("ebpf") {
                let before = datagrams[1].received().len();
                let forged = Packet::new(c1.ip(family), a.ip(family)).udp(5000, OUTBOUND, b"forged");
                let frame = forged.macs(c2.mac, lab.node_side_mac()).frame();
                Injector::new(&c2.netns, "eth0")?.send(&frame)?;
                let attempt = udp::ask(&c1.netns, 0, outbound, b"after it", SECOND)?;
                ensure!(attempt.succeeded(), "{}: UDP to {outbound}: {attempt}", case());
                ensure!(datagrams[1].received().len() == before + 1, "{}: it was forged", case());
            }
        }
        agent.stop()?;
        agent.run(&["down"])?;
    }
    Ok(())
}
