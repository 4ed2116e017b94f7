//! The routes of the kernel on a node, there and back, and whether the answers take the way of the connection.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use netlink_packet_route::{
    RouteNetlinkMessage,
    address::{AddressAttribute, AddressMessage, AddressScope},
};

use super::node::Live;
use crate::{
    explain::{Class, Explanation, Judge, NodeState as _, Question, Stage, StageOutcome, refusal},
    interfaces::{Observer, Selection, Snapshot},
    iptables::walk::NewSource,
    kernel::netlink::{Packet, Route, Way, interface_name},
};

/// A packet behind the rules of other programs, and its answer.
pub(super) struct Passed {
    /// The mark that it has as it is routed.
    pub(super) mark: u32,
    /// The mark of its answer there.
    pub(super) back: u32,
    /// The source that it gets.
    pub(super) source: Option<NewSource>,
    /// The rule that gives it.
    pub(super) rule: Option<String>,
}

/// The routes of a packet and of its answer; `None`: not known.
struct Ways {
    there: Way,
    back: Option<Way>,
    /// Index of the interface that the packet comes in by, 0 if the node sends it.
    input: u32,
}

/// Adds the routes that the kernel takes, and the ways that lead elsewhere.
pub(super) fn add(explanation: &mut Explanation, live: &Live<'_>, judge: &Judge<'_>, passed: &Passed) {
    let Question { source, destination, backend, .. } = explanation.question;
    let to = backend.map_or(destination, |(address, _)| address);
    let Some(ways) = add_routes(explanation, live, passed) else { return };
    let snapshot = Observer::open().and_then(|mut observer| observer.snapshot(&Selection::default()));
    let links = snapshot.map(|snapshot: Snapshot| snapshot.links).unwrap_or_default();
    let upper: BTreeMap<u32, u32> = links.iter().map(|(index, link)| (*index, link.upper)).collect();
    let both = [(to, Some(&ways.there)), (source, ways.back.as_ref())];
    let elsewhere = both.into_iter().find_map(|(to, way)| elsewhere(live, judge, &upper, to, way?));
    if let Some((outcome, seen)) = elsewhere {
        let word =
            if outcome == StageOutcome::Deny { "ROUTED ELSEWHERE" } else { "PERHAPS ROUTED ELSEWHERE" };
        explanation.summary += &format!("\n{word}: {seen}");
        let why = "a rule of routing (`ip rule`) or a route of this node; `bridge-agent doctor --only forwarding` looks for both";
        explanation.add(Stage::new("other way", outcome, seen, why));
    }
    if let Some((outcome, seen)) = unanswered(live, to, source, backend.is_some(), passed, &ways) {
        let word = if outcome == StageOutcome::Deny { "NO ANSWER" } else { "PERHAPS NO ANSWER" };
        explanation.summary += &format!("\n{word}: {seen}");
        let why = "only this node translates the answers back";
        explanation.add(Stage::new("answers", outcome, seen, why));
    }
}

fn add_routes(explanation: &mut Explanation, live: &Live<'_>, passed: &Passed) -> Option<Ways> {
    let Question { source, source_port, destination, destination_port, backend, protocol } =
        explanation.question;
    let input = live.input(source)?;
    let (to, port) = backend.unwrap_or((destination, destination_port));
    let mut route = Route::open().ok()?;
    let client_port = source_port.unwrap_or_default();
    let packet = |from, input: u32, (source_port, destination_port), mark| Packet {
        forwarded: (input != 0).then_some((from, input)),
        protocol: protocol.0,
        source_port,
        destination_port,
        mark,
    };
    let there = route.way(to, &packet(source, input, (client_port, port), passed.mark));
    let there = there.map_err(|error| refusal(&error)).and_then(|way| forwarded(source, input, way));
    let back = there.as_ref().ok().map(|way| {
        let input = if way.local { 0 } else { way.interface };
        let way = route.way(source, &packet(to, input, (port, client_port), passed.back));
        way.map_err(|error| refusal(&error)).and_then(|way| forwarded(to, input, way))
    });
    let mut add = |name: &str, to: IpAddr, word: &str, way: &Result<Way, String>| {
        let (outcome, seen, why) = match way {
            Ok(way) => (StageOutcome::Ok, way.show(), "as the kernel routes it (`ip route get`)"),
            Err(why) => {
                explanation.summary += &format!("\n{word} {to}: {why}");
                (StageOutcome::Deny, format!("none to {to}"), why.as_str())
            }
        };
        explanation.add(Stage::new(name, outcome, seen, why));
    };
    add("route", to, "NOT FORWARDED to", &there);
    if let Some(back) = &back {
        add("way back", source, "NO WAY BACK to", back);
    }
    Some(Ways { there: there.ok()?, back: back.and_then(Result::ok), input })
}

/// Returns where packets to an address go instead of to its interface.
fn elsewhere(
    live: &Live<'_>,
    judge: &Judge<'_>,
    upper: &BTreeMap<u32, u32>,
    to: IpAddr,
    way: &Way,
) -> Option<(StageOutcome, String)> {
    let leads_to = |index: u32| index == way.interface || upper.get(&index) == Some(&way.interface);
    let is_own = |role: &str| live.interfaces.iter().any(|one| one.role == role && leads_to(one.index));
    let leaves = || format!("packets to {to} leave by {}", way.show());
    let name = |index: u32| interface_name(index).unwrap_or_else(|| index.to_string());
    match (judge.class(to), live.hosted(to)) {
        _ if way.local => None,
        // Behind a gateway, the routes lead to that, and the network plugin delivers: only a way to the LAN is a wrong one.
        (Class::Pod, Some(pod)) if leads_to(pod) || (!is_own("external") && is_gateway(way, to)) => None,
        (Class::Pod, Some(pod)) => {
            Some((StageOutcome::Deny, format!("{}, and the pod is at {}", leaves(), name(pod))))
        }
        (Class::External, _) if !is_own("external") && live.lan_interface() != 0 => Some((
            StageOutcome::Unknown,
            format!("{}, which is no interface of bridge towards the LAN", leaves()),
        )),
        _ => None,
    }
}

/// Whether routes to a pod lead to this way without policy routing, too.
fn is_gateway(way: &Way, to: IpAddr) -> bool {
    let plain = Route::open().and_then(|mut route| route.way(to, &Packet::default()));
    plain.is_ok_and(|plain| plain.interface == way.interface && plain.via.is_some())
}

/// Returns why the answers do not come by this node, though it has translated the connection.
fn unanswered(
    live: &Live<'_>,
    to: IpAddr,
    source: IpAddr,
    is_translated: bool,
    passed: &Passed,
    ways: &Ways,
) -> Option<(StageOutcome, String)> {
    let is_outside = |address: IpAddr| !live.local.contains(&address) && live.hosted(address).is_none();
    if !is_outside(to) {
        return None;
    }
    if let Some(new) = passed.source {
        let address = new.address.filter(|address| is_outside(*address))?;
        let way = Route::open().and_then(|mut route| route.way(address, &Packet::default()));
        let on_link = way.is_ok_and(|way| way.via.is_none() && way.interface == ways.there.interface);
        let seen = format!("{to} answers {address}, which is no address of this node");
        return Some((if on_link { StageOutcome::Deny } else { StageOutcome::Unknown }, seen));
    }
    let back = ways.back.as_ref()?;
    let on_one_link = is_outside(source)
        && back.via.is_none()
        && ways.there.via.is_none()
        && ways.input == ways.there.interface
        && back.interface == ways.there.interface;
    (is_translated && passed.rule.is_none() && on_one_link).then(|| {
        let seen = format!("{to} is on the link of {source}, and answers it without this node");
        (StageOutcome::Deny, seen)
    })
}

/// Returns the address that packets to `to` get by a masquerade.
pub(super) fn masquerade(live: &Live<'_>, to: IpAddr) -> Option<IpAddr> {
    let way = Route::open().and_then(|mut route| route.way(to, &Packet::default())).ok()?;
    if to.is_ipv6() {
        return way.source;
    }
    let (all, hop) = (addresses(), way.via.unwrap_or(to));
    let of = || all.iter().filter(|one| one.interface == way.interface && one.net.addr().is_ipv4());
    let on_link = of().find(|one| one.net.contains(&hop));
    let chosen = on_link.or_else(|| of().next()).map(|one| one.net.addr());
    chosen.or_else(|| {
        let mut other =
            all.iter().map(|one| one.net.addr()).filter(|one| one.is_ipv4() && !one.is_loopback());
        other.next().or_else(|| live.local.iter().copied().find(IpAddr::is_ipv4))
    })
}

/// Returns the address that packets of a source get by a REDIRECT: the first of the interface that they come in by.
pub(super) fn redirected(live: &Live<'_>, source: IpAddr) -> Option<IpAddr> {
    let input = live.input(source)?;
    let of = |one: &Address| one.interface == input && one.net.addr().is_ipv4() == source.is_ipv4();
    addresses().iter().find(|one| of(one)).map(|one| one.net.addr())
}

/// An address of this node that other hosts can reach.
struct Address {
    interface: u32,
    net: IpNet,
}

/// Returns the addresses of this node in the order of the kernel, without those of one link.
fn addresses() -> Vec<Address> {
    let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
    let dumped = Route::open().and_then(|mut route| route.dump(request)).unwrap_or_default();
    let of = |message| {
        let RouteNetlinkMessage::NewAddress(address) = message else { return None };
        if address.header.scope != AddressScope::Universe {
            return None;
        }
        let find = |local: bool| {
            address.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Local(ip) if local => Some(*ip),
                AddressAttribute::Address(ip) if !local => Some(*ip),
                _ => None,
            })
        };
        let net = IpNet::new(find(true).or_else(|| find(false))?, address.header.prefix_len).ok()?;
        Some(Address { interface: address.header.index, net })
    };
    dumped.into_iter().filter_map(of).collect()
}

/// Returns the way of a packet that came in by an interface, if the node forwards it: for IPv6 the look-up of a route does not ask
/// for that.
fn forwarded(source: IpAddr, input: u32, way: Way) -> Result<Way, String> {
    if source.is_ipv4() || input == 0 || way.local {
        return Ok(way);
    }
    let is = |name: &str, value: &str| {
        let text = std::fs::read_to_string(format!("/proc/sys/net/ipv6/conf/{name}"));
        text.is_ok_and(|text| text.trim() == value)
    };
    // Linux 6.17 has it.
    let is_forced = interface_name(input).is_some_and(|name| is(&format!("{name}/force_forwarding"), "1"));
    if is("all/forwarding", "0") && !is_forced {
        return Err("forwarding is off (net.ipv6.conf.all.forwarding)".to_owned());
    }
    Ok(way)
}
