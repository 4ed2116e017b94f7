//! Events about single packets, sent through a ring buffer.

use crate::filter::address::Address;

/// A verdict on a packet.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct Event {
    /// Nanoseconds of `CLOCK_MONOTONIC`.
    pub time: u64,
    /// Source address of the packet.
    pub source: Address,
    /// Destination address of the packet.
    pub destination: Address,
    /// Interface it came in by.
    pub ifindex: u32,
    /// Number of the policy that judged it.
    pub generation: u32,
    /// Index of the rule that decided, plus one; 0: no rule did.
    pub rule: u32,
    /// Length from the link layer header on, in bytes.
    pub length: u32,
    /// How many events this CPU kept back, because of the rate limit or a full buffer, since its last event.
    pub suppressed: u32,
    /// Source port, network byte order; for ICMP queries the identifier.
    pub source_port: [u8; 2],
    /// Destination port, network byte order; for ICMP queries the identifier.
    pub destination_port: [u8; 2],
    /// IP protocol number.
    pub protocol: u8,
    /// One of [`verdict`].
    pub verdict: u8,
    /// Number of a [`crate::filter::counters::Reason`].
    pub reason: u8,
    /// One of [`crate::filter::policy::direction`].
    pub direction: u8,
    /// Flags of a TCP header; type of an ICMP header.
    pub detail: u8,
    /// Zero.
    pub padding: [u8; 11],
}

/// Values of [`Event::verdict`].
pub mod verdict {
    /// Let through.
    pub const ALLOW: u8 = 0;
    /// Dropped without a word.
    pub const DROP: u8 = 1;
    /// Answered with an RST or an ICMP error, and dropped.
    pub const REJECT: u8 = 2;
    /// Let through, but would have been denied.
    pub const AUDIT: u8 = 3;
    /// Denied, but a rule in audit mode would have allowed it. The denial has an event of its own.
    pub const AUDIT_ALLOW: u8 = 4;
    /// The verdicts by number, as they are shown.
    pub const NAMES: [&str; 5] = ["allow", "drop", "reject", "audit", "audit-allow"];
}

/// How many events and answers a CPU has sent in the current second, and how many events it has kept back since its last one.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct EventBudget {
    /// When the second ends, in nanoseconds of `CLOCK_MONOTONIC`.
    pub until: u64,
    /// Events sent in it.
    pub sent: u32,
    /// Events kept back since the last one sent.
    pub suppressed: u32,
    /// Events kept back since the map was made.
    pub suppressed_total: u64,
    /// Answers to denied packets, sent in the second.
    pub answered: u32,
    /// Zero.
    pub padding: u32,
}

crate::plain_old_data!(Event: 80, EventBudget: 32);
