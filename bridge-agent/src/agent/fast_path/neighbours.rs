//! Which changes of the neighbour table change the way of a flow: not that the kernel asks a neighbour whether it is still
//! there, which it does all the time, but that it is elsewhere, or gone.

use std::{collections::HashMap, io, net::IpAddr};

use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
};

use crate::kernel::netlink::Route;

/// Index of the interface, and address.
type Key = (u32, IpAddr);

/// The link layer addresses of neighbours, by interface and address.
#[derive(Debug, Default)]
pub(super) struct Neighbours(HashMap<Key, Vec<u8>>);

impl Neighbours {
    pub(super) fn read() -> io::Result<Self> {
        let request = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
        let messages = Route::open()?.dump(request)?;
        let mut neighbours = Self::default();
        for message in messages {
            if let RouteNetlinkMessage::NewNeighbour(message) = message {
                neighbours.update(&message);
            }
        }
        Ok(neighbours)
    }

    /// Updates the table from a notification. Returns whether a known neighbour has moved, failed, or was removed.
    pub(super) fn change(&mut self, message: &RouteNetlinkMessage) -> bool {
        match message {
            RouteNetlinkMessage::NewNeighbour(neighbour) => self.update(neighbour),
            RouteNetlinkMessage::DelNeighbour(neighbour) => self.remove(neighbour),
            _ => false,
        }
    }

    fn update(&mut self, message: &NeighbourMessage) -> bool {
        let Some((key, address)) = entry(message) else { return false };
        match address {
            Some(address) => match self.0.insert(key, address.clone()) {
                Some(before) => before != address,
                None => false,
            },
            None => self.0.remove(&key).is_some(),
        }
    }

    fn remove(&mut self, message: &NeighbourMessage) -> bool {
        entry(message).is_some_and(|(key, _)| self.0.remove(&key).is_some())
    }
}

/// Who is meant, and its link layer address, if it has one.
fn entry(message: &NeighbourMessage) -> Option<(Key, Option<Vec<u8>>)> {
    if !matches!(message.header.family, AddressFamily::Inet | AddressFamily::Inet6) {
        return None;
    }
    let mut destination = None;
    let mut link = None;
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => destination = Some((*v4).into()),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => destination = Some((*v6).into()),
            NeighbourAttribute::LinkLayerAddress(address) => link = Some(address.clone()),
            _ => {}
        }
    }
    let unknown = matches!(
        message.header.state,
        NeighbourState::Incomplete | NeighbourState::Failed | NeighbourState::None
    );
    Some(((message.header.ifindex, destination?), link.filter(|_| !unknown)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(state: NeighbourState, link: Option<u8>) -> NeighbourMessage {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.ifindex = 2;
        message.header.state = state;
        message
            .attributes
            .push(NeighbourAttribute::Destination(NeighbourAddress::Inet([192, 168, 31, 67].into())));
        message
            .attributes
            .extend(link.map(|last| NeighbourAttribute::LinkLayerAddress(vec![2, 0, 0, 0, 0, last])));
        message
    }

    #[test]
    fn only_a_neighbour_that_is_elsewhere_or_gone_update() {
        let mut neighbours = Neighbours::default();
        for (state, link, expected) in [
            (NeighbourState::Incomplete, None, false),
            (NeighbourState::Reachable, Some(1), false),
            (NeighbourState::Stale, Some(1), false),
            (NeighbourState::Probe, Some(1), false),
            (NeighbourState::Reachable, Some(2), true),
            (NeighbourState::Failed, Some(2), true),
            (NeighbourState::Failed, None, false),
            (NeighbourState::Permanent, Some(2), false),
        ] {
            assert_eq!(neighbours.update(&message(state, link)), expected, "{state:?} {link:?}");
        }
        assert!(neighbours.remove(&message(NeighbourState::Stale, Some(2))));
        assert!(!neighbours.remove(&message(NeighbourState::Stale, Some(2))));
    }
}
