//! LAN hosts that reach pods by a port of the node, as kube-proxy leads it to the pod.

use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::thread;

use anyhow::{Result, ensure};
use bridge_common::filter::flow::state;
use bridge_common::filter::policy::direction;
use bridge_lab::agent::Agent;
use bridge_lab::lab::{Family, Lab, NodePort};
use bridge_lab::traffic::{tcp, udp};
use bridge_lab::wire::Capture;
use etherparse::IpNumber;

use crate::support::{SECOND, SILENCE, config, flow, json, open, seen_until_now};

/// Of the service that the configuration allows.
const ALLOWED: u16 = 30080;
const ALLOWED_POD: u16 = 8080;
/// Of a service that it does not.
const OTHER: u16 = 30081;
const OTHER_POD: u16 = 8081;

const NODE_PORTS: &str = "nodePorts: {range: \"30000-32767\", allow: [30080]}\n";

/// A node with two services, both of the first pod.
fn lab() -> Result<Lab> {
    let service = |port, pod_port| NodePort { port, pod: 0, pod_port };
    Lab::builder().node_port(service(ALLOWED, ALLOWED_POD)).node_port(service(OTHER, OTHER_POD)).build()
}

/// More than a window's worth in both directions at once.
fn exchange(connection: &mut tcp::Connection) -> Result<()> {
    const LENGTH: usize = 1 << 20;
    let mut writer = connection.stream().try_clone()?;
    let sent: Vec<u8> = (0..=250).cycle().take(LENGTH).collect();
    let mut received = vec![0; LENGTH];
    connection.stream().set_read_timeout(Some(SECOND * 5))?;
    thread::scope(|scope| {
        let writing = scope.spawn(|| writer.write_all(&sent));
        connection.stream().read_exact(&mut received)?;
        writing.join().expect("the writer does not panic")
    })?;
    ensure!(received == sent, "it came back changed");
    Ok(())
}

#[test]
fn the_allowed_node_port_leads_to_the_pod_and_nothing_beside_it() -> Result<()> {
    let lab = lab()?;
    let mut agent = Agent::start(&lab, lab.b(), &config("", NODE_PORTS))?;
    let (a, b, c1) = (lab.a(), lab.b(), lab.c1());
    for family in Family::BOTH {
        let server = tcp::Server::echo(&c1.netns, c1.at(family, ALLOWED_POD))?;
        let other = tcp::Server::echo(&c1.netns, c1.at(family, OTHER_POD))?;
        let mut connection = open(a, b.at(family, ALLOWED))?;
        for _ in 0..5 {
            connection.round_trip(SECOND)?;
        }
        exchange(&mut connection)?;
        let from = SocketAddr::new(a.ip(family), connection.source()?.port());
        assert_eq!(server.peers(), [from], "the pod sees the LAN host's own address");
        // The connection has two names, one on each side of the translation.
        for (to, way) in
            [(b.at(family, ALLOWED), direction::NODE_PORT), (c1.at(family, ALLOWED_POD), direction::INBOUND)]
        {
            let entry = flow(&agent, from, to, IpNumber::TCP.0)?;
            assert_eq!(
                entry.map(|flow| (flow.state, flow.direction)),
                Some((state::ESTABLISHED, way)),
                "{to}"
            );
        }

        for closed in [b.at(family, OTHER), c1.at(family, ALLOWED_POD), c1.at(family, OTHER_POD)] {
            let attempt = tcp::Client::new(&a.netns).connect(closed)?;
            ensure!(attempt.refused(), "{closed}: {attempt}");
        }
        assert_eq!((server.peers().len(), other.peers().len()), (1, 0));

        agent.restart()?;
        connection.round_trip(SECOND)?;
        exchange(&mut connection)?;
        drop(open(a, b.at(family, ALLOWED))?);
        let attempt = tcp::Client::new(&a.netns).connect(b.at(family, OTHER))?;
        ensure!(attempt.refused(), "after the restart: {attempt}");
    }
    Ok(())
}

#[test]
fn a_node_port_is_open_to_datagrams_too() -> Result<()> {
    let lab = lab()?;
    let _agent = Agent::start(&lab, lab.b(), &config("", NODE_PORTS))?;
    let (a, b, c1) = (lab.a(), lab.b(), lab.c1());
    for family in Family::BOTH {
        let server = udp::Server::echo(&c1.netns, c1.at(family, ALLOWED_POD))?;
        let other = udp::Server::echo(&c1.netns, c1.at(family, OTHER_POD))?;
        for _ in 0..3 {
            let attempt = udp::ask(&a.netns, 61001, b.at(family, ALLOWED), b"hello", SECOND)?;
            ensure!(attempt.succeeded(), "{attempt}");
        }
        assert_eq!(server.received()[0].0, a.at(family, 61001));
        let attempt = udp::ask(&a.netns, 61001, b.at(family, OTHER), b"hello", SECOND)?;
        ensure!(attempt.refused(), "{attempt}");
        assert_eq!(other.received(), []);
    }
    Ok(())
}

/// Without `nodePorts`, no packet to the node is judged, so the SYN gets as far as the pod. But the pod's answer
/// goes from a pod to a LAN host, which is in scope, and belongs to no connection that was let in: it fails closed.
/// To open NodePorts to the LAN, `nodePorts` must name them.
#[test]
fn without_node_ports_in_the_configuration_the_port_of_the_pod_decides() -> Result<()> {
    let lab = lab()?;
    let mut agent = Agent::start(&lab, lab.b(), &config("", ""))?;
    let (a, b, c1) = (lab.a(), lab.b(), lab.c1());
    for family in Family::BOTH {
        let server = tcp::Server::echo(&c1.netns, c1.at(family, ALLOWED_POD))?;
        let (mut on_a, mut on_c1) = (Capture::start(&a.netns, "eth0")?, Capture::start(&c1.netns, "eth0")?);
        let attempt = tcp::Client::new(&a.netns).deadline(SILENCE).connect(b.at(family, ALLOWED))?;
        ensure!(attempt.timed_out(), "{attempt}");
        let arrived =
            on_c1.find(SECOND, |frame| frame.endpoints().is_some_and(|(_, to)| to == server.address()))?;
        ensure!(arrived.is_none(), "the SYN was not judged");
        let seen = seen_until_now(&mut on_a, b, a, family)?;
        let from = [b.at(family, ALLOWED), c1.at(family, ALLOWED_POD)];
        let answers =
            seen.iter().filter_map(|frame| frame.endpoints()).filter(|(source, _)| from.contains(source));
        assert_eq!(answers.collect::<Vec<_>>(), []);
        assert_eq!(server.peers(), []);
    }
    let denied = json(&agent, &["status"])?["enforcement"]["denied"].clone();
    let mut reasons = denied.as_array().into_iter().flatten();
    let no_rule = reasons.any(|count| count["direction"] == "inbound" && count["reason"] == "no_rule");
    ensure!(no_rule, "{denied}");

    // A rule for the pod's own port allows it, by whichever address it is reached.
    let rule = format!("rules: [{{name: pod, direction: inbound, protocol: tcp, ports: [{ALLOWED_POD}]}}]\n");
    agent.reload(&config("", &rule))?;
    for family in Family::BOTH {
        let _server = tcp::Server::echo(&c1.netns, c1.at(family, ALLOWED_POD))?;
        let attempt = tcp::Client::new(&a.netns).connect(b.at(family, ALLOWED))?;
        ensure!(attempt.succeeded(), "{family:?}: {attempt}");
    }
    Ok(())
}
