//! Identity of a captured packet: addresses, protocol and the bytes behind the IP headers, which are the same on
//! both sides of the node however the packet was cut up or put together in between.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv6Addr};

use etherparse::IpNumber;

/// One packet, or one datagram that came in fragments.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Identity {
    pub(super) source: IpAddr,
    pub(super) destination: IpAddr,
    pub(super) protocol: u8,
    pub(super) payload: Vec<u8>,
}

/// Parts of a datagram by their offset in octets, and the length of the whole once its end was seen.
#[derive(Default)]
struct Parts {
    parts: BTreeMap<usize, Vec<u8>>,
    whole: Option<usize>,
}

/// Puts fragments together.
#[derive(Default)]
pub(super) struct Assembly(HashMap<(IpAddr, IpAddr, u32), Parts>);

struct Fragment {
    id: u32,
    offset: usize,
    more: bool,
}

impl Assembly {
    /// As [`Assembly::add`], for the payload that an IPv6 raw socket of a protocol returns, without headers.
    pub(super) fn add_v6(
        &mut self,
        source: Ipv6Addr,
        destination: Ipv6Addr,
        protocol: u8,
        rest: &[u8],
    ) -> Option<Identity> {
        let [high, low] = u16::try_from(rest.len()).ok()?.to_be_bytes();
        let header = [0x60, 0, 0, 0, high, low, protocol, 64];
        self.add(&[&header, &source.octets()[..], &destination.octets(), rest].concat())
    }

    /// The identity of an IP packet, or of the datagram that it completes. `None`: not IP, or parts are missing.
    pub(super) fn add(&mut self, ip: &[u8]) -> Option<Identity> {
        let (identity, fragment) = match ip.first()? >> 4 {
            4 => parse_v4(ip)?,
            6 => parse_v6(ip)?,
            _ => return None,
        };
        let Some(Fragment { id, offset, more }) = fragment else { return Some(identity) };
        let key = (identity.source, identity.destination, id);
        let parts = self.0.entry(key).or_default();
        if !more {
            parts.whole = Some(offset + identity.payload.len());
        }
        parts.parts.insert(offset, identity.payload);
        let mut payload = Vec::new();
        for (offset, part) in &parts.parts {
            if *offset != payload.len() {
                return None;
            }
            payload.extend(part);
        }
        if parts.whole != Some(payload.len()) {
            return None;
        }
        self.0.remove(&key);
        Some(Identity { payload, ..identity })
    }
}

fn parse_v4(ip: &[u8]) -> Option<(Identity, Option<Fragment>)> {
    let word = |at: usize| Some(u16::from_be_bytes(ip.get(at..at + 2)?.try_into().ok()?));
    let address = |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(ip.get(at..at + 4)?).ok()?));
    let header = usize::from(ip.first()? & 0xf) * 4;
    let place = word(6)?;
    let fragment =
        Fragment { id: word(4)?.into(), offset: usize::from(place & 0x1fff) * 8, more: place & 0x2000 != 0 };
    let identity = Identity {
        source: address(12)?,
        destination: address(16)?,
        protocol: *ip.get(9)?,
        payload: ip.get(header..usize::from(word(2)?))?.to_vec(),
    };
    let is_fragment = fragment.more || fragment.offset > 0;
    Some((identity, is_fragment.then_some(fragment)))
}

fn parse_v6(ip: &[u8]) -> Option<(Identity, Option<Fragment>)> {
    let address = |at: usize| Some(IpAddr::from(<[u8; 16]>::try_from(ip.get(at..at + 16)?).ok()?));
    let length = usize::from(u16::from_be_bytes(ip.get(4..6)?.try_into().ok()?));
    let ip = ip.get(..40 + length)?;
    let (mut next, mut at, mut fragment) = (*ip.get(6)?, 40, None);
    loop {
        let octets = usize::from(ip.get(at + 1).copied().unwrap_or_default());
        let length = match IpNumber(next) {
            IpNumber::IPV6_FRAGMENTATION_HEADER => {
                let place = u16::from_be_bytes(ip.get(at + 2..at + 4)?.try_into().ok()?);
                let id = u32::from_be_bytes(ip.get(at + 4..at + 8)?.try_into().ok()?);
                fragment = Some(Fragment { id, offset: usize::from(place & !7), more: place & 1 != 0 });
                8
            }
            IpNumber::AUTHENTICATION_HEADER => (octets + 2) * 4,
            IpNumber::IPV6_HEADER_HOP_BY_HOP
            | IpNumber::IPV6_ROUTE_HEADER
            | IpNumber::IPV6_DESTINATION_OPTIONS => (octets + 1) * 8,
            _ => break,
        };
        next = *ip.get(at)?;
        at += length;
        // Behind the header of a later fragment is the middle of something.
        if fragment.as_ref().is_some_and(|fragment| fragment.offset > 0) {
            break;
        }
    }
    let identity = Identity {
        source: address(8)?,
        destination: address(24)?,
        protocol: next,
        payload: ip.get(at..)?.to_vec(),
    };
    Some((identity, fragment))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::parity::Case;

    /// The generator promises that packets differ; also without the fields that a node may change.
    #[test]
    fn every_packet_has_an_identity_of_its_own() {
        for seed in 0..100 {
            let mut seen = HashSet::new();
            for sent in Case::new(seed, 200).sent {
                let mut assembly = Assembly::default();
                let whole: Vec<Identity> =
                    sent.packets.iter().filter_map(|packet| assembly.add(&packet.ip())).collect();
                assert_eq!(whole.len(), 1, "seed {seed}: {sent:?}");
                assert!(seen.insert(whole[0].clone()), "seed {seed}: {sent:?} is there twice");
            }
        }
    }

    #[test]
    fn a_datagram_with_a_part_missing_has_none() {
        let packet = crate::packet::Packet::new([10, 0, 0, 1], [10, 0, 0, 2]).udp(1, 2, &[7; 64]);
        let whole = Assembly::default().add(&packet.ip());
        assert!(whole.is_some());
        let mut fragments = packet.fragments(16, 9);
        let mut assembly = Assembly::default();
        let last = fragments.remove(1).ip();
        assert!(fragments.iter().all(|fragment| assembly.add(&fragment.ip()).is_none()));
        assert_eq!(assembly.add(&last), whole);
    }
}
