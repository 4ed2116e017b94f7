//! Rules of routing that lead packets of pods elsewhere, and routes that refuse them.

use std::{collections::BTreeSet, io, net::IpAddr};

use ipnet::IpNet;
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteType},
    rule::{RuleAction, RuleAttribute, RuleMessage},
};

use super::{context::Context, finding::Finding};
use crate::{kernel::netlink, model::Role};

/// Tables that packets come to without a rule of others.
const USUAL: [u32; 3] =
    [libc::RT_TABLE_LOCAL as u32, libc::RT_TABLE_MAIN as u32, libc::RT_TABLE_DEFAULT as u32];
/// The number that Calico writes its routes with, beside that of BIRD.
const CALICO: u8 = 80;

/// A route of any table.
struct Route {
    table: u32,
    to: IpNet,
    /// `blackhole`, `unreachable` or `prohibit`; `None`: it forwards.
    refuses: Option<&'static str>,
    /// Whether Calico or BIRD keeps it for a block of pods.
    is_of_block: bool,
    interfaces: Vec<u32>,
}

/// A rule of routing, as far as forwarded packets of pods can match it.
struct Rule {
    shown: String,
    target: Target,
    /// Destinations that it is about; `None`: all.
    to: Option<IpNet>,
    is_v4: bool,
    /// Whether a mark of netfilter decides.
    is_marked: bool,
    /// Routes with a prefix of this length or a shorter one are not used.
    suppressed: Option<u32>,
}

enum Target {
    Table(u32),
    Refuses,
}

pub(super) fn check(context: &Context<'_>, pods: &[IpNet], external: &[IpNet]) -> Vec<Finding> {
    const RULES: &str = "forwarding.policy-routing";
    const ROUTES: &str = "forwarding.refused-routes";
    let read = || -> io::Result<_> {
        let mut socket = netlink::Route::open()?;
        Ok((routes(&mut socket)?, rules(&mut socket, context, pods, external)?))
    };
    match read() {
        Ok((routes, rules)) => {
            vec![
                policy_routing(RULES, context, &routes, &rules, pods, external),
                refused(ROUTES, &routes, pods, external),
            ]
        }
        Err(error) => {
            let why = format!("rules and routes cannot be listed: {error}");
            vec![Finding::not_run(RULES, why.as_str()), Finding::not_run(ROUTES, why)]
        }
    }
}

fn policy_routing(
    check: &'static str,
    context: &Context<'_>,
    routes: &[Route],
    rules: &[Rule],
    pods: &[IpNet],
    external: &[IpNet],
) -> Finding {
    let usual = |net: &IpNet, role: fn(Role) -> bool| -> BTreeSet<u32> {
        let main = routes.iter().filter(|route| USUAL.contains(&route.table) && overlap(&route.to, net));
        let main =
            main.filter(|route| route.to.prefix_len() > 0).flat_map(|route| route.interfaces.iter().copied());
        let chosen =
            context.chosen.targets.iter().filter(|target| role(target.role)).map(|target| target.index);
        main.chain(chosen).collect()
    };
    let sides: Vec<(&IpNet, BTreeSet<u32>)> = pods
        .iter()
        .map(|net| (net, usual(net, |role| role != Role::External)))
        .chain(external.iter().map(|net| (net, usual(net, |role| role == Role::External))))
        .collect();
    let mut found: Vec<(bool, String)> = Vec::new();
    for rule in rules {
        let concerned = sides.iter().filter(|(net, _)| {
            net.addr().is_ipv4() == rule.is_v4 && rule.to.is_none_or(|to| overlap(&to, net))
        });
        for (net, usual) in concerned {
            match rule.target {
                Target::Refuses => {
                    found.push((rule.is_marked, format!("{} refuses packets to {net}", rule.shown)))
                }
                Target::Table(table) => {
                    let inside = routes.iter().filter(|route| {
                        route.table == table
                            && overlap(&route.to, net)
                            && rule.to.is_none_or(|to| overlap(&to, &route.to))
                            && rule.suppressed.is_none_or(|length| u32::from(route.to.prefix_len()) > length)
                    });
                    let wrong = inside.into_iter().find(|route| {
                        route.refuses.is_some() || !route.interfaces.iter().any(|one| usual.contains(one))
                    });
                    if let Some(route) = wrong {
                        let names: Vec<String> = route
                            .interfaces
                            .iter()
                            .map(|index| netlink::interface_name(*index).unwrap_or_else(|| index.to_string()))
                            .collect();
                        let way = match route.refuses {
                            Some(word) => format!("{word} {}", route.to),
                            None => format!("{} dev {}", route.to, names.join(", ")),
                        };
                        let text = format!(
                            "{} takes packets to {net} to the route {way} of table {table}",
                            rule.shown
                        );
                        found.push((rule.is_marked, text));
                    }
                }
            }
        }
    }
    let remedy = "packets of or to pods take another way than the routes of bridge: exclude networks.pods and networks.external by \
                  rules before it (`ip rule add to NETWORK lookup main priority N`), or remove it";
    match found.iter().min_by_key(|(is_marked, _)| *is_marked) {
        None => Finding::ok(
            check,
            format!("{} rules beside those of Linux, none leads packets of pods elsewhere", rules.len()),
        ),
        Some((true, seen)) => Finding::warn(check, format!("{seen}, where netfilter gives the mark"), remedy),
        Some((false, seen)) => Finding::fail(check, seen.as_str(), remedy),
    }
}

fn refused(check: &'static str, routes: &[Route], pods: &[IpNet], external: &[IpNet]) -> Finding {
    let usual = || routes.iter().filter(|route| USUAL.contains(&route.table));
    let is_single = |net: &IpNet| net.prefix_len() == net.max_prefix_len();
    // A block of pods: its own pods have longer routes.
    let is_block = |route: &Route| {
        let inside =
            |other: &Route| other.refuses.is_none() && other.to != route.to && route.to.contains(&other.to);
        !is_single(&route.to) && (route.is_of_block || usual().any(inside))
    };
    let of_pods = |route: &&Route| {
        let is_inside = |net: &IpNet| net.contains(&route.to) && (*net != route.to || is_single(net));
        pods.iter().any(is_inside) && !is_block(route)
    };
    let of_lan = |route: &&Route| external.iter().any(|net| net.contains(&route.to));
    let refusing: Vec<String> = usual()
        .filter(|route| route.refuses.is_some() && (of_pods(route) || of_lan(route)))
        .map(|route| format!("{} {}", route.refuses.unwrap_or_default(), route.to))
        .collect();
    if refusing.is_empty() {
        return Finding::ok(check, "no route refuses packets to a pod or a LAN host");
    }
    Finding::fail(
        check,
        refusing.join(", "),
        format!(
            "packets to these addresses are dropped: `ip route del {}`, or the program that adds it",
            refusing[0]
        ),
    )
}

fn overlap(a: &IpNet, b: &IpNet) -> bool {
    a.contains(b) || b.contains(a)
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some(IpAddr::V4(*v4)),
        RouteAddress::Inet6(v6) => Some(IpAddr::V6(*v6)),
        _ => None,
    }
}

fn any(is_v4: bool) -> IpNet {
    if is_v4 { IpNet::from(ipnet::Ipv4Net::default()) } else { IpNet::from(ipnet::Ipv6Net::default()) }
}

fn routes(socket: &mut netlink::Route) -> io::Result<Vec<Route>> {
    let mut found = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut request = RouteMessage::default();
        request.header.address_family = family;
        for message in socket.dump(RouteNetlinkMessage::GetRoute(request))? {
            if let RouteNetlinkMessage::NewRoute(route) = message {
                found.extend(route_of(&route, family == AddressFamily::Inet));
            }
        }
    }
    Ok(found)
}

fn route_of(route: &RouteMessage, is_v4: bool) -> Option<Route> {
    let refuses = match route.header.kind {
        RouteType::Unicast => None,
        RouteType::BlackHole => Some("blackhole"),
        RouteType::Unreachable => Some("unreachable"),
        RouteType::Prohibit => Some("prohibit"),
        _ => return None,
    };
    let length = route.header.destination_prefix_length;
    let is_of_block = matches!(route.header.protocol, RouteProtocol::Bird | RouteProtocol::Other(CALICO));
    let table = u32::from(route.header.table);
    let mut found = Route { table, to: any(is_v4), refuses, is_of_block, interfaces: Vec::new() };
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Table(table) => found.table = *table,
            RouteAttribute::Destination(to) => found.to = IpNet::new(ip(to)?, length).ok()?,
            RouteAttribute::Oif(index) => found.interfaces.push(*index),
            RouteAttribute::MultiPath(paths) => {
                found.interfaces.extend(paths.iter().map(|path| path.interface_index));
            }
            _ => {}
        }
    }
    Some(found)
}

fn rules(
    socket: &mut netlink::Route,
    context: &Context<'_>,
    pods: &[IpNet],
    external: &[IpNet],
) -> io::Result<Vec<Rule>> {
    let ours = |net: &IpNet| pods.iter().chain(external).any(|one| overlap(one, net));
    let is_chosen = |name: &str| context.chosen.targets.iter().any(|target| target.name == name);
    let mut found = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut request = RuleMessage::default();
        request.header.family = family;
        for message in socket.dump(RouteNetlinkMessage::GetRule(request))? {
            if let RouteNetlinkMessage::NewRule(rule) = message {
                found.extend(rule_of(&rule, family == AddressFamily::Inet, &ours, &is_chosen));
            }
        }
    }
    Ok(found)
}

/// Reads a rule; `None`: it is one of Linux, or forwarded packets between pods and the LAN do not match it.
fn rule_of(
    rule: &RuleMessage,
    is_v4: bool,
    ours: &dyn Fn(&IpNet) -> bool,
    is_chosen: &dyn Fn(&str) -> bool,
) -> Option<Rule> {
    let mut table = u32::from(rule.header.table);
    let (mut priority, mut from, mut to, mut suppressed) = (0, None, None, None);
    let (mut marked, mut words) = (false, String::new());
    for attribute in &rule.attributes {
        match attribute {
            RuleAttribute::Table(number) => table = *number,
            RuleAttribute::Priority(number) => priority = *number,
            RuleAttribute::Source(address) => from = IpNet::new(*address, rule.header.src_len).ok(),
            RuleAttribute::Destination(address) => to = IpNet::new(*address, rule.header.dst_len).ok(),
            RuleAttribute::FwMark(mark) => {
                marked |= *mark != 0;
                words += &format!(" fwmark {mark:#x}");
            }
            RuleAttribute::SuppressPrefixLen(length) => suppressed = (*length != u32::MAX).then_some(*length),
            RuleAttribute::Iifname(name) if !is_chosen(name) => return None,
            RuleAttribute::Iifname(name) => words += &format!(" iif {name}"),
            // Of sockets alone, or of a VRF.
            RuleAttribute::Oifname(_) | RuleAttribute::UidRange(_) | RuleAttribute::L3MDev(true) => {
                return None;
            }
            _ => {}
        }
    }
    if [from, to].iter().flatten().any(|net| !ours(net)) {
        return None;
    }
    let (target, action) = match rule.header.action {
        RuleAction::ToTable if USUAL.contains(&table) => return None,
        RuleAction::ToTable => (Target::Table(table), format!(" lookup {table}")),
        RuleAction::Blackhole => (Target::Refuses, " blackhole".to_owned()),
        RuleAction::Unreachable => (Target::Refuses, " unreachable".to_owned()),
        RuleAction::Prohibit => (Target::Refuses, " prohibit".to_owned()),
        _ => return None,
    };
    let end = |net: Option<IpNet>| net.map_or_else(|| "all".to_owned(), |net| net.to_string());
    let to_shown = to.map(|to| format!(" to {to}")).unwrap_or_default();
    let shown = format!("rule {priority} (from {}{to_shown}{words}{action})", end(from));
    Some(Rule { shown, target, to, is_v4, is_marked: marked, suppressed })
}
