//! Random forms of a packet: headers around its payload, fragments, damage.

use etherparse::IpNumber;

use crate::{
    packet::{Icmp, Packet, Tcp},
    parity::{Flow, dice::Dice},
};

/// The payload of a packet, before its addresses are known.
pub(super) enum Carried {
    Tcp(Tcp),
    Udp(usize),
    Sctp { kind: u8, flags: u8, tag: u32, announced: u32 },
    Icmp(u8),
    Raw(u8, usize),
}

impl Carried {
    pub(super) fn put_into(&self, packet: Packet, flow: &Flow) -> Packet {
        let (source, destination) = (flow.source_port, flow.destination_port);
        match self {
            Self::Tcp(tcp) => {
                let mut tcp = tcp.clone();
                (tcp.header.source_port, tcp.header.destination_port) = (source, destination);
                packet.tcp(tcp)
            }
            Self::Udp(length) => packet.udp(source, destination, &vec![7; *length]),
            Self::Sctp { kind: kind @ (1 | 2), flags, tag, announced } => {
                let chunk = [&[*kind, *flags, 0, 20][..], &announced.to_be_bytes(), &[0; 12]].concat();
                packet.sctp(source, destination, *tag, &chunk)
            }
            Self::Sctp { kind, flags, tag, .. } => {
                packet.sctp(source, destination, *tag, &[*kind, *flags, 0, 8, 0, 0, 0, 1])
            }
            Self::Icmp(kind) => {
                let [high, low] = source.to_be_bytes();
                packet.icmp(&Icmp::Other(*kind, 0, [high, low, 0, 1], vec![0; 8]))
            }
            Self::Raw(number, length) => packet.raw(IpNumber(*number), &vec![0; *length]),
        }
    }
}

/// The headers around the layer 4 of a packet.
#[derive(Default)]
pub(super) struct Dress {
    tags: Vec<bool>,
    options: usize,
    extensions: Vec<usize>,
    fragment: Option<Fragment>,
}

#[derive(Clone, Copy)]
enum Fragment {
    /// This place, whatever the packet is.
    At(u16, bool),
    /// Cut at multiples of this number of octets.
    Cut(usize),
}

impl Dress {
    /// Mostly nothing.
    pub(super) fn new(dice: &mut Dice) -> Self {
        let mut dress = Self::default();
        match dice.below(40) {
            0 => {
                let most = if dice.percent(70) { 3 } else { 12 };
                dress.tags = (0..=dice.below(most)).map(|_| dice.percent(70)).collect();
            }
            1 => dress.options = 1 + dice.below(40),
            2 | 3 => {
                let count = if dice.percent(80) { 1 + dice.below(3) } else { 6 + dice.below(5) };
                dress.extensions = (0..count).map(|_| dice.below(14)).collect();
            }
            4 | 5 => {
                let more = dice.percent(60);
                let offset = *dice.pick(&[0, 0, 0, 1, 2, 3, 8000]);
                dress.fragment = Some(Fragment::At(offset, more));
            }
            6 => dress.fragment = Some(Fragment::Cut(8 * (1 + dice.below(4)))),
            7 => {
                dress.tags = vec![true];
                dress.fragment = Some(Fragment::At(u16::from(dice.within(0, 2)), dice.percent(50)));
                dress.extensions = vec![dice.below(14)];
                dress.options = 4 * dice.below(3);
            }
            _ => (),
        }
        dress
    }

    pub(super) fn put_on(&self, mut packet: Packet, v4: bool) -> Packet {
        for (inside, plain) in (1..).zip(&self.tags) {
            packet = if *plain { packet.vlan(inside) } else { packet.service_vlan(inside) };
        }
        if v4 {
            packet = packet.options(&vec![1; self.options]);
        } else {
            packet = self.extensions.iter().fold(packet, |packet, kind| match kind {
                0..=2 => packet.hop_by_hop(u8::from(*kind == 1)),
                3..=6 => packet.destination_options(u8::from(*kind == 4)),
                7 | 8 => packet.routing(),
                9 => packet.raw_extension(IpNumber::IPV6_ROUTE_HEADER, vec![0, 0, 0, 1, 0, 0, 0, 0]),
                10 | 11 => packet.authentication(),
                12 => packet.raw_extension(IpNumber(44), vec![0; 8]),
                _ => packet.raw_extension(IpNumber(135), vec![0; 8]),
            });
        }
        if let Some(Fragment::At(offset, more)) = self.fragment {
            packet = packet.fragment(offset, more, 9);
        }
        packet
    }

    pub(super) fn cut(&self, packet: Packet, dice: &mut Dice) -> Vec<Packet> {
        let Some(Fragment::Cut(size)) = self.fragment else { return vec![packet] };
        let mut parts = packet.fragments(size, u32::from(dice.port()));
        if parts.is_empty() {
            return vec![packet];
        }
        if dice.percent(30) {
            parts.reverse();
        }
        parts
    }
}

/// Cut off anywhere, bits turned, lengths wrong; mostly not.
pub(super) fn damaged(dice: &mut Dice, mut frame: Vec<u8>) -> Vec<u8> {
    let whole = frame.clone();
    match dice.below(24) {
        0 => frame.truncate(14 + dice.below(frame.len() - 13)),
        1 => flip(dice, &mut frame),
        2 => {
            // Behind the addresses: a damaged packet keeps its sender.
            let start = if frame[12] == 0x86 { 54 } else { 34 };
            if frame.len() > start {
                let at = start + dice.below(frame.len() - start);
                frame[at] = dice.within(0, 255);
            }
        }
        3 => {
            let at = *dice.pick(&[14, 16, 17, 18, 19, 20, 23, 46]);
            if at < frame.len() {
                frame[at] = dice.within(0, 255);
            }
        }
        _ => (),
    }
    if runs(&frame) { frame } else { whole }
}

/// A few bits.
pub(super) fn flip(dice: &mut Dice, bytes: &mut [u8]) {
    for _ in 0..=dice.below(3) {
        if !bytes.is_empty() {
            let at = dice.below(bytes.len());
            bytes[at] ^= 1 << dice.below(8);
        }
    }
}

/// BPF_PROG_TEST_RUN takes no IP header that is cut off, unless a VLAN tag stands before it.
fn runs(frame: &[u8]) -> bool {
    match frame.get(12..14) {
        Some([0x08, 0x00]) => frame.len() >= 34,
        Some([0x86, 0xdd]) => frame.len() >= 54,
        Some(_) => frame.len() >= 15,
        None => false,
    }
}
