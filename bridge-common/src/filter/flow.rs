//! The flow table: keys, values, states.

use super::{
    address::Address,
    fast_path::{Lease, nanoseconds, ticks, towards},
};
use crate::protocol;

/// Key of a flow, the same for both directions: the end with the smaller (address, port) is `low`.
///
/// For ICMP queries both ports hold the identifier.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct FlowKey {
    /// Address of the smaller end.
    pub low: Address,
    /// Address of the greater end.
    pub high: Address,
    /// Port of the smaller end, network byte order.
    pub low_port: [u8; 2],
    /// Port of the greater end, network byte order.
    pub high_port: [u8; 2],
    /// IP protocol number.
    pub protocol: u8,
    /// Zero.
    pub padding: [u8; 3],
}

/// Which end of a [`FlowKey`] something is.
pub const END_LOW: u8 = 0;
/// See [`END_LOW`].
pub const END_HIGH: u8 = 1;

impl FlowKey {
    /// The key of a packet with this source and destination, and which end the source is. Ports in network byte order.
    #[must_use]
    pub fn new(
        source: &Address,
        source_port: [u8; 2],
        destination: &Address,
        destination_port: [u8; 2],
        protocol: u8,
    ) -> (Self, u8) {
        let mut key = Self::default();
        let end = key.set(source, source_port, destination, destination_port, protocol);
        (key, end)
    }

    /// As [`FlowKey::new`], in place.
    #[inline(always)]
    pub fn set(
        &mut self,
        source: &Address,
        source_port: [u8; 2],
        destination: &Address,
        destination_port: [u8; 2],
        protocol: u8,
    ) -> u8 {
        let (sh, sl) = source.halves();
        let (dh, dl) = destination.halves();
        let source_is_low = if sh != dh {
            sh < dh
        } else if sl != dl {
            sl < dl
        } else {
            u16::from_be_bytes(source_port) <= u16::from_be_bytes(destination_port)
        };
        // As one word: of a few zeros in a row the compiler makes a call of a loop over bytes.
        // SAFETY: protocol and padding are the last four bytes, aligned to them.
        unsafe {
            (&raw mut *self)
                .cast::<u32>()
                .add(size_of::<Self>() / 4 - 1)
                .write_volatile(u32::from(protocol).to_le());
        }
        if source_is_low {
            (self.low, self.low_port) = (*source, source_port);
            (self.high, self.high_port) = (*destination, destination_port);
            END_LOW
        } else {
            (self.low, self.low_port) = (*destination, destination_port);
            (self.high, self.high_port) = (*source, source_port);
            END_HIGH
        }
    }

    /// The address of an end, [`END_LOW`] or [`END_HIGH`].
    #[must_use]
    #[inline(always)]
    pub const fn end(&self, end: u8) -> &Address {
        if end == END_LOW { &self.low } else { &self.high }
    }
}

/// State of a flow: with its key and the kernel's own fields, two cache lines.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct Flow {
    /// Time of the last packet, nanoseconds of `CLOCK_MONOTONIC`, coarse and updated at most once a second.
    pub last_seen: u64,
    /// Time of the first packet, in [`ticks`].
    pub opened: u32,
    /// One of [`state`].
    pub state: u8,
    /// Which end opened the flow: [`END_LOW`] or [`END_HIGH`].
    pub initiator: u8,
    /// One of [`crate::filter::policy::direction`].
    pub direction: u8,
    /// Bits of [`flag`].
    pub flags: u8,
    /// In the established table: its ways past the network stack, by [`towards`]. In the half-open table: see
    /// [`Flow::responder_isn`]. SCTP, in both: see [`Flow::tag`].
    pub leases: [Lease; towards::COUNT],
    /// Number of the policy that admitted the flow; 0: seeded from the kernel's conntrack.
    pub generation: u32,
    /// Index of the rule that admitted it, in that policy; `u32::MAX`: none.
    pub rule: u32,
    /// Index of the pod's interface; 0: unknown, or the flow is not seen from there.
    pub interface: u32,
    /// TCP, half-open table: length of the data that the SYN carried, in bytes. Else the next sequence number that the pod
    /// expects from the LAN host, by the pod's acknowledgements; may lag
    /// behind. See [`flag::NUMBERED`].
    pub expected: u32,
}

/// Bytes that the kernel keeps with each element of an LRU hash table (`struct htab_elem`, kernel/bpf/hashtab.c).
const ELEMENT: usize = 48;
const _: () = assert!(ELEMENT + size_of::<FlowKey>() + size_of::<Flow>() == 136);

impl Flow {
    /// Half-open table: initial sequence number of the responder, host byte order. Uses the room of the leases, which a
    /// half-open flow does not have.
    #[must_use]
    #[inline(always)]
    pub const fn responder_isn(&self) -> u32 {
        self.leases[0].expires
    }

    /// See [`Flow::responder_isn`].
    #[inline(always)]
    pub const fn set_responder_isn(&mut self, sequence: u32) {
        self.leases[0].expires = sequence;
    }

    /// Half-open table: initial sequence number of the initiator, as [`Flow::responder_isn`].
    #[must_use]
    #[inline(always)]
    pub const fn initiator_isn(&self) -> u32 {
        self.leases[1].expires
    }

    /// See [`Flow::initiator_isn`].
    #[inline(always)]
    pub const fn set_initiator_isn(&mut self, sequence: u32) {
        self.leases[1].expires = sequence;
    }

    /// SCTP: the verification tag that the initiator, or the responder, has announced for packets towards it; 0: unknown.
    /// Uses the room of the leases: no SCTP packet takes the fast path.
    #[must_use]
    #[inline(always)]
    pub const fn tag(&self, of_initiator: bool) -> u32 {
        if of_initiator { self.initiator_isn() } else { self.responder_isn() }
    }

    /// See [`Flow::tag`].
    #[inline(always)]
    pub const fn set_tag(&mut self, of_initiator: bool, tag: u32) {
        if of_initiator { self.set_initiator_isn(tag) } else { self.set_responder_isn(tag) }
    }

    /// The acknowledgement that confirms the LAN host's FIN, and when the FIN was seen, in ticks. Holds with
    /// [`flag::FIN_PENDING`]; uses the room of the leases, which hold no longer then.
    #[must_use]
    #[inline(always)]
    pub const fn pending_fin(&self) -> (u32, u32) {
        (self.leases[0].expires, self.leases[1].expires)
    }

    /// See [`Flow::pending_fin`].
    #[inline(always)]
    pub const fn set_pending_fin(&mut self, acknowledgement: u32, now: u32) {
        self.leases = [
            Lease { expires: acknowledgement, epoch: 0, path: 0 },
            Lease { expires: now, epoch: 0, path: 0 },
        ];
    }

    /// Whether packets of this flow, which is of this IP protocol, that neither open nor end it change nothing in it: TCP that
    /// is established, UDP that was replied to, and not by audit mode alone.
    #[must_use]
    #[inline(always)]
    pub const fn is_settled(&self, protocol: u8) -> bool {
        let settled = match protocol {
            protocol::TCP => state::ESTABLISHED,
            protocol::UDP => state::UDP_REPLIED,
            _ => return false,
        };
        self.state == settled
            && self.flags & (flag::AUDIT | flag::TRANSLATED | flag::UNRESTRICTED | flag::FIN_PENDING) == 0
    }

    /// How long ago it was opened, in nanoseconds, at `now`, in nanoseconds of `CLOCK_MONOTONIC`.
    #[must_use]
    pub const fn age(&self, now: u64) -> u64 {
        nanoseconds(ticks(now).wrapping_sub(self.opened))
    }
}

/// Values of [`Flow::state`]; also the index of its timeout in [`crate::filter::control::Settings::timeouts`].
pub mod state {
    /// TCP: SYN seen.
    pub const SYN_SENT: u8 = 1;
    /// TCP: SYN-ACK seen.
    pub const SYN_RECEIVED: u8 = 2;
    /// TCP: the initiator has acknowledged the responder's SYN.
    pub const ESTABLISHED: u8 = 3;
    /// TCP: one side has sent FIN.
    pub const FIN_WAIT: u8 = 4;
    /// TCP: both sides have sent FIN.
    pub const CLOSING: u8 = 5;
    /// TCP: RST seen, from either side.
    pub const RESET: u8 = 6;
    /// UDP: no reply yet.
    pub const UDP_UNREPLIED: u8 = 7;
    /// UDP: packets of both directions seen.
    pub const UDP_REPLIED: u8 = 8;
    /// ICMP query: no reply yet.
    pub const ICMP_UNREPLIED: u8 = 9;
    /// ICMP query: replied to.
    pub const ICMP_REPLIED: u8 = 10;
    /// SCTP and every other protocol: no reply yet.
    pub const OTHER_UNREPLIED: u8 = 11;
    /// SCTP and every other protocol: packets of both directions seen.
    pub const OTHER_REPLIED: u8 = 12;
    /// One more than the greatest state.
    pub const COUNT: usize = 13;
    /// The states by number, as they are shown.
    pub const NAMES: [&str; COUNT] = [
        "none",
        "syn-sent",
        "syn-received",
        "established",
        "fin-wait",
        "closing",
        "reset",
        "udp-unreplied",
        "udp-replied",
        "icmp-unreplied",
        "icmp-replied",
        "other-unreplied",
        "other-replied",
    ];
}

/// Bits of [`Flow::flags`].
pub mod flag {
    /// The initiator has sent FIN.
    pub const FIN_INITIATOR: u8 = 1;
    /// The responder has sent FIN.
    pub const FIN_RESPONDER: u8 = 2;
    /// Would have been denied: such a flow passes in audit mode only.
    pub const AUDIT: u8 = 4;
    /// Taken over from the kernel's conntrack at first start.
    pub const SEEDED: u8 = 8;
    /// Entered where addresses are final, because the node translates them: its packets have others elsewhere.
    pub const TRANSLATED: u8 = 16;
    /// Opened by a pod towards a destination that no rule restricts.
    pub const UNRESTRICTED: u8 = 32;
    /// The LAN host has sent a FIN that the pod has not acknowledged yet.
    pub const FIN_PENDING: u8 = 64;
    /// [`super::Flow::expected`] holds.
    pub const NUMBERED: u8 = 128;
}

/// Two hosts between which a first fragment was let through.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct FragmentKey {
    /// Source address.
    pub source: Address,
    /// Destination address.
    pub destination: Address,
}

crate::plain_old_data!(FlowKey: 40, Flow: 48, FragmentKey: 32);
