//! The headers of a packet, as far as a verdict needs them.

use bridge_common::filter::{address::Address, counters::Reason, flow::FlowKey};

/// TCP flags (RFC 9293, 3.1).
pub(crate) mod tcp {
    pub(crate) const FIN: u8 = 0x01;
    pub(crate) const SYN: u8 = 0x02;
    pub(crate) const RST: u8 = 0x04;
    pub(crate) const ACK: u8 = 0x10;
    pub(crate) const URG: u8 = 0x20;
    /// Without PSH, ECE and CWR, which may be on any segment.
    pub(crate) const DECISIVE: u8 = FIN | SYN | RST | ACK | URG;

    /// The combinations of [`DECISIVE`] that senders make, a bit each (`tcp_valid_flags`,
    /// net/netfilter/nf_conntrack_proto_tcp.c).
    pub(crate) const VALID: u64 = 1 << SYN
        | 1 << (SYN | URG)
        | 1 << (SYN | ACK)
        | 1 << RST
        | 1 << (RST | ACK)
        | 1 << (FIN | ACK)
        | 1 << (FIN | ACK | URG)
        | 1 << ACK
        | 1 << (ACK | URG);
}

/// Types of SCTP chunks (RFC 9260, 3.2), and a flag.
pub(crate) mod sctp {
    pub(crate) const INIT: u8 = 1;
    pub(crate) const INIT_ACK: u8 = 2;
    pub(crate) const ABORT: u8 = 6;
    pub(crate) const COOKIE_ECHO: u8 = 10;
    pub(crate) const SHUTDOWN_COMPLETE: u8 = 14;
    /// T bit: the verification tag is the sender's own (RFC 9260, 8.5.1).
    pub(crate) const REFLECTED: u32 = 1;
}

/// How a packet relates to the flow table.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    /// Belongs to a flow, and may open one.
    Plain,
    /// ICMP query: may open a flow.
    Query,
    /// ICMP reply: follows a query.
    Reply,
    /// ICMP error: related to the flow it quotes.
    Error,
    /// Fragment without layer 4 header.
    LaterFragment,
}

const _: () = assert!(size_of::<Packet>() == 40 + 2 * 16 + 2 * 2 + 4 + 6 * 4 + 12 + 4);

/// The headers of a packet, as far as a verdict needs them.
#[repr(C)]
pub(crate) struct Packet {
    /// Of its flow, where it has ports.
    pub(crate) key: FlowKey,
    pub(crate) source: Address,
    pub(crate) destination: Address,
    /// Network byte order. For ICMP queries and replies both ports are the identifier.
    pub(crate) source_port: [u8; 2],
    pub(crate) destination_port: [u8; 2],
    pub(crate) protocol: u8,
    pub(crate) kind: Kind,
    /// TCP flags, ICMP type, or type of the first SCTP chunk.
    pub(crate) detail: u8,
    /// 4 or 6.
    pub(crate) version: u8,
    /// Offset of the IP header, from the network header.
    pub(crate) l3: u32,
    /// Offset of the layer 4 header, from the network header.
    pub(crate) l4: u32,
    /// Offset of the end of the packet by its IP header, from the network header.
    pub(crate) end: u32,
    /// TCP: host byte order. SCTP: the verification tag.
    pub(crate) sequence: u32,
    /// TCP: host byte order. SCTP: the tag that INIT and INIT ACK announce, never 0 there.
    pub(crate) acknowledgement: u32,
    /// TCP: length of the header in bytes. SCTP: flags of the first chunk.
    pub(crate) tcp_header: u32,
    /// The first words of the IP header, as they lie there: three of IPv4, two of IPv6.
    pub(crate) head: [u32; 3],
    /// Which end of the key the source is.
    pub(crate) end_of_source: u8,
    /// 1: nothing but an IP header stands before layer 4, and nothing but the Ethernet header before that; no fragment.
    pub(crate) plain: u8,
    /// 1: the first of several fragments.
    pub(crate) first_fragment: u8,
    /// Why the packet is denied if it is in scope; [`Reason::established`]: its headers are in order.
    pub(crate) problem: Reason,
}

impl Packet {
    #[inline(always)]
    pub(crate) fn is_intact(&self) -> bool {
        self.problem as u8 == Reason::established as u8
    }

    #[inline(always)]
    pub(crate) fn set_key(&mut self) {
        self.end_of_source = self.key.set(
            &self.source,
            self.source_port,
            &self.destination,
            self.destination_port,
            self.protocol,
        );
    }

    /// Makes it a packet of which not even the addresses can be read: it is denied at every hook.
    #[inline(always)]
    pub(crate) fn set_unreadable(&mut self) {
        self.source = Address::from_words([0; 4]);
        self.destination = Address::from_words([0; 4]);
        self.source_port = [0; 2];
        self.destination_port = [0; 2];
        self.protocol = 0;
        self.kind = Kind::Plain;
        self.detail = 0;
        self.version = 4;
        self.plain = 0;
        self.first_fragment = 0;
        self.l3 = 0;
        self.problem = Reason::malformed_ip;
    }

    /// See [`Packet::set_unreadable`].
    #[inline(always)]
    pub(crate) fn is_unreadable(&self) -> bool {
        self.problem as u8 == Reason::malformed_ip as u8
            && self.source.halves() == (0, 0)
            && self.version == 4
    }

    /// Whether its own ports name its flow.
    #[inline(always)]
    pub(crate) fn follows_flow(&self) -> bool {
        self.is_intact() && matches!(self.kind, Kind::Plain | Kind::Query | Kind::Reply)
    }

    /// Length of the data of a TCP segment in bytes; 0 where segmentation offload hides it.
    #[inline(always)]
    pub(crate) fn tcp_payload(&self) -> u32 {
        let length = self.end.wrapping_sub(self.l4).wrapping_sub(self.tcp_header);
        if length > 0xffff { 0 } else { length }
    }

    /// Whether it is the SYN that opens a TCP connection.
    #[inline(always)]
    pub(crate) fn opens_tcp(&self) -> bool {
        self.detail & (tcp::SYN | tcp::ACK | tcp::RST | tcp::FIN) == tcp::SYN
    }

    /// Whether it is the chunk that opens an SCTP association (RFC 9260, 3.3.2).
    #[inline(always)]
    pub(crate) fn opens_sctp(&self) -> bool {
        self.detail == sctp::INIT
    }

    /// SCTP: whether its verification tag is its sender's instead of its receiver's.
    #[inline(always)]
    pub(crate) fn reflects_tag(&self) -> bool {
        self.tcp_header & sctp::REFLECTED != 0 && matches!(self.detail, sctp::ABORT | sctp::SHUTDOWN_COMPLETE)
    }
}
