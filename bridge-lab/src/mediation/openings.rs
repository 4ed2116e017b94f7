//! Packets that open a flow where one is, or was.

use anyhow::Result;

use super::{CLOSED, Finding, Ground, OPEN, OUT, RULES, SECOND, SILENCE, Setting, config, nft};
use crate::lab::{Family, Host};
use crate::packet::{Packet, Tcp};
use crate::traffic::tcp;
use crate::wire::{Capture, Frame};

/// Whether a bare SYN to this port comes to a host.
fn syn_to(capture: &mut Capture, host: &Host, family: Family, port: u16) -> Result<bool> {
    let wanted = |frame: &Frame| {
        frame.endpoints().is_some_and(|(_, to)| to == host.at(family, port))
            && frame.tcp().is_some_and(|tcp| tcp.syn && !tcp.ack)
    };
    Ok(capture.find(SILENCE, wanted)?.is_some())
}

/// The rule is gone; the client resets, or seems to, and opens again from the same port.
pub(super) fn syn_without_rule(setting: Setting) -> Result<Finding> {
    let mut ground = Ground::usual(setting)?;
    let mut connections = Vec::new();
    let mut servers = Vec::new();
    for family in Family::BOTH {
        let server = tcp::Server::echo(&ground.c1().netns, ground.c1().at(family, OPEN))?;
        for _ in 0..3 {
            let mut connection = tcp::Client::new(&ground.a().netns).connect(server.address())?.reached()?;
            connection.round_trip(SECOND)?;
            connections.push((family, connection));
        }
        servers.push(server);
    }
    let without = RULES.lines().filter(|line| !line.contains("in-tcp")).collect::<Vec<_>>().join("\n") + "\n";
    ground.agent.reload(&config(setting, "", "", &without))?;
    let (a, c1) = (ground.a(), ground.c1());
    let mut finding = Finding::default();
    for (number, (family, connection)) in connections.iter_mut().enumerate() {
        finding.legitimate(format!("an open connection, {family:?}"), connection.round_trip(SECOND).is_ok());
        let port = connection.source()?.port();
        let packet = |tcp| Packet::new(a.ip(*family), c1.ip(*family)).tcp(tcp);
        let name = match number % 3 {
            0 => "a SYN",
            1 => {
                ground.send_from_lan(a, packet(Tcp::rst(port, OPEN, 77)))?;
                "an RST, then a SYN"
            }
            _ => {
                let mut broken = Tcp::fin(port, OPEN, 77, 78);
                broken.header.checksum = 0x1234;
                ground.send_from_lan(a, packet(broken))?;
                "a FIN with wrong numbers, then a SYN"
            }
        };
        let mut capture = Capture::start(&c1.netns, "eth0")?;
        ground.send_from_lan(a, packet(Tcp::syn(port, OPEN)))?;
        finding.attack(format!("{name}, {family:?}"), syn_to(&mut capture, c1, *family, OPEN)?);
        finding
            .legitimate(format!("{name}: the connection, {family:?}"), connection.round_trip(SECOND).is_ok());
    }
    Ok(finding)
}

/// A LAN host answers the SYN of a pod with a SYN of its own.
pub(super) fn simultaneous(setting: Setting) -> Result<Finding> {
    let ground = Ground::usual(setting)?;
    let (a, c1) = (ground.a(), ground.c1());
    let mut finding = Finding::default();
    for family in Family::BOTH {
        let mut at_pod = Capture::start(&c1.netns, "eth0")?;
        let mut at_lan = Capture::start(&a.netns, "eth0")?;
        ground.send_from_pod(c1, Packet::new(c1.ip(family), a.ip(family)).tcp(Tcp::syn(CLOSED, OUT)))?;
        finding.legitimate(format!("the pod's SYN, {family:?}"), syn_to(&mut at_lan, a, family, OUT)?);
        ground.send_from_lan(a, Packet::new(a.ip(family), c1.ip(family)).tcp(Tcp::syn(OUT, CLOSED)))?;
        finding.attack(format!("the other SYN, {family:?}"), syn_to(&mut at_pod, c1, family, CLOSED)?);
    }
    Ok(finding)
}

/// A stranger sends a SYN-ACK with a wrong acknowledgement in the server's name.
pub(super) fn wrong_syn_ack(setting: Setting) -> Result<Finding> {
    let ground = Ground::usual(setting)?;
    let (a, x, c1) = (ground.a(), ground.x(), ground.c1());
    let mut finding = Finding::default();
    for host in [a, c1] {
        // The kernel knows of no connection here, and would end it.
        let silent = "table inet silent {\nchain out {\ntype filter hook output priority 0\ntcp flags rst drop\n}\n}\n";
        nft(&ground.lab, host, silent)?;
    }
    for family in Family::BOTH {
        let (from_pod, from_lan) =
            (Packet::new(c1.ip(family), a.ip(family)), Packet::new(a.ip(family), c1.ip(family)));
        let mut at_lan = Capture::start(&a.netns, "eth0")?;
        ground.send_from_pod(c1, from_pod.clone().tcp(Tcp::syn(CLOSED, OUT)))?;
        let mut forged = Tcp::syn_ack(OUT, CLOSED);
        (forged.header.sequence_number, forged.header.acknowledgment_number) = (9000, 424_242);
        ground.send_from_lan(x, from_lan.clone().tcp(forged.clone()))?;
        ground.send_from_lan(a, from_lan.clone().tcp(Tcp::syn_ack(OUT, CLOSED)))?;
        ground.send_from_lan(x, from_lan.clone().tcp(forged))?;
        std::thread::sleep(SILENCE / 5);
        ground.send_from_pod(c1, from_pod.clone().tcp(Tcp::ack(CLOSED, OUT, 1001, 5001).payload(b"data")))?;
        let data = |frame: &Frame| frame.bytes.ends_with(b"data") && !frame.outgoing;
        finding.legitimate(format!("the client's data, {family:?}"), at_lan.find(SECOND, data)?.is_some());
    }
    Ok(finding)
}
