//! Reads a frame, octet by octet.
//!
//! Lengths are those of the IP headers; where the frame ends sooner, it is layer 4 that is missing. (The node's
//! stack discards such a frame.)

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::Range,
};

use super::flow::{Chunk, Segment};

/// TCP flags that make a difference.
pub(super) const FIN: u8 = 0x01;
pub(super) const SYN: u8 = 0x02;
pub(super) const RST: u8 = 0x04;
pub(super) const ACK: u8 = 0x10;
const URG: u8 = 0x20;

/// IP protocol numbers.
pub(super) const ICMP: u8 = 1;
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;
pub(super) const ICMPV6: u8 = 58;
pub(super) const SCTP: u8 = 132;

/// Types of SCTP chunks.
pub(super) const INIT: u8 = 1;
pub(super) const INIT_ACK: u8 = 2;
const ABORT: u8 = 6;
pub(super) const COOKIE_ECHO: u8 = 10;
const SHUTDOWN_COMPLETE: u8 = 14;

/// How many extension headers of IPv6 are followed, the fragment header among them.
const MOST_EXTENSIONS: usize = 7;

/// VLAN tags that are followed.
const MAX_TAGS: u32 = 8;

/// A packet of which not even the addresses can be read.
const UNREADABLE: Header = Header {
    source: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
    destination: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
    protocol: 0,
    ports: None,
    content: Content::Unreadable,
    plain: false,
    first_fragment: false,
};

/// An IP packet.
#[derive(Clone, Debug)]
pub(super) struct Header {
    pub(super) source: IpAddr,
    pub(super) destination: IpAddr,
    /// Protocol behind the extension headers; 0 as long as these could not be followed.
    pub(super) protocol: u8,
    /// Where the ports would be, if these four octets are there: also of a header that is cut off behind them.
    pub(super) ports: Option<(u16, u16)>,
    pub(super) content: Content,
    /// Nothing stands between the addresses and layer 4: no option, extension header or VLAN tag.
    pub(super) plain: bool,
    /// The first of several fragments.
    pub(super) first_fragment: bool,
}

/// The payload of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Content {
    Tcp(Segment),
    Udp,
    Sctp(Chunk),
    Icmp {
        kind: IcmpKind,
        identifier: u16,
        quoted: Vec<u8>,
    },
    Other,
    LaterFragment,
    OverlappingFragment,
    ShortFragment,
    MalformedIp,
    MalformedL4,
    /// More VLAN tags than are followed, and no address.
    Unreadable,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum IcmpKind {
    Query,
    Reply,
    Error,
    /// Never believed.
    Redirect,
    Unknown,
}

/// An Ethernet frame with its VLAN tags. `None`: it is not IP, or too short for IP addresses.
pub(super) fn frame(frame: &[u8]) -> Option<Header> {
    let mut rest = frame.get(12..)?;
    let mut tags = 0;
    while matches!(word(rest, 0)?, 0x8100 | 0x88a8) {
        if tags == MAX_TAGS {
            return Some(UNREADABLE);
        }
        rest = rest.get(4..)?;
        tags += 1;
    }
    let (kind, packet) = (word(rest, 0)?, rest.get(2..)?);
    let mut header = match kind {
        0x0800 => ipv4(packet, false)?,
        0x86dd => ipv6(packet, false)?,
        _ => return None,
    };
    header.plain &= tags == 0;
    Some(header)
}

/// The packet that an ICMP error of this family quotes: cut off where the error ends.
pub(super) fn quoted(packet: &[u8], v4: bool) -> Option<Header> {
    if v4 { ipv4(packet, true) } else { ipv6(packet, true) }
}

fn ipv4(packet: &[u8], quoted: bool) -> Option<Header> {
    let fixed = packet.get(..20)?;
    if fixed[0] >> 4 != 4 {
        return None;
    }
    let address =
        |at: usize| IpAddr::from(Ipv4Addr::from(<[u8; 4]>::try_from(&fixed[at..at + 4]).expect("4")));
    let mut header = Header {
        source: address(12),
        destination: address(16),
        protocol: 0,
        ports: None,
        content: Content::MalformedIp,
        plain: fixed[0] == 0x45,
        first_fragment: false,
    };
    let length = usize::from(fixed[0] & 15) * 4;
    let end = match word(fixed, 2)? {
        // Longer than can be said (BIG TCP).
        0 => usize::MAX,
        total => usize::from(total),
    };
    if length < 20 || end < length {
        return Some(header);
    }
    header.protocol = fixed[9];
    let place = word(fixed, 6)?;
    let (offset, more) = (place & 0x1fff, place & 0x2000 != 0);
    header.carry(packet, length..end, true, (offset, more), quoted);
    Some(header)
}

fn ipv6(packet: &[u8], quoted: bool) -> Option<Header> {
    let fixed = packet.get(..40)?;
    if fixed[0] >> 4 != 6 {
        return None;
    }
    let address =
        |at: usize| IpAddr::from(Ipv6Addr::from(<[u8; 16]>::try_from(&fixed[at..at + 16]).expect("16")));
    let mut header = Header {
        source: address(8),
        destination: address(24),
        protocol: 0,
        ports: None,
        content: Content::MalformedIp,
        plain: true,
        first_fragment: false,
    };
    let end = match word(fixed, 4)? {
        // Longer than can be said (BIG TCP, RFC 2675).
        0 => usize::MAX,
        payload => 40 + usize::from(payload),
    };
    let (mut next, mut at) = (fixed[6], 40);
    let (mut offset, mut more) = (0, false);
    for _ in 0..=MOST_EXTENSIONS {
        let units = |unit: usize| packet.get(at + 1).map(|units| usize::from(*units) * unit + 8);
        let length = match next {
            // Hop-by-hop options, routing, destination options (RFC 8200, section 4).
            0 | 43 | 60 => units(8),
            // Authentication (RFC 4302).
            51 => units(4),
            44 => Some(8),
            // No next header: such a packet has no meaning.
            59 => break,
            _ => {
                header.protocol = next;
                header.carry(packet, at..end, false, (offset, more), quoted);
                return Some(header);
            }
        };
        header.plain = false;
        let Some((length, extension)) = length.zip(packet.get(at..at + 8)) else { break };
        // A routing header with segments left: the packet does not go where its header says.
        if next == 43 && extension[3] > 0 {
            break;
        }
        let is_fragment = next == 44;
        (next, at) = (extension[0], at + length);
        if is_fragment {
            let place = word(extension, 2)?;
            (offset, more) = (place >> 3, place & 1 != 0);
            if offset > 0 {
                header.protocol = next;
                header.carry(packet, at..end, false, (offset, more), quoted);
                return Some(header);
            }
        }
        if at > end {
            break;
        }
    }
    // RFC 7112: the first fragment holds every header.
    if more {
        header.content = Content::ShortFragment;
    }
    Some(header)
}

impl Header {
    /// Reads layer 4 at `place`, the offset by the IP header.
    fn carry(
        &mut self,
        packet: &[u8],
        place: Range<usize>,
        v4: bool,
        (offset, more): (u16, bool),
        quoted: bool,
    ) {
        self.content = match offset {
            0 => Content::MalformedL4,
            1 => Content::OverlappingFragment,
            _ => Content::LaterFragment,
        };
        if offset > 0 {
            return;
        }
        self.first_fragment = more;
        let there = packet.get(place.start..).unwrap_or_default();
        if matches!(self.protocol, TCP | UDP | SCTP) {
            // Even where the IP header says that the packet ends before them: it is denied whatever they are.
            self.ports = word(there, 0).zip(word(there, 2));
        }
        let content = if quoted {
            self.quoted_content(there, v4)
        } else {
            self.whole_content(there, place.end - place.start, v4)
        };
        self.content = match content {
            Ok(content) => content,
            Err(Unreadable) if more => Content::ShortFragment,
            Err(Unreadable) => Content::MalformedL4,
        };
    }

    /// Of a packet that has `length` octets from layer 4 on, of which these `there` are in the frame.
    fn whole_content(&self, there: &[u8], length: usize, v4: bool) -> Result<Content, Unreadable> {
        let need = |octets: usize| there.get(..octets).filter(|_| octets <= length).ok_or(Unreadable);
        Ok(match (self.protocol, v4) {
            (TCP, _) => {
                let fixed = need(20)?;
                let header = usize::from(fixed[12] >> 4) * 4;
                if header < 20 || header > length {
                    return Err(Unreadable);
                }
                let payload = u16::try_from(length - header).ok().map(u32::from);
                let (sequence, acknowledgement) = (long(fixed, 4), long(fixed, 8));
                Content::Tcp(Segment { flags: fixed[13], sequence, acknowledgement, payload })
            }
            (UDP, _) => {
                need(8)?;
                Content::Udp
            }
            (SCTP, _) => Content::Sctp(chunk(need)?),
            (ICMP, true) | (ICMPV6, false) => {
                let fixed = need(8)?;
                Content::Icmp {
                    kind: icmp_kind(fixed[0], v4),
                    identifier: word(fixed, 4).ok_or(Unreadable)?,
                    quoted: there[8..there.len().min(length)].to_vec(),
                }
            }
            _ => Content::Other,
        })
    }

    /// Of a quoted packet only eight octets of layer 4 need to be there (RFC 792).
    fn quoted_content(&self, bytes: &[u8], v4: bool) -> Result<Content, Unreadable> {
        let fixed = bytes.get(..8).ok_or(Unreadable)?;
        Ok(match (self.protocol, v4) {
            (ICMP, true) | (ICMPV6, false) => Content::Icmp {
                kind: icmp_kind(fixed[0], v4),
                identifier: word(fixed, 4).ok_or(Unreadable)?,
                quoted: Vec::new(),
            },
            (UDP, _) => Content::Udp,
            _ => Content::Other,
        })
    }
}

/// Reads the common header of SCTP and the first chunk, as far as verification tags go.
fn chunk<'a>(need: impl Fn(usize) -> Result<&'a [u8], Unreadable>) -> Result<Chunk, Unreadable> {
    let fixed = need(16)?;
    let (kind, tag) = (fixed[12], long(fixed, 4));
    let announced = match kind {
        INIT | INIT_ACK => Some(long(need(32)?, 16)),
        _ => None,
    };
    if announced == Some(0) || (kind == INIT && tag != 0) {
        return Err(Unreadable);
    }
    let reflected = matches!(kind, ABORT | SHUTDOWN_COMPLETE) && fixed[13] & 1 == 1;
    Ok(Chunk { kind, tag, reflected, announced })
}

/// A header is longer than the data, or shorter than it can be.
struct Unreadable;

/// RFC 792, RFC 950; RFC 4443.
fn icmp_kind(number: u8, v4: bool) -> IcmpKind {
    match (number, v4) {
        (8 | 13 | 15 | 17, true) | (128, false) => IcmpKind::Query,
        (0 | 14 | 16 | 18, true) | (129, false) => IcmpKind::Reply,
        (5, true) => IcmpKind::Redirect,
        (3 | 4 | 11 | 12, true) | (1..=4, false) => IcmpKind::Error,
        _ => IcmpKind::Unknown,
    }
}

/// Whether some sender sets these flags together; PSH, ECE and CWR may stand beside anything.
pub(super) fn flags_make_sense(flags: u8) -> bool {
    const KNOWN: [u8; 9] =
        [SYN, SYN | URG, SYN | ACK, RST, RST | ACK, FIN | ACK, FIN | ACK | URG, ACK, ACK | URG];
    KNOWN.contains(&(flags & (FIN | SYN | RST | ACK | URG)))
}

/// 16 bits in network byte order.
fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

/// 32 bits in network byte order, which must be there.
fn long(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}
