//! Layer 4 behind the IP header: TCP, UDP, SCTP, ICMP and ICMPv6.

use std::net::IpAddr;

use etherparse::{
    IcmpEchoHeader, Icmpv4Header, Icmpv4Type, Icmpv6Header, Icmpv6Type, IpNumber, TcpHeader, UdpHeader,
};

use super::Packet;

/// A TCP segment.
#[derive(Clone, Debug)]
#[must_use]
pub struct Tcp {
    /// Ports, sequence numbers, flags, options; the checksum is computed.
    pub header: TcpHeader,
    /// The data.
    pub payload: Vec<u8>,
}

impl Tcp {
    fn new(source: u16, destination: u16, sequence: u32) -> Self {
        Self { header: TcpHeader::new(source, destination, sequence, 65_535), payload: Vec::new() }
    }

    /// The first segment of a connection; sequence number 1000.
    pub fn syn(source: u16, destination: u16) -> Self {
        let mut tcp = Self::new(source, destination, 1000);
        tcp.header.syn = true;
        tcp
    }

    /// The answer to [`Tcp::syn`]; sequence number 5000.
    pub fn syn_ack(source: u16, destination: u16) -> Self {
        let mut tcp = Self::ack(source, destination, 5000, 1001);
        tcp.header.syn = true;
        tcp
    }

    /// A segment of an established connection.
    pub fn ack(source: u16, destination: u16, sequence: u32, acknowledgment: u32) -> Self {
        let mut tcp = Self::new(source, destination, sequence);
        tcp.header.ack = true;
        tcp.header.acknowledgment_number = acknowledgment;
        tcp
    }

    /// The last segment of one side.
    pub fn fin(source: u16, destination: u16, sequence: u32, acknowledgment: u32) -> Self {
        let mut tcp = Self::ack(source, destination, sequence, acknowledgment);
        tcp.header.fin = true;
        tcp
    }

    /// A reset.
    pub fn rst(source: u16, destination: u16, sequence: u32) -> Self {
        let mut tcp = Self::new(source, destination, sequence);
        tcp.header.rst = true;
        tcp
    }

    /// Data.
    pub fn payload(mut self, payload: &[u8]) -> Self {
        self.payload = payload.to_vec();
        self
    }
}

/// An ICMP or ICMPv6 message, by the family of the packet it goes into.
#[derive(Clone, Debug)]
pub enum Icmp {
    /// Echo request: identifier, sequence number.
    EchoRequest(u16, u16),
    /// Echo reply: identifier, sequence number.
    EchoReply(u16, u16),
    /// Destination unreachable (type 3; type 1 in IPv6) with this code, quoting a packet.
    Unreachable(u8, Vec<u8>),
    /// Fragmentation needed, or packet too big: next-hop MTU in octets, quoting a packet.
    TooBig(u16, Vec<u8>),
    /// Time exceeded in transit (type 11; type 3 in IPv6), quoting a packet.
    TimeExceeded(Vec<u8>),
    /// Type, code, octets 5 to 8, the rest.
    Other(u8, u8, [u8; 4], Vec<u8>),
}

impl Icmp {
    /// Returns the bytes behind the first eight.
    fn body(&self) -> &[u8] {
        match self {
            Self::EchoRequest(..) | Self::EchoReply(..) => &[],
            Self::Unreachable(_, quoted) | Self::TooBig(_, quoted) | Self::TimeExceeded(quoted) => quoted,
            Self::Other(.., rest) => rest,
        }
    }

    fn v4(&self) -> Icmpv4Type {
        let (type_u8, code_u8, bytes5to8) = match *self {
            Self::EchoRequest(id, seq) => return Icmpv4Type::EchoRequest(IcmpEchoHeader { id, seq }),
            Self::EchoReply(id, seq) => return Icmpv4Type::EchoReply(IcmpEchoHeader { id, seq }),
            Self::Unreachable(code, _) => (3, code, [0; 4]),
            Self::TooBig(mtu, _) => (3, 4, u32::from(mtu).to_be_bytes()),
            Self::TimeExceeded(_) => (11, 0, [0; 4]),
            Self::Other(kind, code, bytes, _) => (kind, code, bytes),
        };
        Icmpv4Type::Unknown { type_u8, code_u8, bytes5to8 }
    }

    fn v6(&self) -> Icmpv6Type {
        let (type_u8, code_u8, bytes5to8) = match *self {
            Self::EchoRequest(id, seq) => return Icmpv6Type::EchoRequest(IcmpEchoHeader { id, seq }),
            Self::EchoReply(id, seq) => return Icmpv6Type::EchoReply(IcmpEchoHeader { id, seq }),
            Self::Unreachable(code, _) => (1, code, [0; 4]),
            Self::TooBig(mtu, _) => (2, 0, u32::from(mtu).to_be_bytes()),
            Self::TimeExceeded(_) => (3, 0, [0; 4]),
            Self::Other(kind, code, bytes, _) => (kind, code, bytes),
        };
        Icmpv6Type::Unknown { type_u8, code_u8, bytes5to8 }
    }
}

impl Packet {
    /// A TCP segment.
    pub fn tcp(self, tcp: Tcp) -> Self {
        let Tcp { mut header, payload } = tcp;
        header.checksum = match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                header.calc_checksum_ipv4_raw(source.octets(), destination.octets(), &payload)
            }
            (source, destination) => header.calc_checksum_ipv6_raw(v6(source), v6(destination), &payload),
        }
        .expect("at most 64 KiB");
        self.raw(IpNumber::TCP, &[header.to_bytes().as_slice(), &payload].concat())
    }

    /// A UDP datagram.
    pub fn udp(self, source_port: u16, destination_port: u16, payload: &[u8]) -> Self {
        let length = u16::try_from(UdpHeader::LEN + payload.len()).expect("at most 64 KiB");
        let mut header = UdpHeader { source_port, destination_port, length, checksum: 0 };
        header.checksum = match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                header.calc_checksum_ipv4_raw(source.octets(), destination.octets(), payload)
            }
            (source, destination) => header.calc_checksum_ipv6_raw(v6(source), v6(destination), payload),
        }
        .expect("at most 64 KiB");
        self.raw(IpNumber::UDP, &[&header.to_bytes(), payload].concat())
    }

    /// An SCTP packet (RFC 9260): common header with verification tag, then these chunks as they are.
    pub fn sctp(self, source_port: u16, destination_port: u16, tag: u32, chunks: &[u8]) -> Self {
        let mut packet = Vec::new();
        packet.extend(source_port.to_be_bytes());
        packet.extend(destination_port.to_be_bytes());
        packet.extend(tag.to_be_bytes());
        packet.extend([0; 4]);
        packet.extend(chunks);
        // RFC 9260, appendix A: the remainder goes out least significant octet first.
        let checksum = crc32c(&packet).to_le_bytes();
        packet[8..12].copy_from_slice(&checksum);
        self.raw(IpNumber::SCTP, &packet)
    }

    /// An SCTP packet with an INIT chunk: the first of an association.
    pub fn sctp_init(self, source_port: u16, destination_port: u16) -> Self {
        let mut chunk = vec![1, 0, 0, 20];
        // Initiate tag, receiver window credit, outbound and inbound streams, initial TSN.
        chunk.extend(0x0102_0304_u32.to_be_bytes());
        chunk.extend(65_536_u32.to_be_bytes());
        chunk.extend([0, 1, 0, 1]);
        chunk.extend(1_u32.to_be_bytes());
        self.sctp(source_port, destination_port, 0, &chunk)
    }

    /// An ICMP or ICMPv6 message.
    pub fn icmp(self, message: &Icmp) -> Self {
        let body = message.body();
        match (self.source, self.destination) {
            (IpAddr::V4(_), IpAddr::V4(_)) => {
                let header = Icmpv4Header::with_checksum(message.v4(), body);
                self.raw(IpNumber::ICMP, &[header.to_bytes().as_slice(), body].concat())
            }
            (source, destination) => {
                let header = Icmpv6Header::with_checksum(message.v6(), v6(source), v6(destination), body)
                    .expect("at most 64 KiB");
                self.raw(IpNumber::IPV6_ICMP, &[header.to_bytes().as_slice(), body].concat())
            }
        }
    }
}

/// [`Packet::new`] has seen to it that both addresses are of one family.
fn v6(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V6(address) => address.octets(),
        IpAddr::V4(_) => unreachable!("checked in Packet::new"),
    }
}

/// CRC-32C (Castagnoli), reflected.
fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
    !bytes.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), |crc, _| step(crc)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32c_gives_the_values_of_rfc_3720() {
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        let ascending: Vec<u8> = (0..32).collect();
        assert_eq!(crc32c(&ascending), 0x46dd_794e);
    }
}
