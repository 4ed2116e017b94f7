//! The route that the kernel takes for packets to an address, as `ip route get` asks for it.

use std::{io, net::IpAddr};

use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteType, RouteVia},
};

use super::{Route, interface_name};

/// The way of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Way {
    /// The gateway; `None`: the destination is on the link.
    pub via: Option<IpAddr>,
    /// Index of the interface that it leaves by.
    pub interface: u32,
    /// The source address that the kernel gives to packets of this host.
    pub source: Option<IpAddr>,
    /// Whether the destination is an address of this host.
    pub local: bool,
}

impl Way {
    /// Returns the way in the words of `ip route`.
    #[must_use]
    pub fn show(&self) -> String {
        if self.local {
            return "this host".to_owned();
        }
        let via = self.via.map(|via| format!("via {via} ")).unwrap_or_default();
        let name = interface_name(self.interface).unwrap_or_else(|| self.interface.to_string());
        format!("{via}dev {name}")
    }
}

/// The parts of a packet that rules of routing distinguish, beside its destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Packet {
    /// Source and index of the input interface of a packet that this host forwards; `None`: it is of this host.
    pub forwarded: Option<(IpAddr, u32)>,
    /// IP protocol number; 0: not known.
    pub protocol: u8,
    /// 0: not known.
    pub source_port: u16,
    /// 0: not known.
    pub destination_port: u16,
    /// The mark of netfilter.
    pub mark: u32,
}

impl Route {
    /// Asks for the way of a packet to an address.
    ///
    /// # Errors
    /// The kernel's refusal: `ENETUNREACH` without a route, `EHOSTUNREACH` where a route or a missing setting forbids it, `EXDEV`
    /// where `rp_filter` drops the packet, `EINVAL` for a source or destination that cannot be.
    pub fn way(&mut self, to: IpAddr, packet: &Packet) -> io::Result<Way> {
        let Packet { forwarded, protocol, source_port, destination_port, mark } = *packet;
        let mut request = RouteMessage::default();
        let bits = if to.is_ipv4() { 32 } else { 128 };
        request.header.address_family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        request.header.destination_prefix_length = bits;
        request.attributes.push(RouteAttribute::Destination(address(to)));
        if let Some((from, input)) = forwarded {
            request.header.source_prefix_length = bits;
            request.attributes.extend([RouteAttribute::Source(address(from)), RouteAttribute::Iif(input)]);
        }
        // The kernel refuses ports of other protocols.
        if matches!(protocol, bridge_common::protocol::TCP | bridge_common::protocol::UDP) {
            request.attributes.push(RouteAttribute::IpProto(protocol));
            let ports = [RouteAttribute::Sport(source_port), RouteAttribute::Dport(destination_port)];
            let known = ports.into_iter().zip([source_port, destination_port]).filter(|(_, port)| *port != 0);
            request.attributes.extend(known.map(|(attribute, _)| attribute));
        }
        if mark != 0 {
            request.attributes.push(RouteAttribute::Mark(mark));
        }
        let found = self.get(&RouteNetlinkMessage::GetRoute(request))?;
        let route = found.into_iter().find_map(|message| match message {
            RouteNetlinkMessage::NewRoute(route) => Some(route),
            _ => None,
        });
        let route = route.ok_or_else(|| io::Error::from_raw_os_error(libc::ENETUNREACH))?;
        way_of(&route)
    }
}

fn way_of(route: &RouteMessage) -> io::Result<Way> {
    // IPv6 answers with the route that refuses, where IPv4 refuses.
    let local = match route.header.kind {
        RouteType::Unicast => false,
        RouteType::Local | RouteType::Anycast => true,
        RouteType::BlackHole => return Err(io::Error::from_raw_os_error(libc::EINVAL)),
        RouteType::Prohibit => return Err(io::Error::from_raw_os_error(libc::EACCES)),
        _ => return Err(io::Error::from_raw_os_error(libc::EHOSTUNREACH)),
    };
    let mut way = Way { via: None, interface: 0, source: None, local };
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(index) => way.interface = *index,
            RouteAttribute::Gateway(gateway) => way.via = ip(gateway),
            RouteAttribute::Via(RouteVia::Inet6(gateway)) => way.via = Some((*gateway).into()),
            RouteAttribute::Via(RouteVia::Inet(gateway)) => way.via = Some((*gateway).into()),
            RouteAttribute::PrefSource(source) => way.source = ip(source),
            _ => {}
        }
    }
    Ok(way)
}

fn address(address: IpAddr) -> RouteAddress {
    match address {
        IpAddr::V4(v4) => RouteAddress::Inet(v4),
        IpAddr::V6(v6) => RouteAddress::Inet6(v6),
    }
}

const fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some(IpAddr::V4(*v4)),
        RouteAddress::Inet6(v6) => Some(IpAddr::V6(*v6)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_to_the_loopback_is_local() {
        let mut route = Route::open().unwrap();
        for to in ["127.0.0.1", "::1"] {
            let way = route.way(to.parse().unwrap(), &Packet::default()).unwrap();
            assert!(way.local, "{to}: {way:?}");
            assert_eq!(way.show(), "this host");
        }
    }
}
