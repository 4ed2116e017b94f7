//! Frames of the meter: of allowed flows, and of probes that no rule allows. Each carries its number.
//!
//! Both ends are addresses that no kernel has: a kernel that knew nothing of these connections would reset them.

use std::net::Ipv4Addr;

use anyhow::Result;

use crate::lab::Lab;
use crate::packet::{Packet, Tcp};

/// The end in the LAN.
pub(super) const EXTERNAL: Ipv4Addr = Ipv4Addr::new(192, 168, 31, 200);
/// The end among the pods.
pub(super) const POD: Ipv4Addr = Ipv4Addr::new(10, 200, 1, 200);
/// Open to the LAN.
const INBOUND: u16 = 40002;
/// Open to pods.
const OUTBOUND: u16 = 8443;
/// Allowed by no rule.
const DENIED: u16 = 40003;

/// TCP flows that the LAN has opened, and as many that the pod has; half as many of UDP.
const FLOWS: u16 = 8;
/// Source ports of probes.
const PROBE_PORTS: u16 = 16;

const MAGIC: &[u8; 7] = b"bridge:";
/// Magic number, kind, number, and its complement: with that, the checksum is the same for every number.
const PAYLOAD: usize = 24;

/// Kind of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Of an allowed flow that stands.
    Allowed,
    /// Allowed by no rule.
    Probe,
    /// Opens a flow.
    Opening,
}

/// Which way a frame goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// LAN to pod.
    In,
    /// Pod to LAN.
    Out,
}

impl Way {
    pub(super) const BOTH: [Self; 2] = [Self::In, Self::Out];

    const fn other(self) -> Self {
        match self {
            Self::In => Self::Out,
            Self::Out => Self::In,
        }
    }
}

/// The rules that allow the flows and deny the probes of [`Frames`].
pub(super) const RULES: &str = "rules:
  - {name: in-tcp, direction: inbound, protocol: tcp, ports: [40002]}
  - {name: in-udp, direction: inbound, protocol: udp, ports: [40002]}
  - {name: out-tcp, direction: outbound, protocol: tcp, ports: [8443]}
  - {name: out-udp, direction: outbound, protocol: udp, ports: [8443]}
";

/// Frames of one way.
#[derive(Clone, Debug, Default)]
pub(super) struct Frames {
    pub(super) allowed: Vec<Vec<u8>>,
    pub(super) probes: Vec<Vec<u8>>,
}

/// Adds neighbour entries for the addresses to the node, so that it sends no ARP requests.
pub(super) fn prepare(lab: &Lab) -> Result<()> {
    let (a, b, c1) = (lab.a(), lab.b(), lab.c1());
    let mac = |mac: [u8; 6]| mac.map(|octet| format!("{octet:02x}")).join(":");
    b.netns.ip(&format!(
        "neighbour replace {EXTERNAL} lladdr {} dev {} nud permanent",
        mac(a.mac),
        b.interface
    ))?;
    b.netns.ip(&format!("route replace {POD} dev {}", c1.peer_interface))?;
    b.netns.ip(&format!(
        "neighbour replace {POD} lladdr {} dev {} nud permanent",
        mac(c1.mac),
        c1.peer_interface
    ))?;
    Ok(())
}

/// A packet of one way, without its transport.
fn packet(lab: &Lab, way: Way) -> Packet {
    match way {
        Way::In => Packet::new(EXTERNAL, POD).macs(lab.a().mac, lab.b().mac),
        Way::Out => Packet::new(POD, EXTERNAL).macs(lab.c1().mac, lab.node_side_mac()),
    }
}

/// A connection or flow: who has opened it, and its ports, of the opener first.
fn flows() -> impl Iterator<Item = (Way, u16, u16)> {
    Way::BOTH.into_iter().flat_map(|opener| {
        let service = if opener == Way::In { INBOUND } else { OUTBOUND };
        (0..FLOWS).map(move |index| (opener, 50_000 + index, service))
    })
}

/// Frames that open the flows, in an order in which each may be sent again and again until it has arrived.
pub(super) fn openings(lab: &Lab) -> Vec<(Way, Vec<u8>)> {
    let mut frames = Vec::new();
    let payload = payload(Kind::Opening);
    for (opener, client, service) in flows() {
        let back = opener.other();
        let tcp = |way, tcp: Tcp| (way, packet(lab, way).tcp(tcp.payload(&payload)).frame());
        frames.push(tcp(opener, Tcp::syn(client, service)));
        // A SYN and its answer take a number of the sequence each, and so does every octet of data.
        let data = u32::try_from(PAYLOAD).unwrap_or(0);
        let mut answer = Tcp::ack(service, client, 5000, 1001 + data);
        answer.header.syn = true;
        frames.push(tcp(back, answer));
        frames.push(tcp(opener, Tcp::ack(client, service, 1001 + data, 5001 + data)));
        if client % 2 == 0 {
            frames.push((opener, packet(lab, opener).udp(client, service, &payload).frame()));
            frames.push((back, packet(lab, back).udp(service, client, &payload).frame()));
        }
    }
    frames
}

impl Frames {
    pub(super) fn of(lab: &Lab, way: Way) -> Self {
        let mut frames = Self::default();
        let data = u32::try_from(PAYLOAD).unwrap_or(0);
        let allowed = payload(Kind::Allowed);
        for (opener, client, service) in flows() {
            // The same segment again and again, within the window of both.
            let (from, to, sequence, acknowledgment) = if opener == way {
                (client, service, 1001 + data, 5001 + data)
            } else {
                (service, client, 5001 + data, 1001 + data)
            };
            let tcp = Tcp::ack(from, to, sequence, acknowledgment).payload(&allowed);
            frames.allowed.push(packet(lab, way).tcp(tcp).frame());
            if client % 2 == 0 {
                frames.allowed.push(packet(lab, way).udp(from, to, &allowed).frame());
            }
        }
        let probe = payload(Kind::Probe);
        for port in (0..PROBE_PORTS).map(|index| 40_100 + index) {
            let of = |tcp: Tcp| packet(lab, way).tcp(tcp.payload(&probe)).frame();
            frames.probes.push(of(Tcp::syn(port, DENIED)));
            frames.probes.push(of(Tcp::ack(port, INBOUND, 1, 1)));
            frames.probes.push(packet(lab, way).udp(port, DENIED, &probe).frame());
        }
        frames
    }
}

fn payload(kind: Kind) -> [u8; PAYLOAD] {
    let mut payload = [0; PAYLOAD];
    payload[..7].copy_from_slice(MAGIC);
    payload[7] = kind as u8;
    payload[16..].fill(0xff);
    payload
}

/// Writes the number of a frame into it.
pub(super) fn number(frame: &mut [u8], number: u64) {
    let at = frame.len() - PAYLOAD + 8;
    frame[at..at + 8].copy_from_slice(&number.to_be_bytes());
    frame[at + 8..at + 16].copy_from_slice(&(!number).to_be_bytes());
}

/// Kind and number of a frame, if it is one of the meter's.
pub(super) fn read(frame: &[u8]) -> Option<(Kind, u64)> {
    let payload = &frame[frame.len().checked_sub(PAYLOAD)?..];
    let kind =
        [Kind::Allowed, Kind::Probe, Kind::Opening].into_iter().find(|kind| payload[7] == *kind as u8)?;
    let number = u64::from_be_bytes(payload[8..16].try_into().ok()?);
    let complement = u64::from_be_bytes(payload[16..].try_into().ok()?);
    (payload.starts_with(MAGIC) && complement == !number).then_some((kind, number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_leaves_the_checksum_right() -> Result<()> {
        for way in [EXTERNAL, POD] {
            let packet =
                |payload: &[u8]| Packet::new(way, way).tcp(Tcp::ack(1, 2, 3, 4).payload(payload)).frame();
            let mut frame = packet(&payload(Kind::Probe));
            for n in [0, 1, 0xffff, 123_456_789_012, u64::MAX] {
                number(&mut frame, n);
                assert_eq!(read(&frame), Some((Kind::Probe, n)));
                assert_eq!(frame, packet(&frame[frame.len() - PAYLOAD..]), "{n}");
            }
        }
        Ok(())
    }

    #[test]
    fn frames_of_other_senders_are_ignored() {
        assert_eq!(read(&[]), None);
        assert_eq!(read(&[0; 100]), None);
        let mut frame = payload(Kind::Allowed);
        frame[9] ^= 1;
        assert_eq!(read(&frame), None);
    }
}
