//! Settings and rules that drop or change forwarded packets.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    link::{LinkAttribute, LinkMessage},
    route::{RouteAddress, RouteAttribute, RouteMessage},
};

use super::{
    context::{Context, read},
    finding::Finding,
    netfilter::{self, Ruleset},
    routing,
};
use crate::{config::Config, interfaces::Route, kernel::netlink, model::Role};

/// Share of the conntrack table from which on it is nearly full, in percent.
const NEARLY_FULL: u64 = 80;
/// Share from which on new connections are at risk, in percent.
const FULL: u64 = 95;

pub(super) fn check(context: &Context<'_>) -> Vec<Finding> {
    let Some(config) = context.node() else {
        return vec![Finding::not_run(
            "forwarding",
            "this is no node: a LAN host forwards nothing for bridge",
        )];
    };
    let nets = |list: &[crate::config::Network]| list.iter().map(|network| network.net()).collect::<Vec<_>>();
    let (pods, external) = (nets(&config.networks.pods), nets(&config.networks.external));
    let ruleset = Ruleset::read();
    let mut findings = vec![
        ip_forward(context, &pods, &external),
        rp_filter(context, &external),
        drops(&ruleset, &pods),
        masquerade(&ruleset, &pods, &external),
        bridge_netfilter(context),
        mtu(context),
        conntrack(),
        networks(context, &pods, &external),
        overlap(context, &pods),
        nodes(config, &pods, &external),
    ];
    findings.extend(routing::check(context, &pods, &external));
    findings
}

fn ip_forward(context: &Context<'_>, pods: &[IpNet], external: &[IpNet]) -> Finding {
    const CHECK: &str = "forwarding.ip-forward";
    let v6 = |net: &&IpNet| net.addr().is_ipv6();
    let all = || pods.iter().chain(external);
    let families = [
        ("net.ipv4.ip_forward", "/proc/sys/net/ipv4/ip_forward", all().any(|net| net.addr().is_ipv4())),
        ("net.ipv6.conf.all.forwarding", "/proc/sys/net/ipv6/conf/all/forwarding", all().any(|net| v6(&net))),
    ];
    let wanted: Vec<_> = families.into_iter().filter(|(.., wanted)| *wanted).collect();
    let is_off = |path: &str| read(path).is_none_or(|value| value == "0");
    let mut off: Vec<String> =
        wanted.iter().filter(|(_, path, _)| is_off(path)).map(|(name, ..)| (*name).to_owned()).collect();
    // Only IPv4 asks the interface that a packet comes in by.
    if off.is_empty() && wanted.iter().any(|(name, ..)| name.contains("ipv4")) {
        let names: BTreeSet<&str> =
            context.chosen.targets.iter().map(|target| target.name.as_str()).collect();
        let of =
            names.into_iter().filter(|name| is_off(&format!("/proc/sys/net/ipv4/conf/{name}/forwarding")));
        // `/` stands for a dot of the name.
        off.extend(of.map(|name| format!("net.ipv4.conf.{}.forwarding", name.replace('.', "/"))));
    }
    if off.is_empty() {
        return Finding::ok(
            CHECK,
            wanted.iter().map(|(name, ..)| format!("{name} is on")).collect::<Vec<_>>().join(", "),
        );
    }
    let set: Vec<_> = off.iter().map(|name| format!("{name}=1")).collect();
    Finding::fail(
        CHECK,
        format!("off: {}", off.join(", ")),
        format!("the node drops packets that are not its own: sysctl -w {}", set.join(" ")),
    )
}

/// Routes to a network with the longest prefix: those that an answer may take.
fn best(routes: &[Route], to: IpNet) -> Vec<&Route> {
    let covering = || routes.iter().filter(|route| route.to.contains(&to));
    let longest = covering().map(|route| route.to.prefix_len()).max();
    covering().filter(|route| Some(route.to.prefix_len()) == longest).collect()
}

fn rp_filter(context: &Context<'_>, external: &[IpNet]) -> Finding {
    const CHECK: &str = "forwarding.rp-filter";
    let value = |name: &str| {
        let path = format!("/proc/sys/net/ipv4/conf/{name}/rp_filter");
        read(&path).and_then(|value| value.parse::<u8>().ok()).unwrap_or(0)
    };
    let named = context.chosen.targets.iter().filter(|target| target.role == Role::External);
    let named: Vec<u32> = named.map(|target| target.index).collect();
    let mut lossy = BTreeMap::new();
    for net in external.iter().filter(|net| net.addr().is_ipv4()) {
        let routes = best(&context.snapshot.routes, *net);
        let hops: Vec<u32> =
            routes.iter().flat_map(|route| route.hops.iter().map(|(index, _)| *index)).collect();
        let arrives = named.iter().chain(&hops);
        for index in arrives {
            let Some(link) = context.snapshot.links.get(index) else { continue };
            let strict = value("all").max(value(&link.name)) == 1;
            // Of several routes, the kernel compares with one.
            if strict && (routes.len() > 1 || !hops.contains(index)) {
                lossy.insert(link.name.clone(), *net);
            }
        }
    }
    match lossy.iter().next() {
        None => Finding::ok(CHECK, "no interface towards the LAN is strict where answers take another one"),
        Some((name, net)) => Finding::fail(
            CHECK,
            format!("rp_filter is strict on {name}, and answers to {net} leave by another interface"),
            format!(
                "packets of {net} that arrive on {name} are dropped: sysctl -w net.ipv4.conf.all.rp_filter=2 \
                 net.ipv4.conf.{name}.rp_filter=2"
            ),
        ),
    }
}

fn drops(ruleset: &Result<Ruleset, String>, pods: &[IpNet]) -> Finding {
    const CHECK: &str = "forwarding.policy";
    let mut drops = netfilter::legacy_drops();
    match ruleset {
        Ok(ruleset) => drops.extend(ruleset.drops(pods)),
        Err(reason) if drops.is_empty() => return Finding::not_run(CHECK, reason),
        Err(_) => {}
    }
    let harmful = drops.iter().filter(|drop| !drop.leads_to_bridge);
    let Some(worst) = harmful.min_by_key(|drop| drop.accepts) else {
        return Finding::ok(CHECK, "no chain of another program drops forwarded packets by default");
    };
    let seen = format!("{}: {}", worst.place, worst.how);
    let remedy = "packets that bridge allows are dropped there: accept packets from and to the pod networks in that chain \
                  (firewalld: a policy between zones; ufw: `ufw route allow`; docker: the DOCKER-USER chain), or add \
                  iptables to enforcement.engines";
    if worst.accepts {
        return Finding::warn(CHECK, format!("{seen}, after rules that accept packets of pods"), remedy);
    }
    Finding::fail(CHECK, seen, remedy)
}

fn masquerade(ruleset: &Result<Ruleset, String>, pods: &[IpNet], external: &[IpNet]) -> Finding {
    const CHECK: &str = "forwarding.masquerade";
    match ruleset {
        Err(reason) => Finding::not_run(CHECK, reason),
        Ok(ruleset) => match ruleset.masquerades(pods, external).first() {
            None => Finding::ok(CHECK, "no rule translates the source of packets from pods to LAN hosts"),
            Some(place) => Finding::warn(
                CHECK,
                format!("{place} masquerades packets from pods to LAN hosts"),
                "LAN hosts see the node's address instead of the pod's: exclude networks.external (Calico: natOutgoing with \
                 an IP pool for the LAN; ip-masq-agent: nonMasqueradeCIDRs; Cilium: ipv4NativeRoutingCIDR)",
            ),
        },
    }
}

fn bridge_netfilter(context: &Context<'_>) -> Finding {
    const CHECK: &str = "forwarding.br-netfilter";
    let bridged = context.chosen.targets.iter().any(|target| target.role == Role::Port);
    match (read("/proc/sys/net/bridge/bridge-nf-call-iptables").as_deref(), bridged) {
        (None, _) => Finding::ok(CHECK, "br_netfilter is not loaded"),
        (Some("0"), true) => Finding::warn(
            CHECK,
            "net.bridge.bridge-nf-call-iptables is 0, and pods are at ports of a bridge",
            "iptables does not see packets between pods of this node: sysctl -w net.bridge.bridge-nf-call-iptables=1",
        ),
        (Some(value), _) => Finding::ok(CHECK, format!("net.bridge.bridge-nf-call-iptables is {value}")),
    }
}

/// MTUs by index of the interface.
fn mtus() -> std::io::Result<BTreeMap<u32, u32>> {
    let messages = netlink::Route::open()?.dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
    let of = |message| match message {
        RouteNetlinkMessage::NewLink(link) => {
            let mtu = link.attributes.iter().find_map(|attribute| match attribute {
                LinkAttribute::Mtu(mtu) => Some(*mtu),
                _ => None,
            })?;
            Some((link.header.index, mtu))
        }
        _ => None,
    };
    Ok(messages.into_iter().filter_map(of).collect())
}

fn mtu(context: &Context<'_>) -> Finding {
    const CHECK: &str = "forwarding.mtu";
    let mtus = match mtus() {
        Ok(mtus) => mtus,
        Err(error) => return Finding::not_run(CHECK, format!("links cannot be listed: {error}")),
    };
    let side = |external: bool| {
        let targets =
            context.chosen.targets.iter().filter(move |target| (target.role == Role::External) == external);
        targets.filter_map(|target| Some((*mtus.get(&target.index)?, target.name.clone())))
    };
    match (side(true).min(), side(false).max()) {
        (Some((lan, lan_name)), Some((pod, pod_name))) if lan < pod => Finding::warn(
            CHECK,
            format!("{lan_name} has MTU {lan}, and {pod_name} towards a pod {pod}"),
            format!(
                "large packets of pods depend on ICMP errors: give pods an MTU of {lan} in the configuration of the CNI"
            ),
        ),
        (Some((lan, _)), Some((pod, _))) => {
            Finding::ok(CHECK, format!("{lan} towards the LAN, {pod} towards pods"))
        }
        _ => Finding::not_run(CHECK, "there is no interface towards the LAN, or none towards pods"),
    }
}

fn conntrack() -> Finding {
    const CHECK: &str = "forwarding.conntrack";
    let number = |name: &str| read(&format!("/proc/sys/net/netfilter/{name}"))?.parse::<u64>().ok();
    let (Some(count), Some(max)) = (number("nf_conntrack_count"), number("nf_conntrack_max")) else {
        return Finding::ok(CHECK, "connection tracking is not loaded");
    };
    let seen = format!("{count} of {max} entries");
    let remedy = format!(
        "a full table drops new connections: sysctl -w net.netfilter.nf_conntrack_max={}",
        max.max(1).saturating_mul(2)
    );
    // 0 is no limit.
    match (count * 100).checked_div(max) {
        Some(share) if share >= FULL => Finding::fail(CHECK, seen, remedy),
        Some(share) if share >= NEARLY_FULL => Finding::warn(CHECK, seen, remedy),
        _ => Finding::ok(CHECK, seen),
    }
}

/// Looks for a network at the LAN that lies among the addresses of pods, or around them.
fn overlap(context: &Context<'_>, pods: &[IpNet]) -> Finding {
    const CHECK: &str = "forwarding.overlap";
    let is_lan = |index: &u32| {
        let mut external = context.chosen.targets.iter().filter(|target| target.role == Role::External);
        external.any(|target| target.index == *index)
    };
    let overlaps = |route: &&Route| {
        let covers = |net: &IpNet| net.contains(&route.to) || route.to.contains(net);
        // A gateway leads to pods of other nodes; the default route to everything.
        let on_link = route.hops.iter().any(|(index, gateway)| !gateway && is_lan(index));
        on_link && route.to.prefix_len() > 0 && pods.iter().any(covers)
    };
    match context.snapshot.routes.iter().find(overlaps) {
        None => Finding::ok(CHECK, "no network of the LAN overlaps networks.pods"),
        Some(route) => Finding::fail(
            CHECK,
            format!("{} is a network of the LAN and overlaps networks.pods", route.to),
            "packets to these pods go to the LAN: give the pods another network, or correct networks.pods",
        ),
    }
}

/// Looks for nodes that `networks.external` holds and `networks.nodes` does not: gateways towards pods. The cluster names its nodes
/// itself, where it is followed.
fn nodes(config: &Config, pods: &[IpNet], external: &[IpNet]) -> Finding {
    const CHECK: &str = "forwarding.nodes";
    let gateways = match gateways(pods) {
        Ok(gateways) => gateways,
        Err(error) => return Finding::not_run(CHECK, format!("routes cannot be listed: {error}")),
    };
    if config.kubernetes.is_some() {
        return Finding::ok(CHECK, "the cluster names its nodes");
    }
    let named = config.policy().nodes;
    let holds =
        |networks: &[IpNet], address: &IpAddr| networks.iter().any(|network| network.contains(address));
    let missing: Vec<String> = gateways
        .iter()
        .filter(|gateway| holds(external, gateway) && !holds(&named, gateway))
        .map(ToString::to_string)
        .collect();
    if missing.is_empty() {
        return Finding::ok(
            CHECK,
            format!("{} gateways towards pods, none of them taken for a LAN host", gateways.len()),
        );
    }
    let missing = missing.join(", ");
    Finding::fail(
        CHECK,
        format!("{missing}: a gateway towards pods that is in networks.external and not in networks.nodes"),
        format!(
            "the node is judged as a LAN host, and pods cannot talk to it: add {missing} to networks.nodes"
        ),
    )
}

/// Gateways of the routes to pods of other nodes.
fn gateways(pods: &[IpNet]) -> std::io::Result<BTreeSet<IpAddr>> {
    let mut found = BTreeSet::new();
    let mut socket = netlink::Route::open()?;
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut request = RouteMessage::default();
        request.header.address_family = family;
        for message in socket.dump(RouteNetlinkMessage::GetRoute(request))? {
            let RouteNetlinkMessage::NewRoute(route) = message else { continue };
            let of = |address: &RouteAddress| match address {
                RouteAddress::Inet(v4) => Some(IpAddr::V4(*v4)),
                RouteAddress::Inet6(v6) => Some(IpAddr::V6(*v6)),
                _ => None,
            };
            let to = route.attributes.iter().find_map(|attribute| match attribute {
                RouteAttribute::Destination(address) => {
                    IpNet::new(of(address)?, route.header.destination_prefix_length).ok()
                }
                _ => None,
            });
            if !to.is_some_and(|to| pods.iter().any(|net| net.contains(&to))) {
                continue;
            }
            let gateway = |attribute: &RouteAttribute| match attribute {
                RouteAttribute::Gateway(address) => of(address),
                _ => None,
            };
            for attribute in &route.attributes {
                found.extend(gateway(attribute));
                if let RouteAttribute::MultiPath(paths) = attribute {
                    found.extend(paths.iter().flat_map(|path| &path.attributes).filter_map(gateway));
                }
            }
        }
    }
    Ok(found)
}

fn networks(context: &Context<'_>, pods: &[IpNet], external: &[IpNet]) -> Finding {
    const CHECK: &str = "forwarding.networks";
    let own =
        |net: &&IpNet| context.snapshot.addresses.iter().find(|address| net.contains(*address)).copied();
    // A CNI's bridge has an address of the pods' network; an address of a LAN card there is a mistake.
    let towards_lan: Vec<IpAddr> = pods.iter().filter_map(|net| own(&net)).collect();
    let overlap = external.iter().find(|net| towards_lan.iter().any(|address| net.contains(address)));
    if let Some(net) = overlap {
        return Finding::fail(
            CHECK,
            format!("{net} of networks.external holds an address of this node in networks.pods"),
            "LAN hosts and pods cannot share a network: correct networks.pods or networks.external",
        );
    }
    let unreached: Vec<String> = external
        .iter()
        .filter(|net| best(&context.snapshot.routes, **net).is_empty())
        .map(ToString::to_string)
        .collect();
    if unreached.is_empty() {
        return Finding::ok(CHECK, format!("{} external networks have a route", external.len()));
    }
    Finding::fail(
        CHECK,
        format!("no route to {}", unreached.join(", ")),
        "packets of pods to these LAN hosts are dropped: add a route (`ip route add`), or correct networks.external",
    )
}
