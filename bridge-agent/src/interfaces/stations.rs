//! Hosts at ports of bridges: the neighbour table says which link layer address a host has, the forwarding table which
//! port leads to it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::IpAddr,
};

use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
};

use super::{Device, Link};

/// A link layer address.
type Mac = Vec<u8>;

/// Entries of both tables.
#[derive(Clone, Debug, Default)]
pub(super) struct Tables {
    /// Bridge, host, link layer address.
    neighbours: Vec<(u32, IpAddr, Mac)>,
    /// Port, by bridge and link layer address.
    ports: HashMap<(u32, Mac), u32>,
}

/// An entry of one of the tables.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Entry {
    Neighbour { interface: u32, host: IpAddr, mac: Mac },
    Port { bridge: u32, mac: Mac, port: u32 },
}

impl Entry {
    fn bridge(&self) -> u32 {
        match self {
            Self::Neighbour { interface, .. } => *interface,
            Self::Port { bridge, .. } => *bridge,
        }
    }
}

/// Whether the tables can say anything: there is a bridge with ports.
pub(super) fn are_needed(links: &BTreeMap<u32, Link>) -> bool {
    links.values().any(|link| links.get(&link.upper).is_some_and(|upper| upper.device == Device::Bridge))
}

/// Returns the requests that dump both tables.
pub(super) fn requests() -> [RouteNetlinkMessage; 3] {
    [AddressFamily::Inet, AddressFamily::Inet6, AddressFamily::Bridge].map(|family| {
        let mut request = NeighbourMessage::default();
        request.header.family = family;
        RouteNetlinkMessage::GetNeighbour(request)
    })
}

impl Tables {
    pub(super) fn add(&mut self, message: &RouteNetlinkMessage) {
        let RouteNetlinkMessage::NewNeighbour(message) = message else { return };
        match entry(message) {
            Some(Entry::Neighbour { interface, host, mac }) => self.neighbours.push((interface, host, mac)),
            Some(Entry::Port { bridge, mac, port }) => {
                self.ports.insert((bridge, mac), port);
            }
            None => {}
        }
    }

    /// Returns each host with the port that leads to it.
    pub(super) fn stations(self) -> BTreeSet<(IpAddr, u32)> {
        let Self { neighbours, ports } = self;
        neighbours
            .into_iter()
            .filter_map(|(bridge, host, mac)| Some((host, *ports.get(&(bridge, mac))?)))
            .collect()
    }
}

/// Recognizes notifications that say something new: the kernel repeats entries whenever their state changes.
#[derive(Debug, Default)]
pub(super) struct Novelty(HashSet<Entry>);

impl Novelty {
    /// More entries than the tables of a node hold: then everything is forgotten, and read again once.
    const LIMIT: usize = 1 << 16;

    pub(super) fn is_news(&mut self, message: &RouteNetlinkMessage, bridges: &BTreeSet<u32>) -> bool {
        match message {
            RouteNetlinkMessage::NewNeighbour(message) => {
                if self.0.len() > Self::LIMIT {
                    self.0.clear();
                }
                let entry = entry(message).filter(|entry| bridges.contains(&entry.bridge()));
                entry.is_some_and(|entry| self.0.insert(entry))
            }
            RouteNetlinkMessage::DelNeighbour(message) => {
                entry(message).is_some_and(|entry| self.0.remove(&entry))
            }
            _ => false,
        }
    }
}

fn entry(message: &NeighbourMessage) -> Option<Entry> {
    let (mut host, mut mac, mut bridge) = (None, None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => host = Some(IpAddr::from(*v4)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => host = Some(IpAddr::from(*v6)),
            NeighbourAttribute::LinkLayerAddress(address) => mac = Some(address.clone()),
            NeighbourAttribute::Controller(index) => bridge = Some(*index),
            _ => {}
        }
    }
    let (interface, state, mac) = (message.header.ifindex, message.header.state, mac?);
    if message.header.family == AddressFamily::Bridge {
        // Permanent ones are the addresses of the port itself.
        let bridge = bridge.filter(|bridge| *bridge != interface && state != NeighbourState::Permanent)?;
        return Some(Entry::Port { bridge, mac, port: interface });
    }
    let unknown = matches!(state, NeighbourState::Incomplete | NeighbourState::Failed | NeighbourState::None);
    let host = host.filter(|_| !unknown)?;
    Some(Entry::Neighbour { interface, host, mac })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn neighbour(family: AddressFamily, interface: u32, state: NeighbourState) -> NeighbourMessage {
        let mut message = NeighbourMessage::default();
        message.header.family = family;
        message.header.ifindex = interface;
        message.header.state = state;
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(vec![2, 0, 0, 0, 0, 1]));
        message
    }

    fn pod(state: NeighbourState) -> RouteNetlinkMessage {
        let mut message = neighbour(AddressFamily::Inet, 7, state);
        message
            .attributes
            .push(NeighbourAttribute::Destination(NeighbourAddress::Inet([10, 200, 1, 91].into())));
        RouteNetlinkMessage::NewNeighbour(message)
    }

    fn port(state: NeighbourState) -> RouteNetlinkMessage {
        let mut message = neighbour(AddressFamily::Bridge, 9, state);
        message.attributes.push(NeighbourAttribute::Controller(7));
        RouteNetlinkMessage::NewNeighbour(message)
    }

    fn stations(messages: &[RouteNetlinkMessage]) -> Vec<(IpAddr, u32)> {
        let mut tables = Tables::default();
        messages.iter().for_each(|message| tables.add(message));
        tables.stations().into_iter().collect()
    }

    #[test]
    fn a_host_is_at_the_port_that_its_link_layer_address_was_seen_at() {
        let expected = [("10.200.1.91".parse().unwrap(), 9)];
        assert_eq!(stations(&[pod(NeighbourState::Stale), port(NeighbourState::Reachable)]), expected);
        assert_eq!(stations(&[pod(NeighbourState::Failed), port(NeighbourState::Reachable)]), []);
        assert_eq!(stations(&[pod(NeighbourState::Stale), port(NeighbourState::Permanent)]), []);
    }

    #[test]
    fn a_repeated_entry_is_no_news() {
        let mut novelty = Novelty::default();
        let mut is_news = |message, bridge| novelty.is_news(&message, &BTreeSet::from([bridge]));
        assert!(!is_news(pod(NeighbourState::Stale), 8));
        assert!(is_news(pod(NeighbourState::Stale), 7));
        assert!(!is_news(pod(NeighbourState::Reachable), 7));
        assert!(is_news(port(NeighbourState::Reachable), 7));
    }
}
