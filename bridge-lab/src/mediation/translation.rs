//! Destinations that the node translates.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result};

use super::{
    CLOSED, Finding, Ground, OPEN, OUT, RULES, SECOND, SILENCE, Setting, answered, arrives, config, connects,
    nft,
};
use crate::lab::{Builder, Family, Lab, NodePort};
use crate::packet::Packet;
use crate::traffic::{tcp, udp};

const NODE_PORTS: &str = "nodePorts: {range: \"30000-32767\", allow: [30080]}\n";
const LISTED: u16 = 30080;
const UNLISTED: u16 = 30081;

fn services() -> Builder {
    let service = |port, pod_port| NodePort { port, pod: 0, pod_port };
    Lab::builder().node_port(service(LISTED, 8080)).node_port(service(UNLISTED, CLOSED))
}

/// A client of an allowed NodePort tries the others from the same source port.
pub(super) fn node_port(setting: Setting) -> Result<Finding> {
    let ground = Ground::new(setting, services(), &config(setting, "", "", &format!("{RULES}{NODE_PORTS}")))?;
    let (x, b, c1) = (ground.x(), ground.b(), ground.c1());
    let mut finding = Finding::default();
    let host_port = |table, node, pod| {
        format!(
            "table {table} ports {{\nchain pre {{\ntype nat hook prerouting priority dstnat\n\
             {table} daddr {node} meta l4proto {{ tcp, udp }} th dport 444 dnat to {pod}:{CLOSED}\n}}\n}}\n"
        )
    };
    let rules = host_port("ip", b.v4.to_string(), c1.v4.to_string())
        + &host_port("ip6", b.v6.to_string(), format!("[{}]", c1.v6));
    nft(&ground.lab, b, &rules)?;
    for (family, port) in Family::BOTH.into_iter().zip([50_001, 50_002]) {
        let _listed = udp::Server::echo(&c1.netns, c1.at(family, 8080))?;
        let unlisted = udp::Server::echo(&c1.netns, c1.at(family, CLOSED))?;
        let _tcp = tcp::Server::echo(&c1.netns, c1.at(family, 8080))?;
        let _closed = tcp::Server::echo(&c1.netns, c1.at(family, CLOSED))?;
        finding.legitimate(
            format!("UDP to the listed one, {family:?}"),
            answered(x, port, b.at(family, LISTED))?,
        );
        finding.legitimate(format!("TCP to the listed one, {family:?}"), connects(x, b.at(family, LISTED))?);
        for to in [b.at(family, UNLISTED), b.at(family, 444), c1.at(family, CLOSED)] {
            answered(x, port, to)?;
            finding.attack(format!("UDP to {to}"), !unlisted.received().is_empty());
            finding.attack(format!("TCP to {to}"), connects(x, to)?);
            // From the very port of an open connection to the listed one.
            let listed = tcp::Client::new(&x.netns).source_port(port + 2).connect(b.at(family, LISTED))?;
            let other = tcp::Client::new(&x.netns).source_port(port + 2).deadline(SECOND).connect(to)?;
            finding.legitimate(format!("a connection to the listed one, {family:?}"), listed.succeeded());
            finding.attack(format!("TCP to {to} from the same port"), other.succeeded());
        }
    }
    Ok(finding)
}

/// The node's link-local address has the same NodePorts.
pub(super) fn link_local(setting: Setting) -> Result<Finding> {
    let ground = Ground::new(setting, services(), &config(setting, "", "", &format!("{RULES}{NODE_PORTS}")))?;
    let (a, x, b, c1) = (ground.a(), ground.x(), ground.b(), ground.c1());
    let rules = format!(
        "table ip6 local {{\nchain pre {{\ntype nat hook prerouting priority -101\n\
         fib daddr type local meta l4proto {{ tcp, udp }} th dport {UNLISTED} dnat to [{}]:{CLOSED}\n}}\n}}\n",
        c1.v6
    );
    nft(&ground.lab, b, &rules)?;
    let text = b.netns.ip("-6 -oneline address show dev eth0 scope link")?;
    let address =
        text.split_whitespace().find(|word| word.starts_with("fe80")).context("a link-local address")?;
    let address: IpAddr = address.split('/').next().unwrap_or_default().parse()?;
    let server = udp::Server::echo(&c1.netns, c1.at(Family::V6, CLOSED))?;
    let mut finding = Finding::default();
    // The kernel forwards no link-local source: a client uses its global one.
    ground.send_from_lan(x, Packet::new(x.v6, address).udp(5000, UNLISTED, b"link-local"))?;
    finding.attack("UDP", arrives(&server, b"link-local"));
    let _tcp = tcp::Server::echo(&c1.netns, c1.at(Family::V6, 8080))?;
    finding.legitimate("the listed one by its address", connects(a, b.at(Family::V6, LISTED))?);
    Ok(finding)
}

/// Without the section, a NodePort leads to a pod like any other way.
pub(super) fn unlisted_node_port(setting: Setting) -> Result<Finding> {
    let service = |port, pod_port| NodePort { port, pod: 0, pod_port };
    let builder = Lab::builder().node_port(service(LISTED, OPEN)).node_port(service(UNLISTED, CLOSED));
    let ground = Ground::new(setting, builder, &config(setting, "", "", RULES))?;
    let (a, x, b, c1) = (ground.a(), ground.x(), ground.b(), ground.c1());
    let mut finding = Finding::default();
    for family in Family::BOTH {
        let open = udp::Server::echo(&c1.netns, c1.at(family, OPEN))?;
        let closed = udp::Server::echo(&c1.netns, c1.at(family, CLOSED))?;
        let _open = tcp::Server::echo(&c1.netns, c1.at(family, OPEN))?;
        let _closed = tcp::Server::echo(&c1.netns, c1.at(family, CLOSED))?;
        for (host, port) in [(x, LISTED), (x, UNLISTED), (a, UNLISTED)] {
            answered(host, 0, b.at(family, port))?;
            finding.attack(
                format!("TCP of {} to {port}, {family:?}", host.name),
                connects(host, b.at(family, port))?,
            );
        }
        let came = open.received().len() + closed.received().len();
        finding.attack(format!("UDP, {family:?}"), came > 0);
        finding.legitimate(format!("TCP, {family:?}"), connects(a, b.at(family, LISTED))?);
        finding.legitimate(format!("UDP, {family:?}"), answered(a, 0, b.at(family, LISTED))?);
    }
    Ok(finding)
}

/// Service addresses whose endpoint is a LAN host.
fn outbound(setting: Setting, builder: Builder) -> Result<Finding> {
    let ground = Ground::new(setting, builder, &config(setting, "", "", RULES))?;
    let (a, b, c1) = (ground.a(), ground.b(), ground.c1());
    let rules: String = [("ip", "10.96.0.10", a.v4.to_string()), ("ip6", "fd96::10", format!("[{}]", a.v6))]
        .map(|(table, service, host)| {
            let rule = |port, to| {
                format!("{table} daddr {service} meta l4proto {{ tcp, udp }} th dport {port} dnat to {host}:{to}\n")
            };
            format!(
                "table {table} services {{\nchain pre {{\ntype nat hook prerouting priority dstnat\n{}{}}}\n}}\n",
                rule(80, OUT),
                rule(81, CLOSED)
            )
        })
        .concat();
    nft(&ground.lab, b, &rules)?;
    let mut finding = Finding::default();
    for (family, service) in Family::BOTH.into_iter().zip(["10.96.0.10", "fd96::10"]) {
        let service: IpAddr = service.parse()?;
        if family == Family::V6 {
            b.netns.ip("-6 route add fd96::/64 dev lo table 99").ok();
        }
        let _open = tcp::Server::echo(&a.netns, a.at(family, OUT))?;
        let _closed = tcp::Server::echo(&a.netns, a.at(family, CLOSED))?;
        let _udp = udp::Server::echo(&a.netns, a.at(family, OUT))?;
        let closed = udp::Server::echo(&a.netns, a.at(family, CLOSED))?;
        finding.attack(format!("TCP, {family:?}"), connects(c1, SocketAddr::new(service, 81))?);
        answered(c1, 0, SocketAddr::new(service, 81))?;
        finding.attack(format!("UDP, {family:?}"), !closed.received().is_empty());
        finding.legitimate(format!("TCP, {family:?}"), connects(c1, SocketAddr::new(service, 80))?);
        finding.legitimate(format!("UDP, {family:?}"), answered(c1, 0, SocketAddr::new(service, 80))?);
    }
    Ok(finding)
}

pub(super) fn service_out(setting: Setting) -> Result<Finding> {
    outbound(setting, Lab::builder().conntrack())
}

pub(super) fn service_out_masqueraded(setting: Setting) -> Result<Finding> {
    outbound(setting, Lab::builder().masquerade())
}

/// hostPort, an address of a load balancer that no interface has, and a ClusterIP, to the same pod.
fn to_pod(setting: Setting, masquerade: bool) -> Result<Finding> {
    let ground = Ground::new(setting, Lab::builder().conntrack(), &config(setting, "", "", RULES))?;
    let (a, x, b, c1) = (ground.a(), ground.x(), ground.b(), ground.c1());
    let families = [
        (
            Family::V4,
            "ip",
            [b.v4.to_string(), "192.168.31.200".into(), "10.96.0.10".into()],
            c1.v4.to_string(),
        ),
        (
            Family::V6,
            "ip6",
            [b.v6.to_string(), "fd31::200".into(), "fd96::10".into()],
            format!("[{}]", c1.v6),
        ),
    ];
    let mut finding = Finding::default();
    for (family, table, addresses, pod) in families {
        let translate = |address: &String| {
            let rule = |port, to| {
                format!(
                    "{table} daddr {address} meta l4proto {{ tcp, udp }} th dport {port} dnat to {pod}:{to}\n"
                )
            };
            rule(443, OPEN) + &rule(444, CLOSED)
        };
        let rules: String = addresses.iter().map(translate).collect();
        let post = if masquerade {
            "chain post { type nat hook postrouting priority srcnat\n ct status dnat masquerade\n }\n"
        } else {
            ""
        };
        nft(
            &ground.lab,
            b,
            &format!(
                "table {table} services {{\nchain pre {{\ntype nat hook prerouting priority dstnat\n{rules}}}\n{post}}}\n"
            ),
        )?;
        let length = if family == Family::V4 { 32 } else { 128 };
        for host in [a, x] {
            for address in &addresses[1..] {
                host.netns.ip(&format!("route add {address}/{length} via {}", b.ip(family)))?;
            }
        }
        let _open = tcp::Server::echo(&c1.netns, c1.at(family, OPEN))?;
        let _closed = tcp::Server::echo(&c1.netns, c1.at(family, CLOSED))?;
        let open = udp::Server::echo(&c1.netns, c1.at(family, OPEN))?;
        let closed = udp::Server::echo(&c1.netns, c1.at(family, CLOSED))?;
        for address in &addresses {
            let address: IpAddr = address.parse()?;
            for (host, port) in [(x, 443), (x, 444), (a, 444)] {
                let to = SocketAddr::new(address, port);
                let before = open.received().len() + closed.received().len();
                finding.attack(format!("TCP of {} to {to}", host.name), connects(host, to)?);
                answered(host, 0, to)?;
                let after = open.received().len() + closed.received().len();
                finding.attack(format!("UDP of {} to {to}", host.name), after > before);
            }
            let to = SocketAddr::new(address, 443);
            finding.legitimate(format!("TCP to {to}"), connects(a, to)?);
            finding.legitimate(format!("UDP to {to}"), answered(a, 0, to)?);
        }
        std::thread::sleep(SILENCE);
    }
    Ok(finding)
}

pub(super) fn inbound(setting: Setting) -> Result<Finding> {
    to_pod(setting, false)
}

pub(super) fn inbound_masqueraded(setting: Setting) -> Result<Finding> {
    to_pod(setting, true)
}
