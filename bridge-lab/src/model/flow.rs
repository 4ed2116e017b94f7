//! Flows: who has opened one, and how it ends.

use std::net::IpAddr;

use bridge_common::filter::{flow::state, policy::direction::OUTBOUND};

use super::header::{ACK, COOKIE_ECHO, Content, FIN, ICMP, ICMPV6, INIT, INIT_ACK, RST, SYN, TCP, UDP};

/// How far beyond the responder's initial sequence number the initiator's first acknowledgement may be.
const HANDSHAKE_WINDOW: u32 = 1 << 20;
/// How far the number of a LAN host's RST may be above the last one that the pod is known to expect.
const RST_WINDOW: u32 = 1 << 16;
/// The pod's acknowledgements are noted at this distance.
const NUMBER_STEP: u32 = 1 << 14;
/// Seconds for which a FIN of the LAN host waits for its acknowledgement.
const FIN_LIFETIME: u64 = 10;

/// One end of a flow.
pub(super) type End = (IpAddr, u16);

/// A flow, whichever way its packets go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    low: End,
    high: End,
    protocol: u8,
}

impl Key {
    pub(super) fn new(a: End, b: End, protocol: u8) -> Self {
        Self { low: a.min(b), high: a.max(b), protocol }
    }

    pub(super) fn protocol(&self) -> u8 {
        self.protocol
    }

    /// As the programs have it.
    #[must_use]
    pub fn of_table(&self) -> bridge_common::filter::flow::FlowKey {
        let port = |end: End| end.1.to_be_bytes();
        let (low, high) = (self.low, self.high);
        bridge_common::filter::flow::FlowKey::new(
            &low.0.into(),
            port(low),
            &high.0.into(),
            port(high),
            self.protocol,
        )
        .0
    }
}

/// A TCP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) flags: u8,
    pub(super) sequence: u32,
    pub(super) acknowledgement: u32,
    /// Octets of data by the lengths of the headers; `None`: longer than an IP header can say.
    pub(super) payload: Option<u32>,
}

impl Segment {
    /// Whether it asks for a connection.
    pub(super) fn is_syn(&self) -> bool {
        self.flags & (SYN | ACK) == SYN
    }
}

/// The common header of an SCTP packet, and its first chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Chunk {
    pub(super) kind: u8,
    /// Verification tag.
    pub(super) tag: u32,
    /// The tag is that of the sender (RFC 9260, 8.5.1).
    pub(super) reflected: bool,
    /// The tag that INIT and INIT ACK ask for.
    pub(super) announced: Option<u32>,
}

impl Chunk {
    pub(super) fn is_init(&self) -> bool {
        self.kind == INIT
    }
}

/// State of a flow.
#[derive(Clone, Debug)]
pub(super) struct Flow {
    pub(super) initiator: End,
    pub(super) direction: u8,
    /// Would have been denied.
    pub(super) audit: bool,
    /// Opened by a pod towards where no rule restricts it.
    pub(super) unrestricted: bool,
    /// The interface of the pod; 0: it is unknown.
    pub(super) interface: u32,
    /// How long it has been silent, in seconds.
    pub(super) silent: u64,
    /// Both sides have shown that they want it; of TCP, the handshake is complete.
    confirmed: bool,
    /// Of TCP, the initiator's SYN; `None`: it was opened by another segment.
    initiator_isn: Option<u32>,
    /// The data in that.
    data: u32,
    /// Of TCP, from the responder's SYN on.
    responder_isn: Option<u32>,
    /// Ended by the initiator, and by the responder.
    ended: [bool; 2],
    reset: bool,
    /// The acknowledgement that a FIN of the LAN host waits for, and since how many seconds.
    pending_fin: Option<(u32, u64)>,
    /// The next number that the pod is known to expect of the LAN host.
    expected: Option<u32>,
    /// Of SCTP, the tags that the initiator and the responder have asked for.
    tags: [Option<u32>; 2],
}

/// The meaning of a segment to a handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Handshake {
    Passes,
    /// The responder agrees.
    Agrees,
    Invalid,
}

impl Flow {
    pub(super) fn new(initiator: End, direction: u8, first: &Content) -> Self {
        let (initiator_isn, data) = match first {
            Content::Tcp(segment) if segment.is_syn() => {
                (Some(segment.sequence), segment.payload.unwrap_or(0))
            }
            _ => (None, 0),
        };
        let tag = match first {
            Content::Sctp(chunk) if chunk.is_init() => chunk.announced,
            _ => None,
        };
        Self {
            initiator,
            direction,
            audit: false,
            unrestricted: false,
            interface: 0,
            silent: 0,
            confirmed: false,
            initiator_isn,
            data,
            responder_isn: None,
            ended: [false; 2],
            reset: false,
            pending_fin: None,
            expected: None,
            tags: [tag, None],
        }
    }

    /// Whether an SCTP packet, other than an INIT, is one of this established association.
    pub(super) fn owns(&self, from_initiator: bool, chunk: &Chunk) -> bool {
        let own = self.tags[usize::from(!from_initiator)];
        self.tags == [None; 2]
            || (self.verifies(from_initiator, chunk) && (chunk.kind != INIT_ACK || chunk.announced == own))
    }

    /// Whether the tag of an SCTP packet is the one that its receiver has asked for, or its sender's if it says so.
    fn verifies(&self, from_initiator: bool, chunk: &Chunk) -> bool {
        let [of_initiator, of_responder] = self.tags;
        let to_initiator = from_initiator == chunk.reflected;
        Some(chunk.tag) == if to_initiator { of_initiator } else { of_responder }
    }

    /// An SCTP packet, other than an INIT, before the association is established. `None`: it is to be judged.
    pub(super) fn association(&mut self, from_initiator: bool, chunk: &Chunk) -> Option<()> {
        if self.tags == [None; 2] {
            // The pod has opened it before it was seen here.
            self.confirmed = !from_initiator;
            return self.confirmed.then_some(());
        }
        if !self.verifies(from_initiator, chunk) {
            return None;
        }
        match (chunk.kind, from_initiator) {
            (INIT_ACK, false) => (self.tags[1], self.silent) = (chunk.announced, 0),
            (COOKIE_ECHO, true) => self.confirmed = true,
            _ => (),
        }
        Some(())
    }

    /// Whether this end of it is the LAN host.
    pub(super) fn is_of_lan(&self, end: End) -> bool {
        (end == self.initiator) == (self.direction != OUTBOUND)
    }

    pub(super) fn is_confirmed(&self) -> bool {
        self.confirmed
    }

    /// A reply was seen, of protocols other than TCP.
    pub(super) fn confirm(&mut self) {
        self.confirmed = true;
    }

    /// Nothing was seen of it for this number of seconds.
    pub(super) fn age(&mut self, seconds: u64) {
        self.silent = seconds;
        if let Some((_, since)) = &mut self.pending_fin {
            *since = seconds;
        }
    }

    pub(super) fn state(&self, protocol: u8) -> u8 {
        match (protocol, self.confirmed) {
            (TCP, _) if self.reset => state::RESET,
            (TCP, false) if self.initiator_isn.is_none() => state::OTHER_UNREPLIED,
            (TCP, false) if self.responder_isn.is_none() => state::SYN_SENT,
            (TCP, false) => state::SYN_RECEIVED,
            (TCP, true) => match self.ended {
                [false, false] => state::ESTABLISHED,
                [true, true] => state::CLOSING,
                _ => state::FIN_WAIT,
            },
            (UDP, false) => state::UDP_UNREPLIED,
            (UDP, true) => state::UDP_REPLIED,
            (ICMP | ICMPV6, false) => state::ICMP_UNREPLIED,
            (ICMP | ICMPV6, true) => state::ICMP_REPLIED,
            (_, false) => state::OTHER_UNREPLIED,
            (_, true) => state::OTHER_REPLIED,
        }
    }

    /// A segment of an established connection, other than a SYN. Returns whether it says that the pod has received much
    /// since that was last noted.
    pub(super) fn segment(&mut self, from_initiator: bool, segment: &Segment) -> bool {
        let from_lan = from_initiator == (self.direction != OUTBOUND);
        let (this, other) = (usize::from(!from_initiator), usize::from(from_initiator));
        if self.pending_fin.is_some_and(|(_, since)| since > FIN_LIFETIME) {
            self.pending_fin = None;
        }
        if segment.flags & RST != 0 {
            let fits = |expected| segment.sequence.wrapping_sub(expected) < RST_WINDOW;
            self.reset |= !from_lan || self.expected.is_some_and(fits);
            return false;
        }
        self.reset = false;
        if from_lan {
            if segment.flags & FIN != 0 && !self.ended[this] {
                let end = |payload| segment.sequence.wrapping_add(payload).wrapping_add(1);
                self.pending_fin = segment.payload.map(|payload| (end(payload), 0));
            }
            return false;
        }
        self.ended[this] |= segment.flags & FIN != 0;
        if self.pending_fin.is_some_and(|(end, _)| end == segment.acknowledgement) {
            self.pending_fin = None;
            self.ended[other] = true;
        }
        let far =
            |expected: u32| (NUMBER_STEP..1 << 31).contains(&segment.acknowledgement.wrapping_sub(expected));
        let moved = segment.flags & ACK != 0 && self.expected.is_none_or(far);
        if moved {
            self.expected = Some(segment.acknowledgement);
        }
        moved
    }

    /// Whether a segment acknowledges the SYN that opened the flow.
    pub(super) fn is_acknowledged_by(&self, segment: &Segment) -> bool {
        self.is_behind_syn(segment.acknowledgement)
    }

    /// Whether a number follows the SYN, or the data in it (RFC 7413).
    fn is_behind_syn(&self, number: u32) -> bool {
        self.initiator_isn.is_some_and(|isn| number.wrapping_sub(isn.wrapping_add(1)) <= self.data)
    }

    /// A segment before the connection is established. `None`: it is to be judged.
    pub(super) fn handshake(&mut self, from_initiator: bool, segment: &Segment) -> Option<Handshake> {
        let flags = segment.flags;
        if segment.is_syn() {
            return None;
        }
        let Some(isn) = self.initiator_isn else {
            // The pod has opened it before it was seen here.
            self.confirmed = !from_initiator;
            return self.confirmed.then_some(Handshake::Passes);
        };
        if !from_initiator {
            // Another answer may be forged, or about an older connection of the ports (RFC 5961, 4.2).
            if flags & ACK == 0 || !self.is_acknowledged_by(segment) {
                return Some(Handshake::Passes);
            }
            if flags & RST != 0 {
                (self.reset, self.responder_isn, self.silent) = (true, None, 0);
            } else if flags & SYN != 0 {
                (self.reset, self.responder_isn, self.silent) = (false, Some(segment.sequence), 0);
                return Some(Handshake::Agrees);
            }
            return Some(Handshake::Passes);
        }
        if flags & RST != 0 {
            if self.is_behind_syn(segment.sequence) {
                (self.reset, self.responder_isn, self.silent) = (true, None, 0);
            }
            return Some(Handshake::Passes);
        }
        let seen = |isn: &u32| (1..=HANDSHAKE_WINDOW).contains(&segment.acknowledgement.wrapping_sub(*isn));
        let Some(responder_isn) = self.responder_isn.filter(seen).filter(|_| flags & SYN == 0) else {
            return Some(Handshake::Invalid);
        };
        self.confirmed = true;
        let of_lan = if self.direction == OUTBOUND { responder_isn } else { isn };
        self.expected = Some(of_lan.wrapping_add(1));
        self.segment(true, segment);
        Some(Handshake::Passes)
    }
}
