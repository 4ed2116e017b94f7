//! Packets made by hand, with every length and checksum right by default; for injection into an
//! interface and for BPF_PROG_TEST_RUN.
//!
//! ```
//! use bridge_lab::packet::{Packet, Tcp};
//! use std::net::Ipv4Addr;
//! let (a, c1) = (Ipv4Addr::new(192, 168, 31, 67), Ipv4Addr::new(10, 200, 1, 91));
//! let frame = Packet::new(a, c1).vlan(31).tcp(Tcp::syn(50000, 40002)).frame();
//! assert_eq!(frame.len(), 14 + 4 + 20 + 20);
//! ```

mod fragment;
mod transport;

use std::net::IpAddr;

use etherparse::{
    EtherType, Ethernet2Header, IpFragOffset, IpNumber, Ipv4Header, Ipv4Options, Ipv6FlowLabel, Ipv6Header,
    SingleVlanHeader, VlanId,
};

pub use self::transport::{Icmp, Tcp};
use crate::lab::Host;

/// A packet in the making.
#[derive(Clone, Debug)]
#[must_use]
pub struct Packet {
    source: IpAddr,
    destination: IpAddr,
    macs: ([u8; 6], [u8; 6]),
    tags: Vec<(EtherType, u16)>,
    hop_limit: u8,
    options: Vec<u8>,
    extensions: Vec<Extension>,
    fragment: Option<Fragment>,
    protocol: IpNumber,
    payload: Vec<u8>,
}

/// An IPv6 extension header (RFC 8200, section 4). Its first octet is overwritten with the next header.
#[derive(Clone, Debug)]
struct Extension {
    number: IpNumber,
    bytes: Vec<u8>,
}

/// Where a fragment belongs.
#[derive(Clone, Copy, Debug)]
struct Fragment {
    /// In units of 8 octets, 13 bits.
    offset: u16,
    more: bool,
    id: u32,
}

impl Packet {
    /// From one address to another: no payload, hop limit 64, MAC addresses zero.
    ///
    /// # Panics
    /// One address is IPv4 and the other IPv6.
    pub fn new(source: impl Into<IpAddr>, destination: impl Into<IpAddr>) -> Self {
        let (source, destination) = (source.into(), destination.into());
        assert_eq!(source.is_ipv4(), destination.is_ipv4(), "{source} and {destination}: one family");
        Self {
            source,
            destination,
            macs: ([0; 6], [0; 6]),
            tags: Vec::new(),
            hop_limit: 64,
            options: Vec::new(),
            extensions: Vec::new(),
            fragment: None,
            protocol: if source.is_ipv4() { IpNumber::ICMP } else { IpNumber::IPV6_NO_NEXT_HEADER },
            payload: Vec::new(),
        }
    }

    /// Source and destination address.
    #[must_use]
    pub fn addresses(&self) -> (IpAddr, IpAddr) {
        (self.source, self.destination)
    }

    /// Source and destination MAC address.
    pub fn macs(mut self, source: [u8; 6], destination: [u8; 6]) -> Self {
        self.macs = (source, destination);
        self
    }

    /// MAC addresses of a frame from one station of the LAN to another.
    pub fn between(self, source: &Host, destination: &Host) -> Self {
        self.macs(source.mac, destination.mac)
    }

    /// Adds an IEEE 802.1Q tag, inside of those there are. Id 0 to 4095.
    pub fn vlan(self, id: u16) -> Self {
        self.tag(EtherType::VLAN_TAGGED_FRAME, id)
    }

    /// Adds an IEEE 802.1ad service tag, inside of those there are: `.service_vlan(1).vlan(2)` is QinQ.
    pub fn service_vlan(self, id: u16) -> Self {
        self.tag(EtherType::PROVIDER_BRIDGING, id)
    }

    fn tag(mut self, protocol: EtherType, id: u16) -> Self {
        self.tags.push((protocol, id));
        self
    }

    /// TTL or hop limit.
    pub fn hop_limit(mut self, hops: u8) -> Self {
        self.hop_limit = hops;
        self
    }

    /// IPv4 options, padded with end-of-list to a multiple of 4 octets; at most 40.
    pub fn options(mut self, options: &[u8]) -> Self {
        self.options = options.to_vec();
        self.options.resize(options.len().next_multiple_of(4), 0);
        self
    }

    /// Adds IPv6 hop-by-hop options (RFC 8200, section 4.3), `units * 8 + 8` octets long.
    ///
    /// # Panics
    /// `units` above 31.
    pub fn hop_by_hop(self, units: u8) -> Self {
        self.raw_extension(IpNumber::IPV6_HEADER_HOP_BY_HOP, skipped_option(units))
    }

    /// Adds IPv6 destination options (RFC 8200, section 4.6), `units * 8 + 8` octets long.
    ///
    /// # Panics
    /// `units` above 31.
    pub fn destination_options(self, units: u8) -> Self {
        self.raw_extension(IpNumber::IPV6_DESTINATION_OPTIONS, skipped_option(units))
    }

    /// Adds an IPv6 routing header of type 0 that has no segment left to go to: receivers skip it.
    pub fn routing(self) -> Self {
        self.raw_extension(IpNumber::IPV6_ROUTE_HEADER, vec![0; 8])
    }

    /// Adds an IPv6 extension header of these very octets, but for the first, which is the next header.
    ///
    /// # Panics
    /// It is empty.
    pub fn raw_extension(mut self, number: IpNumber, bytes: Vec<u8>) -> Self {
        assert!(!bytes.is_empty(), "an extension header has a next header field");
        self.extensions.push(Extension { number, bytes });
        self
    }

    /// Adds an authentication header (RFC 4302) with a 12 octet integrity check value of zeroes.
    pub fn authentication(self) -> Self {
        let mut bytes = vec![0; 24];
        bytes[1] = 4;
        self.raw_extension(IpNumber::AUTHENTICATION_HEADER, bytes)
    }

    /// Says that the payload is a fragment. `offset` in units of 8 octets, 0 to 8191; of `id`, IPv4 has the
    /// lower 16 bits. In IPv6 the fragment header comes behind the extension headers added.
    pub fn fragment(mut self, offset: u16, more: bool, id: u32) -> Self {
        self.fragment = Some(Fragment { offset, more, id });
        self
    }

    /// Any payload under any protocol number.
    pub fn raw(mut self, protocol: IpNumber, payload: &[u8]) -> Self {
        self.protocol = protocol;
        self.payload = payload.to_vec();
        self
    }

    /// The IP packet.
    ///
    /// # Panics
    /// Something does not fit: options above 40 octets, a packet above 64 KiB.
    pub fn ip(&self) -> Vec<u8> {
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => self.ipv4(source.octets(), destination.octets()),
            (IpAddr::V6(source), IpAddr::V6(destination)) => self.ipv6(source.octets(), destination.octets()),
            _ => unreachable!("checked in new()"),
        }
    }

    fn ipv4(&self, source: [u8; 4], destination: [u8; 4]) -> Vec<u8> {
        let mut protocol = self.protocol;
        let mut payload = self.payload.clone();
        for extension in self.extensions.iter().rev() {
            payload.splice(0..0, extension.in_front_of(protocol));
            protocol = extension.number;
        }
        let fragment = self.fragment.unwrap_or(Fragment { offset: 0, more: false, id: 1 });
        let mut header = Ipv4Header {
            identification: u16::try_from(fragment.id & 0xffff).expect("16 bits"),
            dont_fragment: self.fragment.is_none(),
            more_fragments: fragment.more,
            fragment_offset: IpFragOffset::try_new(fragment.offset).expect("13 bits"),
            options: Ipv4Options::try_from(self.options.as_slice()).expect("at most 40 octets of options"),
            ..Ipv4Header::new(0, self.hop_limit, protocol, source, destination).expect("an empty payload")
        };
        header.set_payload_len(payload.len()).expect("at most 64 KiB");
        header.header_checksum = header.calc_header_checksum();
        [header.to_bytes().as_slice(), &payload].concat()
    }

    fn ipv6(&self, source: [u8; 16], destination: [u8; 16]) -> Vec<u8> {
        let mut next = self.protocol;
        let mut payload = self.payload.clone();
        let fragment = self.fragment.map(|fragment| fragment.header());
        for extension in self.extensions.iter().chain(&fragment).rev() {
            payload.splice(0..0, extension.in_front_of(next));
            next = extension.number;
        }
        let header = Ipv6Header {
            traffic_class: 0,
            flow_label: Ipv6FlowLabel::ZERO,
            payload_length: u16::try_from(payload.len()).expect("at most 64 KiB"),
            next_header: next,
            hop_limit: self.hop_limit,
            source,
            destination,
        };
        [header.to_bytes().as_slice(), &payload].concat()
    }

    /// The Ethernet frame, without frame check sequence and padding.
    ///
    /// # Panics
    /// As [`Packet::ip`].
    pub fn frame(&self) -> Vec<u8> {
        let ip = if self.source.is_ipv4() { EtherType::IPV4 } else { EtherType::IPV6 };
        let mut types = self.tags.iter().map(|(protocol, _)| *protocol).chain([ip]);
        let ether_type = types.next().unwrap_or(ip);
        let (source, destination) = self.macs;
        let mut frame = Ethernet2Header { source, destination, ether_type }.to_bytes().to_vec();
        for ((_, id), ether_type) in self.tags.iter().zip(types) {
            let vlan_id = VlanId::try_new(*id).expect("12 bits");
            frame.extend(SingleVlanHeader { vlan_id, ether_type, ..Default::default() }.to_bytes());
        }
        frame.extend(self.ip());
        frame
    }
}

/// One option that takes all the room and that unaware receivers skip (0x1e, RFC 4727). Linux refuses
/// more than 7 octets of mere padding.
fn skipped_option(units: u8) -> Vec<u8> {
    let length = units * 8 + 4;
    let mut bytes = vec![0, units, 0x1e, length];
    bytes.resize(usize::from(length) + 4, 0);
    bytes
}

impl Extension {
    fn in_front_of(&self, next: IpNumber) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        bytes[0] = next.0;
        bytes
    }
}

impl Fragment {
    fn header(self) -> Extension {
        let offset = IpFragOffset::try_new(self.offset).expect("13 bits").value() << 3;
        let mut bytes = vec![0; 2];
        bytes.extend((offset | u16::from(self.more)).to_be_bytes());
        bytes.extend(self.id.to_be_bytes());
        Extension { number: IpNumber::IPV6_FRAGMENTATION_HEADER, bytes }
    }
}
