//! The surroundings of this node by interface, for an engine that identifies pods by interface names.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use super::{Selection, Snapshot, behind, by_name, towards_lan};
use crate::model::{RoutedPods, Topology, Tunnel};

/// Interface names of network plugins, each with a suffix per pod: a rule for the prefix covers pods yet to come.
const PREFIXES: [&str; 7] = ["cali", "veth", "lxc", "eni", "azv", "gke", "tap"];

impl Selection {
    /// Returns the topology that a snapshot shows.
    #[must_use]
    pub fn topology(&self, snapshot: &Snapshot) -> Topology {
        let external = if self.external.is_empty() {
            self.external_networks.iter().flat_map(|net| towards_lan(*net, &snapshot.routes)).collect()
        } else {
            by_name(&self.external, snapshot, &mut Vec::new())
        };
        let name = |index: &u32| {
            snapshot.links.get(index).filter(|link| !link.loopback).map(|link| link.name.clone())
        };

        let known_gateways = self.gateways(snapshot);
        let mut remote: BTreeMap<u32, Vec<IpNet>> = BTreeMap::new();
        let mut gateways = remote.clone();
        for route in &snapshot.routes {
            if self.pod_networks.iter().any(|net| net.contains(&route.to)) {
                for (index, gateway) in &route.hops {
                    if *gateway || external.contains(index) {
                        remote.entry(*index).or_default().push(route.to);
                    } else if known_gateways.contains(index) {
                        gateways.entry(*index).or_default().push(route.to);
                    }
                }
            }
        }
        let routed = |by: &BTreeMap<u32, Vec<IpNet>>| -> Vec<RoutedPods> {
            by.iter()
                .filter_map(|(index, pods)| {
                    Some(RoutedPods { interface: name(index)?, pods: IpNet::aggregate(pods) })
                })
                .collect()
        };
        let (remote, gateways) = (routed(&remote), routed(&gateways));

        let external: Vec<String> = external.iter().filter_map(name).collect();
        let outward = |name: &str| {
            external.iter().any(|other| other == name) || remote.iter().any(|other| other.interface == name)
        };
        let mut internal: Vec<String> = if self.internal.is_empty() {
            let indexes = self.internal(snapshot, &known_gateways, &mut Vec::new());
            let names = indexes.iter().filter_map(name).filter(|name| !outward(name));
            let names = names.map(|name| by_prefix(name, snapshot, outward));
            let behind = gateways.iter().filter_map(|gateway| behind(&gateway.interface));
            names.chain(behind.map(|prefix| format!("{prefix}+"))).collect()
        } else {
            let names = self.internal.iter().flat_map(|pattern| match pattern.as_str().strip_suffix('*') {
                Some(prefix) if !prefix.contains('*') => vec![format!("{prefix}+")],
                _ => by_name(std::slice::from_ref(pattern), snapshot, &mut Vec::new())
                    .iter()
                    .filter_map(name)
                    .collect(),
            });
            names.collect()
        };
        internal.sort_unstable();
        internal.dedup();

        let mut tunnels: Vec<Tunnel> = snapshot.links.values().filter_map(|link| link.tunnel).collect();
        tunnels.sort_unstable();
        tunnels.dedup();
        let mut tunnel_interfaces: Vec<String> = snapshot
            .links
            .values()
            .filter(|link| link.tunnel.is_some())
            .map(|link| link.name.clone())
            .collect();
        tunnel_interfaces.sort_unstable();
        let settled = self.settled(snapshot, &external, &internal);
        Topology { external, internal, remote, gateways, tunnels, tunnel_interfaces, settled }
    }

    /// Returns the names of the interfaces that are not those of a new pod, those in `first` at first. Every other interface, also one
    /// that is not here yet, may become one as soon as a route leads to it.
    fn settled(&self, snapshot: &Snapshot, first: &[String], internal: &[String]) -> Vec<String> {
        if !self.internal.is_empty() {
            return Vec::new();
        }
        let covered = |name: &str| {
            internal.iter().any(|other| match other.strip_suffix('+') {
                Some(prefix) => name.starts_with(prefix),
                None => name == other,
            })
        };
        // A rule could not name others.
        let plain = |name: &str| name.chars().all(|c| c.is_ascii_alphanumeric() || "._-@:".contains(c));
        let links = snapshot.links.iter().filter(|(index, link)| {
            link.upper == 0 && (!link.reaches_out || snapshot.in_use.contains(index)) && plain(&link.name)
        });
        let names: BTreeSet<&str> =
            links.map(|(_, link)| link.name.as_str()).filter(|name| !covered(name)).collect();
        let others = names.iter().filter(|name| !first.iter().any(|other| other == *name));
        first.iter().cloned().chain(others.map(ToString::to_string)).collect()
    }
}

impl Selection {
    /// The same, but for which every network may be one of pods: to see [`Selection::led_to_pods`].
    #[must_use]
    pub fn of_unknown_pods(&self) -> Self {
        let everything = [IpNet::default(), IpNet::V6(ipnet::Ipv6Net::default())];
        Self { internal: Vec::new(), pod_networks: everything.into(), ..self.clone() }
    }

    /// Returns the networks that this node leads packets to by itself, beside those of LAN hosts: while nothing else is known,
    /// pods are there. `snapshot` is one for [`Selection::of_unknown_pods`].
    #[must_use]
    pub fn led_to_pods(&self, snapshot: &Snapshot) -> Vec<IpNet> {
        let external: BTreeSet<u32> = if self.external.is_empty() {
            self.external_networks.iter().flat_map(|net| towards_lan(*net, &snapshot.routes)).collect()
        } else {
            by_name(&self.external, snapshot, &mut Vec::new())
        };
        let hops = || snapshot.routes.iter().flat_map(|route| route.hops.iter().map(move |hop| (route, hop)));
        // A gateway is beyond a network card, and beyond a tunnel.
        let beyond: BTreeSet<u32> =
            hops().filter(|(_, (_, gateway))| *gateway).map(|(_, (index, _))| *index).collect();
        let of_pods = |index: &u32| {
            !external.contains(index)
                && !beyond.contains(index)
                && snapshot.links.get(index).is_some_and(|link| !link.loopback)
        };
        let disjoint =
            |net: &IpNet| !self.external_networks.iter().any(|lan| lan.contains(net) || net.contains(lan));
        let link_local = |net: &IpNet| match net {
            IpNet::V4(net) => net.addr().is_link_local() || net.addr().is_multicast(),
            IpNet::V6(net) => net.addr().is_unicast_link_local() || net.addr().is_multicast(),
        };
        let networks = hops()
            .filter(|(route, (index, _))| route.to.prefix_len() > 0 && of_pods(index))
            .map(|(route, _)| route.to)
            .filter(|net| disjoint(net) && !link_local(net));
        let mut networks = IpNet::aggregate(&networks.collect());
        networks.sort_unstable();
        networks
    }
}

/// Returns the name, or the plugin's prefix and `+` if no interface towards the outside shares that.
fn by_prefix(name: String, snapshot: &Snapshot, outward: impl Fn(&str) -> bool) -> String {
    let prefix = PREFIXES.into_iter().find(|prefix| name.starts_with(prefix));
    let shared =
        |prefix: &&str| snapshot.links.values().any(|l| l.name.starts_with(prefix) && outward(&l.name));
    match prefix.filter(|prefix| !shared(prefix)) {
        Some(prefix) => format!("{prefix}+"),
        None => name,
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Device, Link};
    use super::*;
    use crate::interfaces::Route;
    use crate::model::Role;

    fn link(name: &str, tunnel: Option<Tunnel>) -> Link {
        Link {
            name: name.into(),
            kind: libc::ARPHRD_ETHER,
            loopback: name == "lo",
            device: Device::Ethernet,
            reaches_out: false,
            unqueued: true,
            tunnel,
            upper: 0,
        }
    }

    fn snapshot() -> Snapshot {
        let vxlan = Some(Tunnel::Udp(8472));
        let names = [("lo", None), ("eth0", None), ("cali1", None), ("cali2", None), ("flannel.1", vxlan)];
        let links = (1..).zip(names.map(|(name, tunnel)| link(name, tunnel))).collect();
        let route =
            |to: &str, index, gateway| Route { to: to.parse().unwrap(), hops: vec![(index, gateway)] };
        let routes = vec![
            route("0.0.0.0/0", 2, true),
            route("192.168.31.0/24", 2, false),
            route("10.200.1.91/32", 3, false),
            route("10.200.1.92/32", 4, false),
            route("10.200.2.0/24", 5, true),
            route("10.200.3.0/24", 2, true),
        ];
        Snapshot { links, routes, ..Snapshot::default() }
    }

    fn selection() -> Selection {
        Selection {
            external_networks: vec!["192.168.31.0/24".parse().unwrap()],
            pod_networks: vec!["10.200.0.0/16".parse().unwrap()],
            ..Selection::default()
        }
    }

    #[test]
    fn pods_behind_a_gateway_are_known_by_the_names_of_the_plugin() {
        let mut snapshot = snapshot();
        let (mut gateway, lxc) = (link("cilium_host", None), link("lxc1234", None));
        gateway.device = Device::Veth;
        snapshot.links.extend([(10, gateway), (11, Link { reaches_out: true, ..lxc })]);
        let to = "10.200.8.0/24".parse().unwrap();
        snapshot.routes.push(Route { to, hops: vec![(10, false)] });
        let topology = selection().topology(&snapshot);
        assert_eq!(topology.internal, ["cali+", "lxc+"]);
        assert_eq!(topology.gateways, [RoutedPods { interface: "cilium_host".into(), pods: vec![to] }]);
        let chosen = selection().choose(&snapshot);
        let roles: Vec<_> = chosen.targets.iter().map(|target| (target.index, target.role)).collect();
        assert!(roles.contains(&(10, Role::Gateway)) && roles.contains(&(11, Role::Internal)), "{roles:?}");
        assert_eq!(chosen.misled, None);
        // Of an unknown plugin.
        snapshot.links.get_mut(&10).unwrap().name = "plugin_host".into();
        assert!(selection().choose(&snapshot).misled.is_some());
    }

    #[test]
    fn pods_of_other_nodes_are_known_by_their_interface() {
        let topology = selection().topology(&snapshot());
        let remote = |interface: &str, pods: &str| RoutedPods {
            interface: interface.into(),
            pods: vec![pods.parse().unwrap()],
        };
        assert_eq!(
            topology,
            Topology {
                external: vec!["eth0".into()],
                internal: vec!["cali+".into()],
                remote: vec![remote("eth0", "10.200.3.0/24"), remote("flannel.1", "10.200.2.0/24")],
                gateways: Vec::new(),
                tunnels: vec![Tunnel::Udp(8472)],
                tunnel_interfaces: vec!["flannel.1".into()],
                settled: ["eth0", "flannel.1", "lo"].map(Into::into).into(),
            }
        );
    }

    #[test]
    fn an_interface_is_settled_unless_it_may_become_that_of_a_pod() {
        let mut snapshot = snapshot();
        let new = |name: &str| Link { device: Device::Veth, reaches_out: true, ..link(name, None) };
        // Without a route yet; a veth pair with a route of its own; a port of a bridge; a name that no rule can have.
        snapshot.links.extend([(10, new("poda")), (11, new("lan1")), (12, Link { upper: 2, ..new("port") })]);
        snapshot.links.extend([(13, link("wg0", None)), (14, link("odd+", None))]);
        snapshot.in_use.insert(11);
        assert_eq!(selection().topology(&snapshot).settled, ["eth0", "flannel.1", "lan1", "lo", "wg0"]);
        let named =
            Selection { internal: vec![serde_json::from_value("cali*".into()).unwrap()], ..selection() };
        assert!(named.topology(&snapshot).settled.is_empty());
    }

    #[test]
    fn unknown_pods_are_behind_interfaces_without_gateways() {
        let mut snapshot = snapshot();
        let lan = Route { to: "192.168.31.0/24".parse().unwrap(), hops: vec![(2, false)] };
        let scoped = Route { to: "fe80::/64".parse().unwrap(), hops: vec![(3, false)] };
        snapshot.routes.extend([lan, scoped]);
        let unknown = Selection { pod_networks: Vec::new(), ..selection() };
        let led = unknown.led_to_pods(&snapshot);
        assert_eq!(led, ["10.200.1.91/32", "10.200.1.92/32"].map(|net| net.parse().unwrap()));
        // An interface that leads to LAN hosts leads to no pods of this node.
        snapshot.routes.push(Route { to: "192.168.31.128/25".parse().unwrap(), hops: vec![(4, false)] });
        assert_eq!(unknown.led_to_pods(&snapshot), led[..1]);
        assert!(unknown.of_unknown_pods().concerns("10.1.2.3/32".parse().unwrap()));
    }

    #[test]
    fn a_prefix_that_an_outer_interface_shares_is_not_used() {
        let mut snapshot = snapshot();
        snapshot.links.get_mut(&2).unwrap().name = "cali0".into();
        assert_eq!(selection().topology(&snapshot).internal, ["cali1", "cali2"]);
    }

    #[test]
    fn configured_patterns_become_prefixes() {
        let pattern = |text: &str| serde_json::from_value(text.into()).unwrap();
        let selection = Selection { internal: vec![pattern("veth*"), pattern("cali*2")], ..selection() };
        assert_eq!(selection.topology(&snapshot()).internal, ["cali2", "veth+"]);
    }
}
