//! Packets of an attacker in the LAN.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::gap::socket::{BATCH, Sender};
use crate::lab::Lab;
use crate::packet::{Icmp, Packet, Tcp};

/// Destination of the flood of SYNs: an unused address among the pods, so that no pod has to answer.
pub(super) const TARGET: Ipv4Addr = Ipv4Addr::new(10, 200, 1, 200);
/// Spoofed sources are in 100.64.0.0/10.
const SPOOFED: u32 = 0x6440_0000;

/// A kind of attack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attack {
    /// SYNs to an allowed port from spoofed sources, each of its own.
    Syn,
    /// Fragments without their first one, first fragments without the rest.
    Fragments,
    /// ICMP errors that quote unknown flows.
    IcmpErrors,
    /// RSTs to established connections, out of their window.
    Resets,
    /// SYNs to all ports of a pod.
    Scan,
    /// Denied packets, each worth an event.
    Events,
}

impl Attack {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Syn, Self::Fragments, Self::IcmpErrors, Self::Resets, Self::Scan, Self::Events];

    /// In words.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Syn => "SYNs, spoofed",
            Self::Fragments => "fragments",
            Self::IcmpErrors => "ICMP errors, made up",
            Self::Resets => "RSTs out of window",
            Self::Scan => "scan of all ports",
            Self::Events => "event flood",
        }
    }

    /// Packet `number` of it. `connections`: source ports of established connections to `port` of the pod.
    fn frame(self, lab: &Lab, number: u32, connections: &[u16], port: u16) -> Vec<u8> {
        let (a, c1) = (lab.a(), lab.c1());
        let spoofed = Ipv4Addr::from(SPOOFED + number % (1 << 22));
        let from = |source: Ipv4Addr, to: Ipv4Addr| Packet::new(source, to).macs(a.mac, lab.b().mac);
        let any = u16::try_from(number % 60_000).unwrap_or(0) + 1024;
        match self {
            Self::Syn => from(spoofed, TARGET).tcp(Tcp::syn(any, port)).frame(),
            Self::Fragments => from(spoofed, TARGET)
                .udp(any, port, &[0; 64])
                .fragment(if number.is_multiple_of(2) { 0 } else { 8 }, number % 4 < 2, number)
                .frame(),
            Self::IcmpErrors => {
                let quoted = Packet::new(c1.v4, spoofed).tcp(Tcp::ack(any, port, number, 1)).ip();
                from(spoofed, c1.v4).icmp(&Icmp::Unreachable(1, quoted)).frame()
            }
            Self::Resets => {
                let client = connections[number as usize % connections.len().max(1)];
                // A multiple of 2^24 beyond the sent data is outside every window.
                from(a.v4, c1.v4)
                    .tcp(Tcp::rst(client, port, number.wrapping_mul(1 << 24) | 0x80_0000))
                    .frame()
            }
            Self::Scan => {
                let to = u16::try_from(number % 65_536).unwrap_or(0);
                from(a.v4, c1.v4)
                    .tcp(Tcp::syn(40_000 + u16::try_from(number % 10_000).unwrap_or(0), to))
                    .frame()
            }
            Self::Events => from(spoofed, c1.v4).udp(any, 9, &[0; 8]).frame(),
        }
    }
}

/// Sends `count` packets of an attack, as fast as the sender can, at most `rate` in a second.
pub(super) fn send(
    attack: Attack,
    lab: &Lab,
    count: u32,
    rate: u32,
    connections: &[u16],
    port: u16,
) -> Result<Duration> {
    let sender = Sender::new(&lab.a().netns, &lab.a().interface)?;
    let begun = Instant::now();
    let mut next = 0;
    while next < count {
        let due = u64::try_from(begun.elapsed().as_micros())?.saturating_mul(rate.into()) / 1_000_000;
        if u64::from(next) > due {
            std::thread::sleep(Duration::from_micros(200));
            continue;
        }
        let last = count.min(next + u32::try_from(BATCH)?);
        let mut batch: Vec<_> = (next..last).map(|n| attack.frame(lab, n, connections, port)).collect();
        sender.send(&mut batch)?;
        next = last;
    }
    Ok(begun.elapsed())
}
