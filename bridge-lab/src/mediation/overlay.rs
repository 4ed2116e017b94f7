//! Pods of other nodes.

use anyhow::Result;
use etherparse::IpNumber;

use super::{
    CLOSED, Finding, Ground, OPEN, RULES, SECOND, Setting, answered, arrives, config, connects, reverse_path,
};
use crate::agent::Agent;
use crate::lab::{Family, Lab};
use crate::packet::Packet;
use crate::traffic::{tcp, udp};

/// The UDP port of the overlay.
const VXLAN: u16 = 8472;

/// Two nodes with a pod each; every node knows the pods of both.
struct Nodes {
    ground: Ground,
    _second: Agent,
}

impl Nodes {
    fn new(setting: Setting, overlay: bool) -> Result<Self> {
        let lab = Lab::builder().nodes(2).pods(1).second_host().build()?;
        if overlay {
            join(&lab)?;
        }
        for node in lab.nodes() {
            reverse_path(node, setting)?;
        }
        // LAN hosts take the first node for the gateway of all pods.
        for host in lab.hosts() {
            for family in Family::BOTH {
                let (network, node) = (lab.pod_network(1, family), lab.b().ip(family));
                host.netns.ip(&format!("route replace {network} via {node}"))?;
            }
        }
        let config = whole(setting, "nodes: [192.168.31.17, 192.168.31.18, \"fd31::17\", \"fd31::18\"]");
        let agent = Agent::start(&lab, lab.b(), &config)?;
        let second = Agent::start(&lab, &lab.nodes()[1], &config)?;
        Ok(Self { ground: Ground { lab, agent }, _second: second })
    }
}

/// A configuration with the pods of both nodes.
fn whole(setting: Setting, nodes: &str) -> String {
    config(setting, nodes, "", RULES)
        .replace("pods: [10.200.1.0/24, \"fd20:1::/64\"]", "pods: [10.200.0.0/16, \"fd20::/16\"]")
}

/// Gives both nodes an overlay interface, and routes to the other's pods through it.
fn join(lab: &Lab) -> Result<()> {
    let nodes = lab.nodes();
    for (own, other) in [(0_u8, 1_u8), (1, 0)] {
        let (node, peer) = (&nodes[usize::from(own)], &nodes[usize::from(other)]);
        let (n, m) = (own + 1, other + 1);
        let ip = |words: &str| node.netns.ip(words);
        ip(&format!(
            "link add flannel.1 address 02:00:00:00:00:0{n} type vxlan id 1 local {} remote {} dstport {VXLAN} nolearning",
            node.v4, peer.v4
        ))?;
        ip("link set flannel.1 up")?;
        ip(&format!("address add 10.200.{n}.0/32 dev flannel.1"))?;
        ip(&format!("address add fd20:{n}::/128 dev flannel.1 nodad"))?;
        ip(&format!(
            "neighbour replace 10.200.{m}.0 lladdr 02:00:00:00:00:0{m} dev flannel.1 nud permanent"
        ))?;
        ip(&format!("neighbour replace fd20:{m}:: lladdr 02:00:00:00:00:0{m} dev flannel.1 nud permanent"))?;
        for family in Family::BOTH {
            ip(&format!("route delete {}", lab.pod_network(other, family)))?;
        }
        ip(&format!("route replace 10.200.{m}.0/24 via 10.200.{m}.0 dev flannel.1 onlink"))?;
        ip(&format!("-6 route replace fd20:{m}::/64 via fd20:{m}:: dev flannel.1 onlink"))?;
    }
    Ok(())
}

/// What LAN hosts reach of the pod of the second node by the first one.
fn through_first_node(setting: Setting, overlay: bool) -> Result<Finding> {
    let nodes = Nodes::new(setting, overlay)?;
    let ground = &nodes.ground;
    let (a, x, c1, c2) = (ground.a(), ground.x(), ground.c1(), ground.c2());
    let mut finding = Finding::default();
    for family in Family::BOTH {
        let _open = tcp::Server::echo(&c2.netns, c2.at(family, OPEN))?;
        let _closed = tcp::Server::echo(&c2.netns, c2.at(family, CLOSED))?;
        let open = udp::Server::echo(&c2.netns, c2.at(family, OPEN))?;
        let closed = udp::Server::echo(&c2.netns, c2.at(family, CLOSED))?;
        for (host, port) in [(x, OPEN), (x, CLOSED), (a, CLOSED)] {
            let to = c2.at(family, port);
            let before = open.received().len() + closed.received().len();
            finding.attack(format!("TCP of {} to {to}", host.name), connects(host, to)?);
            answered(host, 0, to)?;
            finding.attack(
                format!("UDP of {} to {to}", host.name),
                open.received().len() + closed.received().len() > before,
            );
        }
        for _ in 0..4 {
            finding.legitimate(format!("TCP, {family:?}"), connects(a, c2.at(family, OPEN))?);
        }
        finding.legitimate(format!("UDP, {family:?}"), answered(a, 0, c2.at(family, OPEN))?);
        finding.legitimate(format!("pod to pod, {family:?}"), connects(c1, c2.at(family, OPEN))?);
    }
    Ok(finding)
}

pub(super) fn vxlan(setting: Setting) -> Result<Finding> {
    through_first_node(setting, true)
}

pub(super) fn transit(setting: Setting) -> Result<Finding> {
    through_first_node(setting, false)
}

/// A LAN host, and a pod, wrap packets of a pod of the other node in the overlay's own form.
pub(super) fn injected(setting: Setting) -> Result<Finding> {
    let mut nodes = Nodes::new(setting, true)?;
    let ground = &nodes.ground;
    let (x, b, c1, c2) = (ground.x(), ground.b(), ground.c1(), ground.c2());
    let mut finding = Finding::default();
    // RFC 7348: flags, network identifier 1.
    let wrapped = |inner: Packet| [&[8, 0, 0, 0, 0, 0, 1, 0][..], &inner.frame()].concat();
    let (first, second) = ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    for family in Family::BOTH {
        let server = udp::Server::echo(&c1.netns, c1.at(family, CLOSED))?;
        let inner = Packet::new(c2.ip(family), c1.ip(family)).udp(5000, CLOSED, b"injected");
        let payload = wrapped(inner.macs(second, first));
        ground.send_from_lan(x, Packet::new(x.v4, b.v4).udp(5000, VXLAN, &payload))?;
        finding.attack(format!("{family:?}"), arrives(&server, b"injected"));
        ground.send_from_pod(c1, Packet::new(c1.v4, b.v4).udp(5000, VXLAN, &payload))?;
        finding.attack(format!("{family:?}, of a pod"), arrives(&server, b"injected"));
        let far = udp::Server::echo(&c2.netns, c2.at(family, CLOSED))?;
        let inner = Packet::new(c1.ip(family), c2.ip(family)).udp(5000, CLOSED, b"injected");
        let payload = wrapped(inner.macs(first, second));
        let node = &ground.lab.nodes()[1];
        ground.send_from_pod(c1, Packet::new(c1.v4, node.v4).udp(5000, VXLAN, &payload))?;
        finding.attack(format!("{family:?}, of a pod to the other node"), arrives(&far, b"injected"));
        drop(far);
        let between = udp::ask(&c2.netns, 0, c1.at(family, CLOSED), b"between", SECOND)?;
        finding.legitimate(format!("pod to pod, {family:?}"), between.succeeded());
    }
    // An IP-in-IP packet, with no tunnel here to take it.
    let inner = Packet::new(c2.v4, c1.v4).udp(5000, CLOSED, b"ipip").ip();
    let server = udp::Server::echo(&c1.netns, c1.at(Family::V4, CLOSED))?;
    ground.send_from_lan(x, Packet::new(x.v4, b.v4).raw(IpNumber::IPV4, &inner))?;
    finding.attack("IP in IP", arrives(&server, b"ipip"));
    drop(server);

    // Where no node is known, none is believed.
    nodes.ground.agent.reload(&whole(setting, ""))?;
    let ground = &nodes.ground;
    let (x, b, c1, c2) = (ground.x(), ground.b(), ground.c1(), ground.c2());
    for family in Family::BOTH {
        let server = udp::Server::echo(&c1.netns, c1.at(family, CLOSED))?;
        let inner = Packet::new(c2.ip(family), c1.ip(family)).udp(5000, CLOSED, b"unnamed");
        let payload = wrapped(inner.macs(second, first));
        ground.send_from_lan(x, Packet::new(x.v4, b.v4).udp(5000, VXLAN, &payload))?;
        finding.attack(format!("{family:?}, without known nodes"), arrives(&server, b"unnamed"));
    }
    Ok(finding)
}
