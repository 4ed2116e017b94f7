//! Traffic that is not between a pod and a LAN host is out of scope: with no rule at all, everything else works.

use anyhow::{Context as _, Result, ensure};
use bridge_lab::agent::Agent;
use bridge_lab::lab::{Family, Host, Lab};
use bridge_lab::traffic::icmp::echo;
use bridge_lab::traffic::{tcp, udp};
use bridge_lab::wait::eventually;

use crate::support::{DEADLINE, SECOND, SILENCE, USUAL_RULES, config, open};

/// TCP, UDP and echo from one to the other, at an address that the other has.
fn talks(client: &Host, server: &Host, family: Family, port: u16) -> Result<()> {
    let to = server.at(family, port);
    let _tcp = tcp::Server::echo(&server.netns, to)?;
    let _udp = udp::Server::echo(&server.netns, to)?;
    open(client, to)?;
    let attempt = udp::ask(&client.netns, 0, to, b"hello", SECOND)?;
    ensure!(attempt.succeeded(), "UDP: {attempt}");
    let attempt = echo(&client.netns, to.ip(), SECOND)?;
    ensure!(attempt.succeeded(), "echo: {attempt}");
    Ok(())
}

#[test]
fn what_is_out_of_scope_is_untouched() -> Result<()> {
    let lab = Lab::builder().second_host().build()?;
    let (a, a2, b, c1, c2) = (lab.a(), lab.a2(), lab.b(), lab.c1(), lab.c2());
    // With NodePorts, too: a service of the node itself is not one, unless it is in their range.
    for rest in ["", "nodePorts: {range: \"30000-32767\"}\n"] {
        let mut agent = Agent::start(&lab, lab.b(), &config("", rest))?;
        for family in Family::BOTH {
            for (client, server, port, case) in [
                (a, b, 22, "a login on the node"),
                (b, a, 443, "the node as a client"),
                (c1, b, 53, "a pod to its node"),
                // By the gateway's address, which is in the network of the pods.
                (b, c1, 10250, "a probe of the kubelet"),
                (c1, c2, 5432, "pod to pod"),
                (a, a2, 80, "LAN host to LAN host"),
            ] {
                talks(client, server, family, port).with_context(|| format!("{case}, {family:?}"))?;
            }
            // And yet it is active.
            for (client, server) in [(a, c1), (c1, a)] {
                let server = tcp::Server::echo(&server.netns, server.at(family, 80))?;
                let attempt = tcp::Client::new(&client.netns).connect(server.address())?;
                ensure!(attempt.refused(), "{attempt}");
            }
            let attempt = echo(&a.netns, c1.ip(family), SILENCE)?;
            ensure!(attempt.timed_out(), "{attempt}");
        }
        agent.stop()?;
        agent.run(&["down"])?;
    }
    Ok(())
}

#[test]
fn a_node_whose_routes_lead_to_no_interface_of_pods_is_not_ready() -> Result<()> {
    let lab = Lab::builder().build()?;
    let b = lab.b();
    // As Cilium has it, by another name: IPv6 without a gateway, IPv4 by an address of the node itself.
    let routes = ["fd20:1:0:0:8000::/65 dev plugin_host", "10.200.1.128/25 via 10.200.1.200 dev plugin_host"];
    let cases = ["[ebpf]", "[iptables]", "[nftables]"].into_iter().flat_map(|e| routes.map(|r| (e, r)));
    for (engines, route) in cases {
        const INTERFACES: &str = "interfaces: {external: [eth0], internal: [\"cali*\"]}";
        let named = config("", USUAL_RULES).replace("[ebpf]", engines);
        let by_routes = named.replace(INTERFACES, "interfaces: {external: [eth0]}");
        let mut agent = Agent::start(&lab, b, &by_routes)?;
        agent.run(&["status", "--ready"]).context(engines)?;
        b.netns.ip("link add plugin_host type veth peer name plugin_net")?;
        b.netns.ip("link set plugin_net up")?;
        b.netns.ip("link set plugin_host up")?;
        b.netns.ip("address add 10.200.1.200/32 dev plugin_host")?;
        b.netns.ip(&format!("route add {route}"))?;
        let why = eventually(DEADLINE, || {
            agent.run(&["status", "--ready"]).err().map(|error| format!("{error:#}"))
        });
        let why = why.with_context(|| format!("{engines}, {route}: ready"))?;
        ensure!(
            why.contains("plugin_host") && why.contains("enforcement.interfaces.internal"),
            "{engines}, {route}: {why}"
        );
        agent.reload(&named)?;
        let ready = eventually(DEADLINE, || agent.run(&["status", "--ready"]).ok());
        ready.with_context(|| format!("{engines}: not ready"))?;
        drop(agent);
        b.netns.ip("link delete plugin_host")?;
    }
    Ok(())
}
