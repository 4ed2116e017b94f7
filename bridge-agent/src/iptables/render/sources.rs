//! Sources that cannot be true, refused in raw PREROUTING.
//!
//! Table raw comes before connection tracking: a forged packet neither creates an entry nor changes one. `rpfilter`
//! compares the interface of a packet with the route back to its source, for IPv4 and IPv6 alike, whatever the
//! `rp_filter` sysctls say.

use super::parts::{Networks, chain, each, jump, line, log, select};
use crate::firewall::Options;
use crate::iptables::ruleset::{Chain, Family, Line, Table, TableRules};
use crate::model::{Mode, Policy, RoutedPods, Tunnel};

const ENTRY: &str = "BRIDGE-PREROUTING";
const NODE: &str = "BRIDGE-NODE";
const TUNNEL: &str = "BRIDGE-TUNNEL";
const TUNNEL_NODE: &str = "BRIDGE-TUNNEL-NODE";
const SPOOFED: &str = "BRIDGE-SPOOFED";
/// IPv4 addresses in IPv6 form (RFC 4291, 2.5.5.2) never appear on a link.
const MAPPED: &str = "::ffff:0.0.0.0/96";

/// Returns the rules of table raw.
pub(super) fn table(policy: &Policy, options: &Options, family: Family, of: &Networks) -> TableRules {
    let spoofed = |matches: &str| line(matches, "bridge:spoofed", &format!("-g {SPOOFED}"));
    let topology = &options.topology;
    let mut entry = Vec::new();
    if family == Family::V6 {
        entry.extend(["-s", "-d"].map(|side| spoofed(&format!(" {side} {MAPPED}"))));
    }
    // Without a list of the nodes, any host may be the other end of a tunnel.
    let tunnels = if of.nodes.is_empty() { &[][..] } else { &topology.tunnels };
    entry.extend(tunnels.iter().map(|tunnel| {
        let outer = match tunnel {
            Tunnel::Udp(port) => format!(" -p udp -m udp --dport {port}"),
            Tunnel::Protocol(number) => format!(" -p {number}"),
        };
        line(&outer, "bridge:tunnel", &format!("-j {TUNNEL}"))
    }));
    entry.push(spoofed(" -m rpfilter --invert -m addrtype --src-type LOCAL"));
    // Routes to these pods lead to the gateway, and prove of an interface only that the pod is behind one of them.
    for name in topology.internal.iter().chain(&topology.tunnel_interfaces) {
        for prefix in topology.gateways.iter().flat_map(|gateway| select(&gateway.pods, family)) {
            entry.push(line(&format!(" -i {name} -s {prefix}"), "bridge:gateway-pods", "-j RETURN"));
        }
    }
    // Before the nodes: a pod may forge the address of one.
    entry.extend(topology.internal.iter().map(|name| spoofed(&format!(" -i {name} -m rpfilter --invert"))));
    // Before the pods: a node may have an address in their networks.
    entry.extend(each(&of.nodes, "-s", "bridge:node", NODE));
    entry.extend(of.pods.iter().map(|prefix| spoofed(&format!(" -s {prefix} -m rpfilter --invert"))));
    // A pod address without a route of its own leads where the default route leads: that proves nothing.
    for RoutedPods { interface, pods } in &topology.remote {
        for prefix in select(pods, family) {
            entry.push(line(&format!(" -i {interface} -s {prefix}"), "bridge:remote-pods", "-j RETURN"));
        }
    }
    for interface in &topology.external {
        entry.extend(of.pods.iter().map(|prefix| spoofed(&format!(" -i {interface} -s {prefix}"))));
    }

    let mut chains = vec![chain(ENTRY, entry)];
    // A node may send through a tunnel with its LAN address: the outer packets are checked.
    let inside = topology.tunnel_interfaces.iter();
    let inside: Vec<Line> =
        inside.map(|name| line(&format!(" -i {name}"), "bridge:tunnel", "-j RETURN")).collect();
    if !tunnels.is_empty() {
        // The packet inside would be believed: only nodes may send it.
        let mut lines = each(&of.nodes, "-s", "bridge:node", TUNNEL_NODE);
        lines.push(spoofed(" -m addrtype --dst-type LOCAL"));
        lines.extend(of.nodes.iter().map(|prefix| spoofed(&format!(" -d {prefix}"))));
        chains.push(chain(TUNNEL, lines));
        let believed = [inside.clone(), vec![spoofed(" -m rpfilter --invert")]].concat();
        chains.push(chain(TUNNEL_NODE, believed));
    }
    if !of.nodes.is_empty() {
        // Towards the node itself, an address of another node by another way is not bridge's business.
        let unbelieved = |prefix| spoofed(&format!(" -d {prefix} -m rpfilter --invert"));
        chains.push(chain(NODE, inside.into_iter().chain(of.pods.iter().map(unbelieved)).collect()));
    }
    chains.push(spoofed_chain(policy.mode, options));
    TableRules { table: Table::Raw, jumps: vec![jump("PREROUTING", ENTRY)], chains }
}

fn spoofed_chain(mode: Mode, options: &Options) -> Chain {
    let verdict: Line = match mode {
        Mode::Enforce => line("", "bridge:deny", "-j DROP"),
        Mode::Audit => line("", "bridge:audit", ""),
    };
    chain(SPOOFED, [log(mode, options), vec![verdict]].concat())
}
