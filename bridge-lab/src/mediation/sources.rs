//! Sources that are not true.

use std::net::{IpAddr, Ipv6Addr};

use anyhow::{Context as _, Result};

use super::{
    CLOSED, Finding, Ground, OPEN, OUT, RULES, SECOND, SILENCE, Setting, arrives, config, connects, foreign,
};
use crate::lab::{Family, Lab};
use crate::packet::{Packet, Tcp};
use crate::traffic::{tcp, udp};
use crate::wire::{Capture, Frame};

/// A LAN host opens a flow from a pod to itself, then answers as its responder.
pub(super) fn reverse_open(setting: Setting) -> Result<Finding> {
    let ground = Ground::usual(setting)?;
    let (x, c1) = (ground.x(), ground.c1());
    let mut finding = Finding::default();
    for family in Family::BOTH {
        let server = udp::Server::echo(&c1.netns, c1.at(family, CLOSED))?;
        let forged = Packet::new(c1.ip(family), x.ip(family)).udp(CLOSED, OUT, b"forged");
        ground.send_from_lan(x, forged)?;
        std::thread::sleep(SILENCE / 2);
        ground.send_from_lan(x, Packet::new(x.ip(family), c1.ip(family)).udp(OUT, CLOSED, b"answer"))?;
        finding.attack(format!("UDP, {family:?}"), arrives(&server, b"answer"));

        // The pod itself opens such a flow, and its answer comes.
        let _service = udp::Server::echo(&x.netns, x.at(family, OUT))?;
        let asked = udp::ask(&c1.netns, 0, x.at(family, OUT), b"question", SECOND)?;
        finding.legitimate(format!("the pod's own question, {family:?}"), asked.succeeded());
    }
    Ok(finding)
}

/// The same with TCP and SYNs in both directions.
pub(super) fn simultaneous(setting: Setting) -> Result<Finding> {
    let ground = Ground::usual(setting)?;
    let (a, x, c1) = (ground.a(), ground.x(), ground.c1());
    let mut finding = Finding::default();
    for family in Family::BOTH {
        let mut capture = Capture::start(&c1.netns, "eth0")?;
        ground.send_from_lan(x, Packet::new(c1.ip(family), x.ip(family)).tcp(Tcp::syn(CLOSED, OUT)))?;
        std::thread::sleep(SILENCE / 2);
        ground.send_from_lan(x, Packet::new(x.ip(family), c1.ip(family)).tcp(Tcp::syn(OUT, CLOSED)))?;
        let syn = |frame: &Frame| frame.endpoints().is_some_and(|(_, to)| to == c1.at(family, CLOSED));
        finding.attack(format!("{family:?}"), capture.find(SILENCE, syn)?.is_some());

        let _server = tcp::Server::echo(&c1.netns, c1.at(family, OPEN))?;
        finding.legitimate(format!("an allowed connection, {family:?}"), connects(a, c1.at(family, OPEN))?);
        let _server = tcp::Server::echo(&x.netns, x.at(family, OUT))?;
        finding.legitimate(format!("the pod's connection, {family:?}"), connects(c1, x.at(family, OUT))?);
    }
    Ok(finding)
}

/// Datagrams of a LAN host with every source that it may not use, or that no rule allows.
pub(super) fn from_lan(setting: Setting) -> Result<Finding> {
    let ground = Ground::usual(setting)?;
    let (a, b, x, c1, c2) = (ground.a(), ground.b(), ground.x(), ground.c1(), ground.c2());
    let mut finding = Finding::default();
    for family in Family::BOTH {
        let server = udp::Server::echo(&c1.netns, c1.at(family, CLOSED))?;
        let open = udp::Server::echo(&c1.netns, c1.at(family, OPEN))?;
        let unrouted: IpAddr = match family {
            Family::V4 => IpAddr::from([10, 200, 1, 77]),
            Family::V6 => "fd20:1::77".parse().context("an address")?,
        };
        let mut sources = vec![
            ("foreign", foreign(family)),
            ("a node's", b.ip(family)),
            ("another pod's", c2.ip(family)),
            ("the pod's own", c1.ip(family)),
            ("an unused pod address", unrouted),
        ];
        if family == Family::V6 {
            sources.push(("IPv4-mapped", Ipv6Addr::from([0, 0, 0, 0, 0, 0xffff, 0xc0a8, 0x1f43]).into()));
        }
        for (name, source) in sources {
            for (server, port) in [(&server, CLOSED), (&open, OPEN)] {
                let payload = format!("{name} {port}");
                ground.send_from_lan(
                    x,
                    Packet::new(source, c1.ip(family)).udp(5000, port, payload.as_bytes()),
                )?;
                finding
                    .attack(format!("{name}, port {port}, {family:?}"), arrives(server, payload.as_bytes()));
            }
        }
        ground.send_from_lan(a, Packet::new(a.ip(family), c1.ip(family)).udp(5001, OPEN, b"allowed"))?;
        finding.legitimate(format!("an allowed datagram, {family:?}"), arrives(&open, b"allowed"));
    }
    Ok(finding)
}

/// A pod with NET_RAW sends with foreign sources, those of LAN hosts and those of another pod.
pub(super) fn from_pod(setting: Setting) -> Result<Finding> {
    let rights = "  - {name: second, direction: outbound, pods: [10.200.1.92/32, \"fd20:1::92/128\"], protocol: udp, ports: [7777]}\n";
    // A node that is down.
    let nodes = "nodes: [192.168.31.150/32, \"fd31::150/128\"]";
    let ground =
        Ground::new(setting, Lab::builder(), &config(setting, nodes, "", &format!("{RULES}{rights}")))?;
    let (a, b, x, c1, c2) = (ground.a(), ground.b(), ground.x(), ground.c1(), ground.c2());
    let mut finding = Finding::default();
    for family in Family::BOTH {
        let node: IpAddr = match family {
            Family::V4 => "192.168.31.150".parse()?,
            Family::V6 => "fd31::150".parse()?,
        };
        let closed = udp::Server::echo(&a.netns, a.at(family, CLOSED))?;
        let local = udp::Server::echo(&b.netns, b.at(family, CLOSED))?;
        let second = udp::Server::echo(&a.netns, a.at(family, 7777))?;
        let pod = udp::Server::echo(&c2.netns, c2.at(family, CLOSED))?;
        let to_lan = [
            ("a foreign source", foreign(family), &closed, CLOSED),
            ("a LAN host's", x.ip(family), &closed, CLOSED),
            ("a node's", node, &closed, CLOSED),
            ("the other pod's rights", c2.ip(family), &second, 7777),
        ];
        for (name, source, server, port) in to_lan {
            ground.send_from_pod(c1, Packet::new(source, a.ip(family)).udp(5000, port, name.as_bytes()))?;
            finding.attack(format!("{name}, {family:?}"), arrives(server, name.as_bytes()));
        }
        // To another pod in a foreign name, as an answer to what that pod asked might come.
        for (name, source) in [("foreign", foreign(family)), ("node's", node), ("LAN host's", x.ip(family))] {
            ground.send_from_pod(c1, Packet::new(source, c2.ip(family)).udp(53, CLOSED, name.as_bytes()))?;
            finding.attack(format!("{name} to a pod, {family:?}"), arrives(&pod, name.as_bytes()));
            ground.send_from_pod(c1, Packet::new(source, b.ip(family)).udp(53, CLOSED, name.as_bytes()))?;
            finding.attack(format!("{name} to the node, {family:?}"), arrives(&local, name.as_bytes()));
        }

        let own = udp::ask(&c2.netns, 0, a.at(family, 7777), b"own", SECOND)?;
        finding.legitimate(format!("the pod that has the right, {family:?}"), own.succeeded());
        let between = udp::ask(&c1.netns, 0, c2.at(family, CLOSED), b"between", SECOND)?;
        finding.legitimate(format!("pod to pod, {family:?}"), between.succeeded());
    }
    Ok(finding)
}

/// A pod with NET_RAW forges an RST of another pod.
pub(super) fn reset_by_pod(setting: Setting) -> Result<Finding> {
    let ground = Ground::usual(setting)?;
    let (a, c1, c2) = (ground.a(), ground.c1(), ground.c2());
    let mut finding = Finding::default();
    for family in Family::BOTH {
        let server = tcp::Server::echo(&a.netns, a.at(family, OUT))?;
        let mut connection = tcp::Client::new(&c2.netns).connect(server.address())?.reached()?;
        connection.round_trip(SECOND)?;
        let port = connection.source()?.port();
        let mut capture = Capture::start(&a.netns, "eth0")?;
        ground.send_from_pod(c1, Packet::new(c2.ip(family), a.ip(family)).tcp(Tcp::rst(port, OUT, 77)))?;
        let reset = capture.find(SILENCE, |frame| frame.tcp().is_some_and(|tcp| tcp.rst))?;
        finding.attack(format!("the RST, {family:?}"), reset.is_some());
        finding.legitimate(format!("the connection, {family:?}"), connection.round_trip(SECOND).is_ok());
        // The same segment of its owner passes: it knows the numbers.
        let mut capture = Capture::start(&a.netns, "eth0")?;
        connection.reset()?;
        let reset = capture.find(SECOND, |frame| frame.tcp().is_some_and(|tcp| tcp.rst))?;
        finding.legitimate(format!("the owner's RST, {family:?}"), reset.is_some());
    }
    Ok(finding)
}
