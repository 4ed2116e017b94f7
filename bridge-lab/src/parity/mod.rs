//! Random policies, and packets that are likely to show where two engines differ; and both engines, through which
//! they are sent for real. docs/parity.md has the results.
//!
//! A packet comes from the LAN or from the pods, according to its source address: [`LAN`] and [`PODS`] are blocks of
//! addresses that the node routes to either side. Its verdict is whether it comes out on the other side (all of its
//! fragments, if it has such), or at the node itself if it is addressed there.

mod asked;
pub(crate) mod dice;
mod elsewhere;
pub(crate) mod endpoints;
mod engines;
mod expected;
mod identity;
mod node;
pub(crate) mod policies;
mod run;
mod scripts;
mod translated;

use std::collections::HashSet;
use std::net::IpAddr;

use bridge_agent::model::Policy;

use self::dice::Dice;
pub use self::endpoints::Flow;
pub use self::expected::{Difference, ENGINES, Expected};
pub use self::run::{Nodes, PACKETS_PER_POLICY, REGRESSIONS, Report};
pub use self::translated::Service;
use crate::packet::Packet;

/// Addresses that the node routes to the LAN.
pub const LAN: [&str; 2] = ["192.168.0.0/16", "fd31::/32"];
/// Addresses that the node routes to the pods.
pub const PODS: [&str; 2] = ["10.200.0.0/16", "fd20::/32"];

/// The node's own addresses.
#[must_use]
pub fn local() -> [IpAddr; 2] {
    [IpAddr::from([192, 168, 31, 17]), IpAddr::from([0xfd31, 0, 0, 0, 0, 0, 0, 0x17])]
}

/// A side of the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// LAN hosts.
    Lan,
    /// Pods.
    Pods,
    /// Pods of other nodes, through a tunnel. Its outer packets are on the side of the LAN.
    Overlay,
}

impl Side {
    /// Each.
    pub const ALL: [Self; 3] = [Self::Lan, Self::Pods, Self::Overlay];

    /// The side across the node.
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Self::Lan => Self::Pods,
            Self::Pods | Self::Overlay => Self::Lan,
        }
    }
}

/// One packet on its way.
#[derive(Clone, Debug)]
pub struct Sent {
    /// Label for a report.
    pub label: &'static str,
    /// Where it is put onto the wire.
    pub from: Side,
    /// The packet, or its fragments in the order to be sent.
    pub packets: Vec<Packet>,
    /// The packet that comes out, if the node translates it.
    pub arrives: Option<Packet>,
    /// Expected verdict if all packets before it were sent, by the documentation.
    pub expected: Expected,
}

/// A policy and the packets that are sent through it.
#[derive(Clone, Debug)]
pub struct Case {
    /// Seed of the case.
    pub seed: u64,
    /// Its rules. In enforce mode: in audit mode every packet passes.
    pub policy: Policy,
    /// To be sent in order. No two stories share a flow.
    pub sent: Vec<Sent>,
    /// How many of them are neither of an overlay nor in transit, and come before all others.
    pub plain: usize,
    /// How many of them come before the services.
    pub direct: usize,
    /// Translate the rest.
    pub services: Vec<Service>,
}

impl Case {
    /// The case of a seed: a policy and at least `packets` packets. The same for ever.
    #[must_use]
    pub fn new(seed: u64, packets: usize) -> Self {
        let mut dice = Dice::new(seed);
        let policy = policies::policy(&mut dice);
        let mut flows = HashSet::new();
        let mut sent = Vec::new();
        // Cases that follow one another have no number of a datagram in common: parts of some wait in vain for others.
        let mut tag = u32::try_from(seed & 0x3f_ffff).unwrap_or_default() << 10;
        while sent.len() < packets {
            tag += 1;
            let (flow, protocol, packets) = scripts::story(&mut dice, &policy, tag);
            let Flow { source, destination, source_port, destination_port } = flow;
            let mut ends = [(source, source_port), (destination, destination_port)];
            ends.sort_unstable();
            if flows.insert((protocol, ends)) {
                sent.extend(packets);
            }
        }
        let plain = sent.len();
        let whole = elsewhere::policy(seed, &policy);
        sent.extend(elsewhere::stories(seed, &policy, &whole, tag + 100));
        let direct = sent.len();
        let (services, translated) = translated::stories(seed, &policy, &whole, tag);
        sent.extend(translated);
        Self { seed, policy: whole, sent, plain, direct, services }
    }
}

#[cfg(test)]
mod tests;
