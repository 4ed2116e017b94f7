//! The pods of this node, by address, each with the interface that leads to it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use super::{Device, Selection, Snapshot};
use crate::model::{Role, Target};

/// IPv6 addresses of one pod, at most.
const ADDRESSES_V6: usize = 4;

/// The pods of this node. An address stays bound to its interface for as long as the interface exists, also while that is
/// down and has no routes, unless another one gets its route. Of a port of a bridge, and of an interface behind a gateway, that
/// is the first address that is seen there: a pod that takes the link layer address of another one, and with it its place in the forwarding table of the
/// bridge, gets neither its address nor a second one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bindings(BTreeMap<IpAddr, u32>);

impl Bindings {
    /// Continues the bindings of an earlier agent: addresses and interfaces.
    #[must_use]
    pub fn resume(hosted: impl IntoIterator<Item = (IpAddr, u32)>) -> Self {
        Self(hosted.into_iter().collect())
    }

    /// Follows a change of the node. Returns the addresses that were not bound because their port has others.
    fn update(&mut self, selection: &Selection, snapshot: &Snapshot) -> BTreeSet<(IpAddr, u32)> {
        let is_port = |index: &u32| {
            let Some(link) = snapshot.links.get(index) else { return false };
            let upper = snapshot.links.get(&link.upper);
            upper.map_or(link.upper == 0, |upper| upper.device == Device::Bridge)
        };
        let mut refused = BTreeSet::new();
        self.0.retain(|_, interface| snapshot.links.contains_key(interface));
        self.0.extend(selection.routed(snapshot));
        for (host, port) in &snapshot.stations {
            let is_pod = selection.pod_networks.iter().any(|network| network.contains(host))
                && !snapshot.addresses.contains(host);
            if !is_pod || !is_port(port) || self.0.get(host) == Some(port) {
                continue;
            }
            let limit = if host.is_ipv4() { 1 } else { ADDRESSES_V6 };
            let same = |(other, at): &(&IpAddr, &u32)| *at == port && other.is_ipv4() == host.is_ipv4();
            if self.0.contains_key(host) || self.0.iter().filter(same).count() >= limit {
                refused.insert((*host, *port));
            } else {
                self.0.insert(*host, *port);
            }
        }
        refused
    }
}

/// The pods of this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hosted {
    /// Interface index, by address.
    pub pods: BTreeMap<IpAddr, u32>,
    /// Addresses seen at ports of bridges that are bound to others: port, by address.
    pub refused: BTreeSet<(IpAddr, u32)>,
}

impl Hosted {
    /// Whether the address of a pod behind a gateway is unknown yet: its appearance is notified in the namespace of the pod only.
    #[must_use]
    pub fn is_to_be_polled(&self, targets: &[Target]) -> bool {
        let is_unknown = |target: &&Target| !self.pods.values().any(|index| *index == target.index);
        targets.iter().any(|target| target.role == Role::Gateway)
            && targets.iter().filter(|target| target.role == Role::Internal).any(|target| is_unknown(&target))
    }
}

impl Selection {
    /// Returns the pods of this node: those that a route of their own leads to, without a gateway, and those seen at an
    /// interface.
    #[must_use]
    pub fn hosted(&self, snapshot: &Snapshot, bindings: &mut Bindings) -> Hosted {
        let refused = bindings.update(self, snapshot);
        Hosted { pods: bindings.0.clone(), refused }
    }

    /// Returns the addresses of pods that a route of their own leads to, without a gateway, and the interface of each.
    fn routed(&self, snapshot: &Snapshot) -> BTreeMap<IpAddr, u32> {
        let is_bridge =
            |index: &u32| snapshot.links.get(index).is_some_and(|link| link.device == Device::Bridge);
        snapshot
            .routes
            .iter()
            .filter(|route| {
                route.to.prefix_len() == route.to.max_prefix_len()
                    && self.pod_networks.iter().any(|net| net.contains(&route.to))
            })
            .filter_map(|route| match route.hops[..] {
                [(index, false)] if !is_bridge(&index) => Some((route.to.addr(), index)),
                _ => None,
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Link, Route};
    use super::*;

    fn snapshot() -> Snapshot {
        let link = |name: &str, device, upper| Link {
            name: name.into(),
            kind: libc::ARPHRD_ETHER,
            loopback: false,
            device,
            reaches_out: true,
            unqueued: true,
            tunnel: None,
            upper,
        };
        let links = [
            (2, link("eth0", Device::Ethernet, 0)),
            (3, link("cali1", Device::Veth, 0)),
            (7, link("cni0", Device::Bridge, 0)),
            (8, link("veth8", Device::Veth, 7)),
            (9, link("veth9", Device::Veth, 7)),
        ];
        let route = |to: &str, index| Route { to: to.parse().unwrap(), hops: vec![(index, false)] };
        Snapshot {
            links: links.into(),
            routes: vec![route("10.200.1.91/32", 3), route("10.200.2.0/24", 7)],
            ..Snapshot::default()
        }
    }

    fn selection() -> Selection {
        Selection { pod_networks: vec!["10.200.0.0/16".parse().unwrap()], ..Selection::default() }
    }

    fn at(host: &str, port: u32) -> (IpAddr, u32) {
        (host.parse().unwrap(), port)
    }

    #[test]
    fn pods_have_a_route_of_their_own_or_a_port_of_a_bridge() {
        let mut snapshot = snapshot();
        snapshot.stations = [at("10.200.2.8", 8), at("192.168.31.1", 9)].into();
        let hosted = selection().hosted(&snapshot, &mut Bindings::default());
        assert_eq!(hosted.pods, [at("10.200.1.91", 3), at("10.200.2.8", 8)].into());
    }

    #[test]
    fn the_first_address_of_a_port_stays_until_the_port_goes() {
        let (mut snapshot, mut bindings) = (snapshot(), Bindings::default());
        snapshot.stations = [at("10.200.2.8", 8)].into();
        let _ = selection().hosted(&snapshot, &mut bindings);
        // The pod at port 9 takes the place of the other one, then yet another address.
        snapshot.stations = [at("10.200.2.8", 9), at("10.200.2.9", 9), at("10.200.2.10", 9)].into();
        let hosted = selection().hosted(&snapshot, &mut bindings);
        assert_eq!(hosted.pods.get(&at("10.200.2.8", 8).0), Some(&8));
        assert_eq!(hosted.pods.values().filter(|port| **port == 9).count(), 1);
        assert_eq!(hosted.refused.len(), 2);
        snapshot.links.remove(&8);
        let hosted = selection().hosted(&snapshot, &mut bindings);
        assert_eq!(hosted.pods.values().filter(|port| **port == 8).count(), 0);
    }

    #[test]
    fn an_interface_that_is_down_keeps_its_pod_and_one_that_is_made_anew_does_not() {
        let (mut snapshot, mut bindings) = (snapshot(), Bindings::default());
        let mut hosts = |snapshot: &Snapshot| selection().hosted(snapshot, &mut bindings).pods;
        assert_eq!(hosts(&snapshot), [at("10.200.1.91", 3)].into());
        let routes = std::mem::take(&mut snapshot.routes);
        assert_eq!(hosts(&snapshot), [at("10.200.1.91", 3)].into());
        snapshot.links.remove(&3);
        assert_eq!(hosts(&snapshot), BTreeMap::new());
        snapshot.routes = routes;
        assert_eq!(hosts(&snapshot), [at("10.200.1.91", 3)].into());
    }

    #[test]
    fn bindings_of_an_earlier_agent_are_resumed() {
        let mut snapshot = snapshot();
        snapshot.stations = [at("10.200.2.8", 9)].into();
        let mut bindings = Bindings::resume([at("10.200.2.8", 8), at("10.200.1.91", 3)]);
        let hosted = selection().hosted(&snapshot, &mut bindings);
        assert_eq!(hosted.pods, [at("10.200.1.91", 3), at("10.200.2.8", 8)].into());
    }
}
