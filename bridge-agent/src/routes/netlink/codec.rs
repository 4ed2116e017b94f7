//! rtnetlink messages (`linux/rtnetlink.h`, `linux/neighbour.h`) from and to the types of [`super::super::model`].
//!
//! Only the attributes that matter are read: a kernel that sends a newer attribute must not make a dump fail.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use netlink_packet_core::Emitable;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteNextHop, RouteScope, RouteType, RouteVia,
};

use crate::kernel::netlink::{attribute, attributes, encode_attribute};
use crate::routes::health::Ask;
use crate::routes::model::Hop;
use crate::routes::model::{Address, KernelHop, KernelRoute, Link, RouteKey, RouteKind};

/// `sa_family_t`, of one byte in every rtnetlink header.
pub(super) const AF_INET: u8 = 2;
pub(super) const AF_INET6: u8 = 10;

const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_PREFSRC: u16 = 7;
const RTA_METRICS: u16 = 8;
const RTA_MULTIPATH: u16 = 9;
const RTA_CACHEINFO: u16 = 12;
const RTA_TABLE: u16 = 15;
const RTA_VIA: u16 = 18;
const RTA_PREF: u16 = 20;
const RTA_ENCAP: u16 = 22;
const RTA_NH_ID: u16 = 30;
const IFLA_IFNAME: u16 = 3;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const NDA_DST: u16 = 1;
const RTM_F_CLONED: u32 = 0x200;
const RTNH_F_ONLINK: u32 = 4;
/// `struct rtnexthop`.
const RTNH_LEN: usize = 8;
/// `NUD_PROBE`: unicast solicitations are sent, and the entry fails if none is answered.
const NUD_PROBE: u16 = 0x10;
/// `NTF_USE`: as if a packet were waiting for the neighbour.
const NTF_USE: u8 = 1;

fn u32_of(value: &[u8]) -> Option<u32> {
    value.get(..4)?.try_into().ok().map(u32::from_ne_bytes)
}

fn address_of(value: &[u8]) -> Option<IpAddr> {
    match value.len() {
        4 => <[u8; 4]>::try_from(value).ok().map(|bytes| Ipv4Addr::from(bytes).into()),
        16 => <[u8; 16]>::try_from(value).ok().map(|bytes| Ipv6Addr::from(bytes).into()),
        _ => None,
    }
}

/// The body of `RTM_NEWROUTE` or `RTM_DELROUTE`. `None`: not an IP route, or one of the kernel's own caches.
pub(super) fn decode_route(body: &[u8]) -> Option<KernelRoute> {
    let header = RouteHeader::parse(body).ok()?;
    let unspecified: IpAddr = match header.address_family {
        AddressFamily::Inet => Ipv4Addr::UNSPECIFIED.into(),
        AddressFamily::Inet6 => Ipv6Addr::UNSPECIFIED.into(),
        _ => return None,
    };
    if header.flags.bits() & RTM_F_CLONED != 0 {
        return None;
    }
    let (mut destination, mut table, mut metric) = (unspecified, u32::from(header.table), 0);
    let (mut via, mut ifindex, mut hops) = (None, 0, Vec::new());
    let mut altered = header.flags.bits() & RTNH_F_ONLINK != 0 || header.source_prefix_length != 0;
    for (kind, value) in attributes(&body[header.buffer_len()..]) {
        match kind {
            RTA_DST => destination = address_of(value).unwrap_or(unspecified),
            RTA_OIF => ifindex = u32_of(value).unwrap_or(0),
            RTA_GATEWAY => via = address_of(value),
            RTA_VIA => via = value.get(2..).and_then(address_of),
            RTA_PRIORITY => metric = u32_of(value).unwrap_or(0),
            RTA_TABLE => table = u32_of(value).unwrap_or(table),
            RTA_MULTIPATH => hops = decode_multipath(value),
            RTA_PREFSRC | RTA_METRICS | RTA_ENCAP | RTA_NH_ID => altered = true,
            RTA_PREF => altered |= value.first().is_some_and(|preference| *preference != 0),
            // struct rta_cacheinfo: the third word is how long the route still lives.
            RTA_CACHEINFO => altered |= value.get(8..).and_then(u32_of).is_some_and(|expires| expires != 0),
            _ => {}
        }
    }
    let kind = RouteKind::from(u8::from(header.kind));
    match kind {
        // IPv6 names the loopback interface in routes that do not forward.
        RouteKind::Blackhole | RouteKind::Other(_) => hops.clear(),
        _ if hops.is_empty() && (via.is_some() || ifindex != 0) => {
            hops.push(KernelHop { via, ifindex, weight: 1 })
        }
        _ => {}
    }
    hops.sort_unstable();
    let to = IpNet::new(destination, header.destination_prefix_length).ok()?;
    let key = RouteKey { table, to, tos: header.tos, metric };
    Some(KernelRoute { key, protocol: header.protocol.into(), kind, hops, altered })
}

fn decode_multipath(mut value: &[u8]) -> Vec<KernelHop> {
    let mut hops = Vec::new();
    while let Some((header, _)) = value.split_first_chunk::<RTNH_LEN>() {
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let Some(body) = value.get(RTNH_LEN..length) else { break };
        let ifindex = u32::from_ne_bytes([header[4], header[5], header[6], header[7]]);
        let mut hop = KernelHop { via: None, ifindex, weight: u16::from(header[3]) + 1 };
        for (kind, value) in attributes(body) {
            match kind {
                RTA_GATEWAY => hop.via = address_of(value),
                RTA_VIA => hop.via = value.get(2..).and_then(address_of),
                _ => {}
            }
        }
        hops.push(hop);
        value = value.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    hops
}

/// The body of `RTM_NEWLINK` or `RTM_DELLINK`: interface index and interface.
pub(super) fn decode_link(body: &[u8]) -> Option<(u32, Link)> {
    // struct ifinfomsg: family, pad, type, index, flags, change.
    let (ifindex, flags) = (u32_of(body.get(4..)?)?, u32_of(body.get(8..)?)?);
    let mut name = String::new();
    if let Some(value) = attribute(body.get(16..)?, IFLA_IFNAME) {
        name = String::from_utf8_lossy(value).trim_end_matches('\0').to_owned();
    }
    let up = flags & libc::IFF_UP as u32 != 0;
    Some((ifindex, Link { name, up }))
}

/// The body of `RTM_NEWADDR`.
pub(super) fn decode_address(body: &[u8]) -> Option<Address> {
    // struct ifaddrmsg: family, prefix length, flags, scope, index.
    let (prefix_len, ifindex) = (*body.get(1)?, u32_of(body.get(4..)?)?);
    let (mut local, mut address) = (None, None);
    for (kind, value) in attributes(body.get(8..)?) {
        match kind {
            IFA_LOCAL => local = address_of(value),
            IFA_ADDRESS => address = address_of(value),
            _ => {}
        }
    }
    // On a point-to-point link IFA_ADDRESS is the peer's; IPv6 has no IFA_LOCAL otherwise.
    let net = IpNet::new(local.or(address)?, prefix_len).ok()?;
    Some(Address { ifindex, net })
}

/// The body of `RTM_NEWNEIGH` or `RTM_DELNEIGH`: the neighbour and its `NUD_*` state.
pub(super) fn decode_neighbour(body: &[u8]) -> Option<(Hop, u16)> {
    // struct ndmsg: family, pad, pad, ifindex, state, flags, type.
    let (ifindex, state) = (u32_of(body.get(4..)?)?, u16::from_ne_bytes(body.get(8..10)?.try_into().ok()?));
    let address = attribute(body.get(12..)?, NDA_DST).and_then(address_of)?;
    Some(((address, ifindex), state))
}

/// The body of `RTM_NEWNEIGH` that makes the kernel ask whether `address` is still there.
pub(super) fn encode_neighbour(address: IpAddr, ifindex: u32, ask: Ask) -> Vec<u8> {
    let mut body = vec![0; 12];
    body[4..8].copy_from_slice(&ifindex.to_ne_bytes());
    match ask {
        Ask::Resolve => body[10] = NTF_USE,
        Ask::Verify => body[8..10].copy_from_slice(&NUD_PROBE.to_ne_bytes()),
    }
    let (family, octets) = match address {
        IpAddr::V4(address) => (AF_INET, address.octets().to_vec()),
        IpAddr::V6(address) => (AF_INET6, address.octets().to_vec()),
    };
    body[0] = family;
    body.extend(encode_attribute(NDA_DST, &octets));
    body
}

/// The body of `RTM_NEWROUTE` or `RTM_DELROUTE` for exactly `route`.
pub(super) fn encode_route(route: &KernelRoute, delete: bool) -> Vec<u8> {
    let mut message = RouteMessage::default();
    message.header = RouteHeader {
        address_family: match route.key.to {
            IpNet::V4(_) => AddressFamily::Inet,
            IpNet::V6(_) => AddressFamily::Inet6,
        },
        destination_prefix_length: route.key.to.prefix_len(),
        tos: route.key.tos,
        table: u8::try_from(route.key.table).unwrap_or(RouteHeader::RT_TABLE_UNSPEC),
        protocol: route.protocol.into(),
        // A delete matches any scope; what goes through a router, or nowhere, has universe scope.
        scope: if delete { RouteScope::NoWhere } else { RouteScope::Universe },
        kind: RouteType::from(u8::from(route.kind)),
        ..RouteHeader::default()
    };
    message.attributes = vec![
        RouteAttribute::Destination(route.key.to.addr().into()),
        RouteAttribute::Table(route.key.table),
        RouteAttribute::Priority(route.key.metric),
    ];
    match route.hops.as_slice() {
        // IPv6 deletes all next hops of the key unless one is named, and only some of them if some are.
        _ if delete && matches!(route.key.to, IpNet::V6(_)) => {}
        [] => {}
        [hop] => {
            message.attributes.extend(hop.via.map(|via| gateway(route.key.to, via)));
            message.attributes.push(RouteAttribute::Oif(hop.ifindex));
        }
        hops => {
            let hops = hops.iter().map(|hop| {
                let mut encoded = RouteNextHop::default();
                encoded.interface_index = hop.ifindex;
                encoded.hops = u8::try_from(hop.weight.saturating_sub(1)).unwrap_or(u8::MAX);
                encoded.attributes = hop.via.map(|via| gateway(route.key.to, via)).into_iter().collect();
                encoded
            });
            message.attributes.push(RouteAttribute::MultiPath(hops.collect()));
        }
    }
    let mut body = vec![0; message.buffer_len()];
    message.emit(&mut body);
    body
}

fn gateway(to: IpNet, via: IpAddr) -> RouteAttribute {
    match (to, via) {
        (IpNet::V4(_), IpAddr::V6(via)) => RouteAttribute::Via(RouteVia::from(via)),
        (_, via) => RouteAttribute::Gateway(RouteAddress::from(via)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::routes::model::PROTOCOL;

    fn route() -> impl Strategy<Value = KernelRoute> {
        let hop4 = (any::<u32>(), 1u32..9, 1u16..=256).prop_map(|(via, ifindex, weight)| KernelHop {
            via: Some(Ipv4Addr::from(via).into()),
            ifindex,
            weight,
        });
        let hop6 = (any::<u128>(), 1u32..9, 1u16..=256).prop_map(|(via, ifindex, weight)| KernelHop {
            via: Some(Ipv6Addr::from(via).into()),
            ifindex,
            weight,
        });
        let v4 = (any::<u32>(), 1u8..=32, prop::collection::vec(prop_oneof![hop4, hop6.clone()], 0..4))
            .prop_map(|(to, len, hops)| (IpNet::new_assert(Ipv4Addr::from(to).into(), len).trunc(), hops));
        let v6 = (any::<u128>(), 1u8..=128, prop::collection::vec(hop6, 0..4))
            .prop_map(|(to, len, hops)| (IpNet::new_assert(Ipv6Addr::from(to).into(), len).trunc(), hops));
        (prop_oneof![v4, v6], 1u32.., any::<u32>()).prop_map(|((to, mut hops), table, metric)| {
            if let [only] = hops.as_mut_slice() {
                only.weight = 1;
            }
            hops.sort_unstable();
            let kind = if hops.is_empty() { RouteKind::Blackhole } else { RouteKind::Unicast };
            let key = RouteKey { table, to, tos: 0, metric };
            KernelRoute { key, protocol: PROTOCOL, kind, hops, altered: false }
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_what_is_read(route in route()) {
            prop_assert_eq!(decode_route(&encode_route(&route, false)), Some(route));
        }

        #[test]
        fn no_bytes_make_a_decoder_panic(body in prop::collection::vec(any::<u8>(), 0..200)) {
            _ = decode_route(&body);
            _ = decode_link(&body);
            _ = decode_address(&body);
            _ = decode_neighbour(&body);
            _ = decode_multipath(&body);
        }
    }
}
