//! The topology: which namespaces, links, addresses and routes a lab consists of, as text for `ip -batch` and
//! `nft -f`. Nothing here touches the kernel.
//!
//! ```text
//!  a 192.168.31.67 ─┐                        ┌─ cali… ── eth0 c1 10.200.1.91
//!                   ├─ lan ── eth0 b ────────┤
//! a2 192.168.31.68 ─┘   192.168.31.17        └─ cali… ── eth0 c2 10.200.1.92
//!                                  10.200.1.1
//! ```
//! In IPv6 the same with fd31:: for the LAN and `fd20:N::` for the pods of node N, and the last number of
//! the IPv4 address: fd31::67, fd31::17, `fd20:1::91`.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};

/// The shape of a lab; see the methods of [`super::Builder`].
#[derive(Clone, Debug)]
pub(super) struct Options {
    pub(super) second_host: bool,
    pub(super) nodes: u8,
    pub(super) pods: u8,
    pub(super) routes: bool,
    pub(super) vlan: Option<u16>,
    pub(super) offloads: bool,
    pub(super) masquerade: bool,
    pub(super) conntrack: bool,
    pub(super) node_ports: Vec<NodePort>,
}

/// A NodePort service without source translation (`externalTrafficPolicy: Local`), TCP and UDP.
#[derive(Clone, Copy, Debug)]
pub struct NodePort {
    /// The port on the node, IPv4 and IPv6.
    pub port: u16,
    /// Which of the lab's pods, from 0, in the order of [`super::Lab::pods`]. Its own node answers on `port`.
    pub pod: usize,
    /// The port in the pod.
    pub pod_port: u16,
}

/// Where the pods of the lab begin in their /24.
const FIRST_POD: u8 = 91;
/// Where the nodes of the lab begin on the LAN.
const FIRST_NODE: u8 = 17;
/// All pods of all nodes.
const ALL_PODS_V4: &str = "10.200.0.0/16";
const ALL_PODS_V6: &str = "fd20::/16";

/// A LAN host or a node, at the LAN.
#[derive(Clone, Debug)]
pub(super) struct Station {
    pub(super) name: String,
    pub(super) v4: Ipv4Addr,
    pub(super) v6: Ipv6Addr,
    /// The other end of its veth: a port of the LAN, or a `cali…` interface of its node.
    pub(super) peer: String,
    /// For a pod, the index of its node.
    pub(super) node: Option<u8>,
}

impl Station {
    fn on_lan(name: String, number: u8) -> Self {
        Self {
            v4: Ipv4Addr::new(192, 168, 31, number),
            v6: written(&format!("fd31::{number}")),
            peer: format!("port-{name}"),
            node: None,
            name,
        }
    }

    fn pod(index: u8, of_node: u8, node: u8) -> Self {
        let number = FIRST_POD + of_node;
        let v4 = Ipv4Addr::new(10, 200, node + 1, number);
        Self {
            name: format!("c{}", index + 1),
            v4,
            v6: written(&format!("fd20:{}::{number}", node + 1)),
            // As Calico names them: `cali` and eleven hexadecimal digits.
            peer: format!("cali{:011x}", v4.to_bits()),
            node: Some(node),
        }
    }

    /// Locally administered, and telling the IPv4 address.
    pub(super) fn mac(&self) -> [u8; 6] {
        let [a, b, c, d] = self.v4.octets();
        [2, 0, a, b, c, d]
    }
}

/// The MAC address of every `cali…` interface, as with Calico.
pub(super) const NODE_SIDE_MAC: [u8; 6] = [0xee; 6];

/// The address of `fd31::67` has the digits of `192.168.31.67`, read as hexadecimal.
fn written(text: &str) -> Ipv6Addr {
    text.parse().expect("decimal digits are hexadecimal digits")
}

/// Pod network of a node, counted from 0.
pub(super) fn pod_network_v4(node: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(10, 200, node + 1, 0), 24)
}

/// Pod network of a node, counted from 0.
pub(super) fn pod_network_v6(node: u8) -> Ipv6Net {
    Ipv6Net::new_assert(written(&format!("fd20:{}::", node + 1)), 64)
}

/// The address at which a node's pods find it.
pub(super) fn gateway_v4(node: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 200, node + 1, 1)
}

/// The address at which a node's pods find it.
pub(super) fn gateway_v6(node: u8) -> Ipv6Addr {
    written(&format!("fd20:{}::1", node + 1))
}

pub(super) fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// The whole lab.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) options: Options,
    pub(super) hosts: Vec<Station>,
    pub(super) nodes: Vec<Station>,
    pub(super) pods: Vec<Station>,
}

impl Plan {
    pub(super) fn new(options: Options) -> Result<Self, String> {
        // From .17 up to the first LAN host at .67, and from .91 up to the end of the /24.
        if !(1..=50).contains(&options.nodes) || options.pods > 150 {
            return Err("a lab has 1 to 50 nodes and at most 150 pods on each".into());
        }
        if options.vlan.is_some_and(|id| !(1..=4094).contains(&id)) {
            return Err("a VLAN id is 1 to 4094".into());
        }
        let pods = (0..options.nodes).flat_map(|node| (0..options.pods).map(move |of_node| (node, of_node)));
        let pods: Vec<_> =
            (0..).zip(pods).map(|(i, (node, of_node))| Station::pod(i, of_node, node)).collect();
        if let Some(bad) = options.node_ports.iter().find(|p| p.pod >= pods.len()) {
            return Err(format!("NodePort {} leads to pod {}; there are {}", bad.port, bad.pod, pods.len()));
        }
        let mut hosts = vec![Station::on_lan("a".into(), 67)];
        if options.second_host {
            hosts.push(Station::on_lan("a2".into(), 68));
        }
        let node_name = |i| if i == 0 { "b".into() } else { format!("b{}", i + 1) };
        let nodes = (0..options.nodes).map(|i| Station::on_lan(node_name(i), FIRST_NODE + i)).collect();
        Ok(Self { options, hosts, nodes, pods })
    }

    /// Returns the interface that has the LAN addresses of a LAN host or node.
    pub(super) fn lan_interface(&self) -> String {
        self.options.vlan.map_or_else(|| "eth0".into(), |id| format!("eth0.{id}"))
    }

    fn on_lan(&self) -> impl Iterator<Item = &Station> {
        self.hosts.iter().chain(&self.nodes)
    }

    /// Names of all namespaces, without the lab's prefix.
    pub(super) fn namespaces(&self) -> impl Iterator<Item = &str> {
        std::iter::once("lan").chain(self.on_lan().chain(&self.pods).map(|station| station.name.as_str()))
    }

    /// Makes every veth pair straight inside its two namespaces: the machine's own one never sees them.
    pub(super) fn links(&self, full_name: impl Fn(&str) -> String) -> String {
        let mut script = String::new();
        for station in self.on_lan().chain(&self.pods) {
            let (far, far_mac) = match station.node {
                Some(node) => (
                    self.nodes[usize::from(node)].name.as_str(),
                    format!("address {} ", mac_text(NODE_SIDE_MAC)),
                ),
                None => ("lan", String::new()),
            };
            writeln!(
                script,
                "link add eth0 address {} netns {} type veth peer name {} {far_mac}netns {}",
                mac_text(station.mac()),
                full_name(&station.name),
                station.peer,
                full_name(far),
            )
            .expect("writing to a string");
        }
        script
    }

    /// The segment: a bridge that forwards from the first moment and looks into nothing.
    pub(super) fn segment(&self) -> String {
        let mut script = String::from("link add lan0 type bridge stp_state 0 mcast_snooping 0\n");
        for station in self.on_lan() {
            script += &format!("link set {} master lan0 up\n", station.peer);
        }
        script + "link set lan0 up\n"
    }

    fn lan_side(&self, station: &Station) -> String {
        let dev = self.lan_interface();
        let mut script = String::from("link set lo up\nlink set eth0 up\n");
        if let Some(id) = self.options.vlan {
            script += &format!("link add link eth0 name {dev} type vlan id {id}\nlink set {dev} up\n");
        }
        script += &format!("address add {}/24 dev {dev}\n", station.v4);
        script + &format!("address add {}/64 dev {dev} nodad\n", station.v6)
    }

    fn routes_to_pods(&self, except: Option<usize>) -> String {
        let mut script = String::new();
        for (i, node) in (0..).zip(&self.nodes).filter(|(i, _)| except != Some(usize::from(*i))) {
            script += &format!("route add {} via {}\n", pod_network_v4(i), node.v4);
            script += &format!("route add {} via {}\n", pod_network_v6(i), node.v6);
        }
        script
    }

    pub(super) fn host(&self, station: &Station) -> String {
        let routes = if self.options.routes { self.routes_to_pods(None) } else { String::new() };
        self.lan_side(station) + &routes
    }

    /// Routed pods, as with Calico: no bridge, a host route to each, the gateway's address on each interface.
    pub(super) fn node(&self, index: u8) -> String {
        let mut script = self.lan_side(&self.nodes[usize::from(index)]);
        script += &self.routes_to_pods(Some(index.into()));
        for Station { peer, v4, v6, .. } in self.pods.iter().filter(|pod| pod.node == Some(index)) {
            script += &format!("link set {peer} up\n");
            script += &format!("address add {}/32 dev {peer}\n", gateway_v4(index));
            script += &format!("address add {}/128 dev {peer} nodad\n", gateway_v6(index));
            script += &format!("route add {v4}/32 dev {peer}\nroute add {v6}/128 dev {peer}\n");
        }
        script
    }

    pub(super) fn pod(&self, pod: &Station) -> String {
        let node = pod.node.unwrap_or_default();
        let (v4, v6) = (gateway_v4(node), gateway_v6(node));
        format!(
            "link set lo up\nlink set eth0 up\n\
             address add {}/32 dev eth0\naddress add {}/128 dev eth0 nodad\n\
             route add {v4}/32 dev eth0\nroute add {v6}/128 dev eth0\n\
             route add default via {v4} dev eth0\nroute add default via {v6} dev eth0\n",
            pod.v4, pod.v6
        )
    }

    /// Returns the NAT rules of a cluster's own components on a node, in a table of the lab's own; `None` if there are
    /// none.
    pub(super) fn nftables(&self, index: u8) -> Option<String> {
        let Options { masquerade, conntrack, node_ports, .. } = &self.options;
        let node = &self.nodes[usize::from(index)];
        let mut rules = Vec::new();
        if *masquerade {
            let oif = self.lan_interface();
            let (v4, v6) = (pod_network_v4(index), pod_network_v6(index));
            rules.push(format!(
                "chain postrouting {{\ntype nat hook postrouting priority srcnat\n\
                 oifname \"{oif}\" ip saddr {v4} ip daddr != {ALL_PODS_V4} masquerade\n\
                 oifname \"{oif}\" ip6 saddr {v6} ip6 daddr != {ALL_PODS_V6} masquerade\n}}\n"
            ));
        }
        let own_ports = node_ports.iter().filter(|p| self.pods[p.pod].node == Some(index));
        let translations: String = own_ports
            .map(|NodePort { port, pod, pod_port }| {
                let pod = &self.pods[*pod];
                format!(
                    "ip daddr {} meta l4proto {{ tcp, udp }} th dport {port} dnat ip to {}:{pod_port}\n\
                     ip6 daddr {} meta l4proto {{ tcp, udp }} th dport {port} dnat ip6 to [{}]:{pod_port}\n",
                    node.v4, pod.v4, node.v6, pod.v6
                )
            })
            .collect();
        if !translations.is_empty() {
            rules.push(format!(
                "chain prerouting {{\ntype nat hook prerouting priority dstnat\n{translations}}}\n"
            ));
        }
        if *conntrack {
            // Any rule that asks for the state makes the kernel track; this one changes nothing.
            rules.push(
                "chain track {\ntype filter hook forward priority filter\nct state invalid counter\n}\n"
                    .into(),
            );
        }
        (!rules.is_empty()).then(|| format!("table inet lab {{\n{}}}\n", rules.concat()))
    }
}
