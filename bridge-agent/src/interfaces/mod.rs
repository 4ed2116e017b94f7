//! Which interfaces lead to the LAN and which to pods: by name, or by where the routes go.
//!
//! Choosing is a pure function of a [`Snapshot`]; reading and watching the kernel are thin.

mod hosted;
mod observe;
mod stations;
mod topology;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use bridge_common::filter::fast_path::ability;
use ipnet::IpNet;

pub use hosted::{Bindings, Hosted};
pub use observe::{Observer, Watch};

use crate::{
    config::{Config, InterfacePattern},
    model::{Role, Target, Tunnel},
};

/// How interfaces are chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// Names of interfaces towards the LAN; empty: by the routes to `external_networks`.
    pub external: Vec<InterfacePattern>,
    /// Names of interfaces towards pods; empty: by the routes to `pod_networks`.
    pub internal: Vec<InterfacePattern>,
    /// Networks of LAN hosts.
    pub external_networks: Vec<IpNet>,
    /// Networks of pods.
    pub pod_networks: Vec<IpNet>,
}

/// An interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    pub name: String,
    /// Its `ARPHRD_*` type (linux/if_arp.h).
    pub kind: u16,
    /// Whether it is a loopback.
    pub loopback: bool,
    /// The kind of device.
    pub device: Device,
    /// Whether its other end is in another network namespace.
    pub reaches_out: bool,
    /// Whether packets that leave by it wait for nothing: it has no queueing discipline.
    pub unqueued: bool,
    /// The outer packets, if it is a tunnel.
    pub tunnel: Option<Tunnel>,
    /// Index of the bridge that it is a port of; 0: none.
    pub upper: u32,
}

/// The kind of device, as far as the fast path must know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// A device that changes packets, or may send them elsewhere than their addresses say.
    #[default]
    Other,
    /// A network card, or a device that passes Ethernet frames on unchanged.
    Ethernet,
    /// A bridge.
    Bridge,
    /// One end of a veth pair.
    Veth,
}

impl Link {
    /// Returns the role of a port of a bridge that leads to pods; `lan`: the bridge leads to the LAN, too.
    fn role_of_port(&self, lan: bool) -> Role {
        match (lan, self.device == Device::Veth && self.reaches_out) {
            (true, true) => Role::Internal,
            (true, false) => Role::External,
            (false, _) => Role::Port,
        }
    }

    /// Returns the abilities of the interface for the fast path: bits of [`ability`].
    fn fast_path(&self) -> u32 {
        let through = ability::INPUT | ability::OUTPUT;
        match self.device {
            _ if self.kind != libc::ARPHRD_ETHER => 0,
            Device::Other => 0,
            Device::Veth if self.reaches_out && self.unqueued => through | ability::PEER,
            Device::Ethernet | Device::Bridge | Device::Veth => through,
        }
    }
}

/// A unicast route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Destination.
    pub to: IpNet,
    /// Interfaces that it leaves by, and whether it does so by a gateway.
    pub hops: Vec<(u32, bool)>,
}

/// Links, addresses and routes at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// By index.
    pub links: BTreeMap<u32, Link>,
    /// Own addresses, without those that only mean something on one link, and loopback.
    pub addresses: BTreeSet<IpAddr>,
    /// Indexes of links with such an address, or with a route.
    pub in_use: BTreeSet<u32>,
    /// Those that matter to a [`Selection`].
    pub routes: Vec<Route>,
    /// Hosts at ports of bridges, and pods behind gateways: address and interface, in ascending order.
    pub stations: BTreeSet<(IpAddr, u32)>,
}

/// The chosen interfaces.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chosen {
    /// The interfaces, each once, by index.
    pub targets: Vec<Target>,
    /// Warnings: missing interfaces, and interfaces whose packets cannot be judged.
    pub remarks: Vec<String>,
    /// Why pods are behind other interfaces than these ([`Selection::misled`]).
    pub misled: Option<String>,
    /// The configured name of each interface that was chosen by name, by index.
    named: BTreeMap<u32, String>,
    /// The selection that chose them.
    by: Option<Selection>,
}

impl Chosen {
    /// Interfaces that an earlier agent has chosen by these names.
    #[must_use]
    pub fn by_name(named: BTreeMap<u32, String>) -> Self {
        Self { named, ..Self::default() }
    }

    /// Returns the configured name of each interface that was chosen by name, by index.
    #[must_use]
    pub const fn names(&self) -> &BTreeMap<u32, String> {
        &self.named
    }
}

impl Selection {
    /// Returns the choice of interfaces of a configuration.
    #[must_use]
    pub fn of(config: &Config) -> Self {
        let interfaces = &config.enforcement.interfaces;
        Self {
            external: interfaces.external.clone(),
            internal: interfaces.internal.clone(),
            external_networks: config.networks.external_nets(),
            pod_networks: config.networks.pod_nets(),
        }
    }

    /// Whether routes matter at all.
    #[must_use]
    pub fn needs_routes(&self) -> bool {
        self.external.is_empty() || !self.pod_networks.is_empty()
    }

    /// Returns whether a route to `to` can change the choice.
    #[must_use]
    pub fn concerns(&self, to: IpNet) -> bool {
        let overlaps = |networks: &[IpNet]| networks.iter().any(|net| net.contains(&to) || to.contains(net));
        // Routes to pods say which of them this node hosts, also where the interfaces are named.
        self.external.is_empty() && overlaps(&self.external_networks) || overlaps(&self.pod_networks)
    }

    /// As [`Self::choose`], but an interface that was chosen by its routes stays so as long as it exists: a network card that goes
    /// down and up again has its programs before its first packet. One that was chosen by a name without `*`
    /// stays so when it is renamed, as udev does, until another one has that name.
    #[must_use]
    pub fn choose_after(&self, snapshot: &Snapshot, before: &Chosen) -> Chosen {
        let mut chosen = self.choose_renamed(snapshot, before);
        if before.by.as_ref().is_some_and(|by| by.chooses_alike(self)) {
            let known: BTreeSet<u32> = chosen.targets.iter().map(|target| target.index).collect();
            let by_routes = |target: &&Target| match target.role {
                Role::External => self.external.is_empty(),
                _ => self.internal.is_empty(),
            };
            let missing = before.targets.iter().filter(|target| !known.contains(&target.index));
            for target in missing.filter(by_routes) {
                if let Some(link) = snapshot.links.get(&target.index) {
                    chosen.targets.push(Target {
                        name: link.name.clone(),
                        upper: link.upper,
                        ..target.clone()
                    });
                }
            }
        }
        chosen
    }

    /// Whether both choose the same interfaces but for the networks of pods: those grow with the cluster.
    fn chooses_alike(&self, other: &Self) -> bool {
        (&self.external, &self.internal, &self.external_networks)
            == (&other.external, &other.internal, &other.external_networks)
    }

    fn choose_renamed(&self, snapshot: &Snapshot, before: &Chosen) -> Chosen {
        let mut present = snapshot.clone();
        let mut renamed = Vec::new();
        for (index, name) in &before.named {
            let configured =
                self.external.iter().chain(&self.internal).any(|pattern| pattern.as_str() == name);
            let taken = snapshot.links.values().any(|link| link.name == *name);
            if let Some(link) =
                present.links.get_mut(index).filter(|link| configured && !taken && link.name != *name)
            {
                renamed.push((*index, std::mem::replace(&mut link.name, name.clone())));
            }
        }
        let mut chosen = self.choose(&present);
        for (index, now) in renamed {
            if let Some(target) = chosen.targets.iter_mut().find(|target| target.index == index) {
                chosen.remarks.push(format!(
                    "interface {} was renamed to {now} and stays attached; write its new name in enforcement.interfaces",
                    target.name
                ));
                target.name = now;
            }
        }
        chosen
    }

    /// Chooses.
    #[must_use]
    pub fn choose(&self, snapshot: &Snapshot) -> Chosen {
        let misled = self.misled(snapshot);
        let mut chosen = Chosen { by: Some(self.clone()), misled, ..Chosen::default() };
        let external = if self.external.is_empty() {
            self.external_networks.iter().flat_map(|net| towards_lan(*net, &snapshot.routes)).collect()
        } else {
            by_name(&self.external, snapshot, &mut chosen.remarks)
        };
        let gateways = self.gateways(snapshot);
        let internal = self.internal(snapshot, &gateways, &mut chosen.remarks);
        if external.is_empty() {
            chosen
                .remarks
                .push("no interface leads to networks.external: nothing from the LAN is judged".into());
        }
        let by_name = [(&self.external, &external), (&self.internal, &internal)].into_iter();
        for (patterns, indexes) in by_name.filter(|(patterns, _)| !patterns.is_empty()) {
            let links = indexes.iter().filter_map(|index| Some((*index, snapshot.links.get(index)?)));
            let exact =
                links.filter(|(_, link)| patterns.iter().any(|pattern| pattern.as_str() == link.name));
            chosen.named.extend(exact.map(|(index, link)| (index, link.name.clone())));
        }
        let mut roles: BTreeMap<u32, Role> = gateways.iter().map(|index| (*index, Role::Gateway)).collect();
        for index in &internal {
            let bridge = snapshot.links.get(index).is_some_and(|link| link.device == Device::Bridge);
            roles.insert(*index, if bridge { Role::Bridge } else { Role::Internal });
            if bridge {
                let lan = external.contains(index);
                roles.extend(ports(*index, snapshot).map(|(port, link)| (port, link.role_of_port(lan))));
            }
        }
        // An interface that leads to both is the LAN's: its pods are on other nodes, or at ports of their own.
        roles.extend(external.iter().map(|index| (*index, Role::External)));
        for index in self.tunnels_to_pods(snapshot, &gateways) {
            roles.entry(index).or_insert(Role::External);
        }
        for (index, role) in roles {
            let Some(link) = snapshot.links.get(&index).filter(|link| !link.loopback) else { continue };
            match link_header(link.kind) {
                Some(link_header) => {
                    let (name, mut fast_path) = (link.name.clone(), link.fast_path());
                    if role == Role::External {
                        // LAN hosts are beyond the other end.
                        fast_path &= !ability::PEER;
                    }
                    let (upper, tunnel) = (link.upper, link.tunnel.is_some());
                    chosen.targets.push(Target { index, name, role, link_header, fast_path, upper, tunnel });
                }
                None => chosen.remarks.push(format!(
                    "{}: link type {} is neither Ethernet nor plain IP, its packets cannot be judged",
                    link.name, link.kind
                )),
            }
        }
        chosen
    }
}

impl Selection {
    /// Returns the interfaces that routes to pods lead to, and that are no pod's: one end of a veth pair with both ends on
    /// this node, such as `cilium_host`, from which programs of the network plugin bring packets to the pods.
    fn gateways(&self, snapshot: &Snapshot) -> BTreeSet<u32> {
        let is_gateway = |link: &Link| link.device == Device::Veth && !link.reaches_out && link.upper == 0;
        let indexes = self.pod_networks.iter().flat_map(|net| towards_pods(*net, snapshot));
        indexes.filter(|index| snapshot.links.get(index).is_some_and(is_gateway)).collect()
    }

    /// Returns the interfaces of pods: those with the configured names, else those that routes lead to and those behind
    /// known `gateways`.
    fn internal(
        &self,
        snapshot: &Snapshot,
        gateways: &BTreeSet<u32>,
        remarks: &mut Vec<String>,
    ) -> BTreeSet<u32> {
        if !self.internal.is_empty() {
            return by_name(&self.internal, snapshot, remarks);
        }
        let mut indexes: BTreeSet<u32> =
            self.pod_networks.iter().flat_map(|net| towards_pods(*net, snapshot)).collect();
        for gateway in gateways {
            let Some(prefix) = snapshot.links.get(gateway).and_then(|link| behind(&link.name)) else {
                continue;
            };
            indexes.remove(gateway);
            let of_pods = snapshot.links.iter().filter(|(_, link)| link.name.starts_with(prefix));
            indexes.extend(of_pods.map(|(index, _)| *index));
        }
        indexes
    }

    /// Returns why the interfaces of pods are unknown, if so: routes lead to a gateway of an unknown network plugin.
    #[must_use]
    pub fn misled(&self, snapshot: &Snapshot) -> Option<String> {
        if !self.internal.is_empty() {
            return None;
        }
        let gateways = self.gateways(snapshot);
        let links = gateways.iter().filter_map(|index| snapshot.links.get(index));
        let unknown = links.filter(|link| behind(&link.name).is_none());
        let names: Vec<&str> = unknown.map(|link| link.name.as_str()).collect();
        (!names.is_empty()).then(|| {
            format!(
                "routes to pods lead to {}, whose other end is on this node too, so the pods are behind interfaces that are not judged; \
                 name those in enforcement.interfaces.internal, such as [\"lxc*\"]",
                names.join(", ")
            )
        })
    }

    /// Returns the tunnels that lead to pods of other nodes.
    fn tunnels_to_pods(&self, snapshot: &Snapshot, gateways: &BTreeSet<u32>) -> BTreeSet<u32> {
        let is_tunnel = |index: &u32| snapshot.links.get(index).is_some_and(|link| link.tunnel.is_some());
        snapshot
            .routes
            .iter()
            .filter(|route| self.pod_networks.iter().any(|net| net.contains(&route.to)))
            .flat_map(|route| route.hops.iter().map(|(index, _)| *index))
            // Programs take packets from a gateway to a tunnel, too.
            .chain(snapshot.links.keys().copied().filter(|_| !gateways.is_empty()))
            .filter(is_tunnel)
            .collect()
    }
}

/// Returns the prefix of the names of the pods' interfaces, if `gateway` belongs to a known network plugin.
fn behind(gateway: &str) -> Option<&'static str> {
    (gateway == "cilium_host").then_some("lxc")
}

/// Returns the ports of a bridge.
fn ports(bridge: u32, snapshot: &Snapshot) -> impl Iterator<Item = (u32, &Link)> {
    snapshot.links.iter().filter(move |(_, link)| link.upper == bridge).map(|(index, link)| (*index, link))
}

fn by_name(patterns: &[InterfacePattern], snapshot: &Snapshot, remarks: &mut Vec<String>) -> BTreeSet<u32> {
    let mut indexes = BTreeSet::new();
    for pattern in patterns {
        let before = indexes.len();
        let named = snapshot.links.iter().filter(|(_, link)| !link.loopback && pattern.matches(&link.name));
        indexes.extend(named.map(|(index, _)| *index));
        // Interfaces that match a pattern may appear later.
        if indexes.len() == before && !pattern.as_str().contains('*') {
            remarks.push(format!(
                "there is no interface {} yet: it is attached when it appears",
                pattern.as_str()
            ));
        }
    }
    indexes
}

/// Interfaces by which packets for LAN hosts of `net` leave: those of every route inside it, and of the closest one
/// around it, be it the default route.
fn towards_lan(net: IpNet, routes: &[Route]) -> BTreeSet<u32> {
    let around =
        routes.iter().filter(|route| route.to.contains(&net)).map(|route| route.to.prefix_len()).max();
    routes
        .iter()
        .filter(|route| {
            net.contains(&route.to) || route.to.contains(&net) && Some(route.to.prefix_len()) == around
        })
        .flat_map(|route| route.hops.iter().map(|(index, _)| *index))
        .collect()
}

/// Interfaces behind which pods of `net` are: those of routes that need no gateway. Behind a gateway are the pods of
/// other nodes, and everything is behind the default route. An own address, such as that of a tunnel, is no pod.
fn towards_pods(net: IpNet, snapshot: &Snapshot) -> BTreeSet<u32> {
    let is_own =
        |to: &IpNet| to.prefix_len() == to.max_prefix_len() && snapshot.addresses.contains(&to.addr());
    snapshot
        .routes
        .iter()
        .filter(|route| route.to.prefix_len() > 0 && (net.contains(&route.to) || route.to.contains(&net)))
        .filter(|route| !is_own(&route.to))
        .flat_map(|route| route.hops.iter().filter(|(_, gateway)| !gateway).map(|(index, _)| *index))
        .collect()
}

/// Length of the link layer header that the kernel side finds before the IP header, by `ARPHRD_*` type.
fn link_header(kind: u16) -> Option<u32> {
    const ETHERNET: u32 = 14;
    /// linux/if_arp.h; not in `libc`.
    const ARPHRD_RAWIP: u16 = 519;
    match kind {
        libc::ARPHRD_ETHER => Some(ETHERNET),
        libc::ARPHRD_NONE
        | ARPHRD_RAWIP
        | libc::ARPHRD_PPP
        | libc::ARPHRD_TUNNEL
        | libc::ARPHRD_TUNNEL6
        | libc::ARPHRD_SIT => Some(0),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(routes: &[(&str, u32, bool)]) -> Snapshot {
        let names = ["lo", "eth0", "cali1", "cali2", "vxlan.calico", "wg0"];
        let links = (1_u32..)
            .zip(names)
            .map(|(index, name)| {
                let kind = if name == "wg0" { libc::ARPHRD_NONE } else { libc::ARPHRD_ETHER };
                let device = if name.starts_with("cali") { Device::Veth } else { Device::Ethernet };
                let (loopback, name) = (name == "lo", name.into());
                let link = Link {
                    name,
                    kind,
                    loopback,
                    device,
                    reaches_out: true,
                    unqueued: true,
                    tunnel: None,
                    upper: 0,
                };
                (index, link)
            })
            .collect();
        let routes = routes
            .iter()
            .map(|(to, index, gateway)| Route { to: to.parse().unwrap(), hops: vec![(*index, *gateway)] })
            .collect();
        Snapshot { links, routes, ..Snapshot::default() }
    }

    fn selection() -> Selection {
        Selection {
            external_networks: vec!["192.168.31.0/24".parse().unwrap()],
            pod_networks: vec!["10.200.0.0/16".parse().unwrap()],
            ..Selection::default()
        }
    }

    fn choose(selection: &Selection, routes: &[(&str, u32, bool)]) -> Vec<(String, Role, u32)> {
        let chosen = selection.choose(&snapshot(routes));
        chosen.targets.into_iter().map(|target| (target.name, target.role, target.link_header)).collect()
    }

    #[test]
    fn routes_to_the_lan_and_to_own_pods_are_followed() {
        let routes = [
            ("0.0.0.0/0", 1, true),
            ("192.168.31.0/24", 2, false),
            ("10.200.1.91/32", 3, false),
            ("10.200.1.92/32", 4, false),
            ("10.200.2.0/24", 5, true),
        ];
        let expected = [("eth0", Role::External), ("cali1", Role::Internal), ("cali2", Role::Internal)];
        assert_eq!(choose(&selection(), &routes), expected.map(|(name, role)| (name.into(), role, 14)));
    }

    #[test]
    fn a_lan_behind_the_default_route_is_external_and_the_default_route_leads_to_no_pods() {
        let routes = [("0.0.0.0/0", 2, false)];
        assert_eq!(choose(&selection(), &routes), [("eth0".into(), Role::External, 14)]);
    }

    #[test]
    fn an_interface_to_both_is_external_and_one_without_link_layer_has_no_header() {
        let routes =
            [("192.168.31.0/25", 2, false), ("10.200.7.0/24", 2, false), ("10.200.1.0/24", 6, false)];
        let expected = [("eth0".into(), Role::External, 14), ("wg0".into(), Role::Internal, 0)];
        assert_eq!(choose(&selection(), &routes), expected);
    }

    #[test]
    fn names_beat_routes() {
        let pattern = |text: &str| serde_json::from_value(text.into()).unwrap();
        let selection = Selection { internal: vec![pattern("cali*")], ..selection() };
        let routes = [("192.168.31.0/24", 2, false), ("10.200.1.0/24", 5, false)];
        let expected = [("eth0", Role::External), ("cali1", Role::Internal), ("cali2", Role::Internal)];
        assert_eq!(choose(&selection, &routes), expected.map(|(name, role)| (name.into(), role, 14)));
        assert!(selection.concerns("192.168.31.0/24".parse().unwrap()));
        assert!(selection.concerns("10.200.1.0/24".parse().unwrap()));
        assert!(!selection.concerns("172.16.0.0/24".parse().unwrap()));
    }

    #[test]
    fn a_renamed_interface_stays_chosen_until_another_has_its_name() {
        let pattern = |text: &str| serde_json::from_value(text.into()).unwrap();
        let selection = Selection { external: vec![pattern("eth0")], ..selection() };
        let mut links = snapshot(&[]);
        let before = selection.choose(&links);
        links.links.get_mut(&2).unwrap().name = "lan0".into();
        let after = selection.choose_after(&links, &before);
        let names =
            |chosen: &Chosen| chosen.targets.iter().map(|t| (t.index, t.name.clone())).collect::<Vec<_>>();
        assert_eq!(names(&after), [(2, "lan0".into())]);
        assert!(after.remarks[0].contains("eth0 was renamed to lan0"), "{:?}", after.remarks);
        let again = selection.choose_after(&links, &after);
        assert_eq!(again, after, "it stays so");
        // Another configuration, or another interface with the name.
        let other = Selection { external: vec![pattern("eth1")], ..selection.clone() };
        assert!(other.choose_after(&links, &after).targets.is_empty());
        links.links.get_mut(&5).unwrap().name = "eth0".into();
        assert_eq!(names(&selection.choose_after(&links, &after)), [(5, "eth0".into())]);
        // Gone.
        assert!(selection.choose_after(&Snapshot::default(), &before).targets.is_empty());
    }

    #[test]
    fn an_interface_stays_chosen_while_it_exists() {
        let routes = [("192.168.31.0/24", 2, false), ("10.200.1.91/32", 3, false)];
        let before = selection().choose(&snapshot(&routes));
        let mut down = snapshot(&[]);
        assert_eq!(selection().choose_after(&down, &before).targets, before.targets);
        // More pods in the cluster change nothing; other LAN networks are another choice.
        let mut more = selection();
        more.pod_networks.push("10.201.0.0/16".parse().unwrap());
        assert_eq!(more.choose_after(&down, &before).targets, before.targets);
        let other = Selection { external_networks: vec!["192.168.32.0/24".parse().unwrap()], ..selection() };
        assert!(other.choose_after(&down, &before).targets.is_empty());
        down.links.remove(&3);
        assert_eq!(selection().choose_after(&down, &before).targets, before.targets[..1]);
        // A route that shows another role decides.
        let after = selection().choose_after(&snapshot(&[("10.200.1.91/32", 2, false)]), &before);
        assert_eq!(after.targets.iter().find(|target| target.index == 2).unwrap().role, Role::Internal);
    }

    #[test]
    fn a_tunnel_to_pods_of_other_nodes_is_external() {
        let mut links = snapshot(&[("192.168.31.0/24", 2, false), ("10.200.2.0/24", 5, true)]);
        assert_eq!(selection().choose(&links).targets.len(), 1);
        links.links.get_mut(&5).unwrap().tunnel = Some(Tunnel::Udp(8472));
        let targets = selection().choose(&links).targets;
        assert_eq!((targets[1].index, targets[1].role, targets[1].tunnel), (5, Role::External, true));
    }

    #[test]
    fn unusable_interfaces_are_reported() {
        let selection =
            Selection { external: vec![serde_json::from_value("eth9".into()).unwrap()], ..selection() };
        let chosen = selection.choose(&snapshot(&[]));
        assert!(chosen.targets.is_empty());
        assert!(chosen.remarks.iter().any(|remark| remark.contains("eth9")), "{:?}", chosen.remarks);
    }
}
