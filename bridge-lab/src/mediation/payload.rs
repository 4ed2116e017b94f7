//! Packets whose headers are hard to read.

use anyhow::Result;

use super::{CLOSED, Finding, Ground, OPEN, SILENCE, Setting, arrives, config};
use crate::lab::{Family, Lab};
use crate::packet::{Icmp, Packet, Tcp};
use crate::traffic::udp;
use crate::wire::Capture;

/// The kernel takes off any number of priority tags.
pub(super) fn tags(setting: Setting) -> Result<Finding> {
    let ground = Ground::usual(setting)?;
    let (a, x, c1) = (ground.a(), ground.x(), ground.c1());
    let mut finding = Finding::default();
    let tagged = |packet: Packet, count: usize, mixed: bool| {
        (0..count).fold(
            packet,
            |packet, n| {
                if mixed && n % 2 == 1 { packet.service_vlan(0) } else { packet.vlan(0) }
            },
        )
    };
    for family in Family::BOTH {
        let closed = udp::Server::echo(&c1.netns, c1.at(family, CLOSED))?;
        let open = udp::Server::echo(&c1.netns, c1.at(family, OPEN))?;
        let outside = udp::Server::echo(&x.netns, x.at(family, CLOSED))?;
        for (count, mixed) in [
            (1, false),
            (2, false),
            (3, false),
            (4, false),
            (4, true),
            (5, false),
            (8, false),
            (9, false),
            (12, true),
        ] {
            let name = format!("{count} tags, mixed {mixed}");
            let packet = Packet::new(x.ip(family), c1.ip(family)).udp(5000, CLOSED, name.as_bytes());
            ground.send_from_lan(x, tagged(packet, count, mixed))?;
            finding.attack(format!("in, {name}, {family:?}"), arrives(&closed, name.as_bytes()));
            let packet = Packet::new(c1.ip(family), x.ip(family)).udp(5000, CLOSED, name.as_bytes());
            ground.send_from_pod(c1, tagged(packet, count, mixed))?;
            finding.attack(format!("out, {name}, {family:?}"), arrives(&outside, name.as_bytes()));
            if count <= 2 {
                let packet = Packet::new(a.ip(family), c1.ip(family)).udp(5000, OPEN, name.as_bytes());
                ground.send_from_lan(a, tagged(packet, count, mixed))?;
                finding.legitimate(format!("{name}, {family:?}"), arrives(&open, name.as_bytes()));
            }
        }
    }
    Ok(finding)
}

/// With no rule at all, payload in later fragments and in ICMP errors.
pub(super) fn fragments_and_errors(setting: Setting) -> Result<Finding> {
    let rules = "rules:\n  - {name: in, direction: inbound, external: [192.168.31.67/32, \"fd31::67/128\"], protocol: udp, ports: [60001]}\n";
    let ground = Ground::new(setting, Lab::builder(), &config(setting, "", "", rules))?;
    let (a, x, c1) = (ground.a(), ground.x(), ground.c1());
    let mut finding = Finding::default();
    for family in Family::BOTH {
        let mut capture = Capture::start(&c1.netns, "eth0")?;
        let late = Packet::new(x.ip(family), c1.ip(family)).udp(5000, OPEN, &[7; 64]).fragment(200, true, 77);
        ground.send_from_lan(x, late)?;
        let from_x =
            |frame: &crate::wire::Frame| frame.addresses().is_some_and(|(from, _)| from == x.ip(family));
        finding.attack(format!("a later fragment, {family:?}"), capture.find(SILENCE, from_x)?.is_some());

        let quoted = Packet::new(c1.ip(family), x.ip(family)).tcp(Tcp::ack(CLOSED, 5000, 1, 1)).ip();
        let redirect = match family {
            Family::V4 => Icmp::Other(5, 1, [192, 168, 31, 68], quoted.clone()),
            Family::V6 => Icmp::Other(137, 0, [0; 4], [&[0; 32][..], &quoted].concat()),
        };
        for (name, icmp) in [("an error", Icmp::Unreachable(1, quoted)), ("a redirect", redirect)] {
            ground.send_from_lan(x, Packet::new(x.ip(family), c1.ip(family)).icmp(&icmp))?;
            finding.attack(
                format!("{name} about no flow, {family:?}"),
                capture.find(SILENCE, from_x)?.is_some(),
            );
        }

        let server = udp::Server::echo(&c1.netns, c1.at(family, OPEN))?;
        let payload = [b'f'; 2500];
        for part in Packet::new(a.ip(family), c1.ip(family)).udp(5000, OPEN, &payload).fragments(1400, 99) {
            ground.send_from_lan(a, part)?;
        }
        finding
            .legitimate(format!("an allowed datagram in fragments, {family:?}"), arrives(&server, &payload));
    }
    Ok(finding)
}
