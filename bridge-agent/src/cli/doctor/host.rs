//! Routes of a LAN host.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket},
    time::{Duration, Instant},
};

use ipnet::IpNet;
use rustix::thread::{CapabilitySet, capabilities};

use super::{context::Context, finding::Finding};
use crate::{
    config::Config,
    kernel::netlink,
    routes::{
        Comparison, DesiredRoute, NextHop, Setup, Target, Verdict, health::Ask, model::Hop, netlink::Netlink,
    },
};

/// The port of the discard protocol (RFC 863).
const DISCARD: u16 = 9;
/// States of a neighbour (linux/neighbour.h): it has answered lately, it is fixed, or needs no resolution.
const VERIFIED: u16 = 0x02 | 0x80 | 0x40;
/// It has answered some time ago.
const NUD_STALE: u16 = 0x04;
/// As [`NUD_STALE`], and a packet was sent to it.
const NUD_DELAY: u16 = 0x08;
/// Longest wait for answers of next hops.
const ANSWER: Duration = Duration::from_millis(1500);
const PAUSE: Duration = Duration::from_millis(20);

pub(super) fn check(context: &Context<'_>) -> Vec<Finding> {
    const CHECK: &str = "host.routes";
    let Some(config) = context.config.as_ref().filter(|config| config.routes.is_some()) else {
        return vec![Finding::not_run(CHECK, "no routes are configured")];
    };
    let state = context.global.state_directory().boot();
    let compared = Setup::offline(config, &state).and_then(|setup| Comparison::new(&setup));
    let comparison = match compared {
        Ok(comparison) => comparison,
        Err(error) => return vec![Finding::not_run(CHECK, error.to_string())],
    };
    let refusals: Vec<String> =
        comparison.plan.verdicts.iter().filter_map(Verdict::refusal).map(ToString::to_string).collect();
    let mut findings = Vec::new();
    if let Some(missing) = &comparison.missing {
        let remedy = "its routes stay unknown until the file is there";
        findings.push(Finding::warn("host.routes-file", missing.to_string(), remedy));
    }
    findings.push(match (refusals.first(), comparison.plan.operations.len()) {
        (Some(refusal), _) => {
            let (seen, remedy) = refusal.rsplit_once("; ").unwrap_or((refusal, "see `bridge-agent routes plan`"));
            Finding::fail(CHECK, format!("{} routes are refused: {seen}", refusals.len()), remedy)
        }
        (None, 0) => Finding::ok(CHECK, "every wanted route is in the kernel"),
        (None, due) => Finding::warn(
            CHECK,
            format!("{due} changes are due, see `bridge-agent routes plan`"),
            "LAN traffic to these pods takes another way: start the agent, or run `bridge-agent routes apply`",
        ),
    });
    findings.extend(next_hops(&comparison));
    findings.extend(way_back(context, config));
    findings
}

/// Looks for pod networks that this host has no route to: connections that pods open would stay without an answer.
fn way_back(context: &Context<'_>, config: &Config) -> Option<Finding> {
    const CHECK: &str = "host.way-back";
    if config.networks.pods.is_empty() {
        return None;
    }
    let overlaps = |net: &IpNet, to: &IpNet| net.contains(to) || to.contains(net);
    let routes = || context.snapshot.routes.iter().map(|route| route.to);
    let led_to = |net: &IpNet| routes().any(|to| to.prefix_len() > 0 && overlaps(net, &to));
    let pods = config.networks.pods.iter().map(|network| network.net());
    let missing: Vec<IpNet> = pods.filter(|net| !led_to(net)).collect();
    let Some(first) = missing.first() else {
        return Some(Finding::ok(CHECK, "each network of pods has a route of its own"));
    };
    let shown = missing.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let remedy = "connections that pods open to this host stay without an answer: add the network to `routes`, with its node as \
                  the next hop (docs/routes.md)";
    let by_default = routes().any(|to| to.prefix_len() == 0 && to.addr().is_ipv4() == first.addr().is_ipv4());
    Some(match by_default {
        true => Finding::warn(CHECK, format!("answers to {shown} leave by the default route"), remedy),
        false => Finding::fail(CHECK, format!("no route to {shown}"), remedy),
    })
}

/// Asks each next hop on the link for its link layer address.
fn next_hops(comparison: &Comparison) -> Option<Finding> {
    const CHECK: &str = "host.next-hops";
    let of_route = |route: &DesiredRoute| match &route.target {
        Target::Forward { via, backup } => via.iter().chain(backup).cloned().collect(),
        Target::Blackhole => Vec::new(),
    };
    let all = comparison.merged.routes.iter().flat_map(|route| of_route(route));
    let mut ways = netlink::Route::open().ok()?;
    // One that is not on-link is a finding of its own.
    let hops: BTreeSet<Hop> = all.filter_map(|hop| on_link(&hop, comparison, &mut ways)).collect();
    if hops.is_empty() {
        return None;
    }
    let mut netlink = Netlink::open().ok()?;
    let known: BTreeMap<Hop, u16> = netlink.neighbours().ok()?.into_iter().collect();
    let may_ask = capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::NET_ADMIN));
    if may_ask {
        let ask = |hop: &Hop| if known.contains_key(hop) { Ask::Verify } else { Ask::Resolve };
        let asked: Vec<(Hop, Ask)> = hops.iter().map(|hop| (*hop, ask(hop))).collect();
        netlink.ask_neighbours(&asked).ok()?;
    } else {
        hops.iter().for_each(send);
    }
    let deadline = Instant::now() + ANSWER;
    loop {
        let now: BTreeMap<Hop, u16> = netlink.neighbours().ok()?.into_iter().collect();
        let good = if may_ask { VERIFIED } else { VERIFIED | NUD_STALE | NUD_DELAY };
        let answers = |hop: &Hop| now.get(hop).is_some_and(|state| state & good != 0);
        let silent: Vec<String> =
            hops.iter().filter(|hop| !answers(hop)).map(|(address, _)| address.to_string()).collect();
        if silent.is_empty() {
            let seen = format!("{} next hops answer ARP or neighbour discovery", hops.len());
            return Some(Finding::ok(CHECK, seen));
        }
        if Instant::now() > deadline {
            return Some(Finding::fail(
                CHECK,
                format!("no answer to ARP or neighbour discovery from {}", silent.join(", ")),
                "packets to these pods are lost: check that the node runs, and that it is on the same link",
            ));
        }
        std::thread::sleep(PAUSE);
    }
}

/// Returns a next hop with the index of its interface; `None`: it is not on-link.
fn on_link(hop: &NextHop, comparison: &Comparison, ways: &mut netlink::Route) -> Option<Hop> {
    let index = match &hop.dev {
        Some(dev) => {
            *comparison.observed.links.iter().find(|(_, link)| link.name == *dev).map(|(index, _)| index)?
        }
        None => {
            ways.way(hop.via, &netlink::Packet::default())
                .ok()
                .filter(|way| way.via.is_none() && !way.local)?
                .interface
        }
    };
    Some((hop.via, index))
}

/// Sends a datagram, so that the kernel resolves the address: without privileges, the only way to make it ask.
fn send((address, index): &Hop) {
    let to: SocketAddr = match address {
        IpAddr::V4(v4) => (*v4, DISCARD).into(),
        IpAddr::V6(v6) => SocketAddrV6::new(*v6, DISCARD, 0, *index).into(),
    };
    let local: SocketAddr =
        if address.is_ipv4() { (Ipv4Addr::UNSPECIFIED, 0).into() } else { (Ipv6Addr::UNSPECIFIED, 0).into() };
    // A host that cannot send has a finding of its own.
    drop(UdpSocket::bind(local).and_then(|socket| socket.send_to(b"", to)));
}
