//! Sources that cannot be true, refused in raw PREROUTING.
//!
//! Table raw comes before connection tracking: a forged packet neither creates an entry nor changes one. `rpfilter`
//! compares the interface of a packet with the route back to its source, for IPv4 and IPv6 alike, whatever the
//! `rp_filter` sysctls say.

use super::parts::{Networks, chain, each, jump, line, log, select};
use crate::firewall::Options;
use crate::iptables::ruleset::{Chain, Family, Line, Table, TableRules};
use crate::model::{Mode, Policy, RoutedPods, Topology, Tunnel};

const ENTRY: &str = "BRIDGE-PREROUTING";
const NEW: &str = "BRIDGE-NEW-INTERFACE";
const NODE: &str = "BRIDGE-NODE";
const TUNNEL: &str = "BRIDGE-TUNNEL";
const TUNNEL_NODE: &str = "BRIDGE-TUNNEL-NODE";
const SPOOFED: &str = "BRIDGE-SPOOFED";
/// IPv4 addresses in IPv6 form (RFC 4291, 2.5.5.2) never appear on a link.
const MAPPED: &str = "::ffff:0.0.0.0/96";

/// Returns the rules of table raw.
pub(super) fn table(policy: &Policy, options: &Options, family: Family, of: &Networks) -> TableRules {
    let topology = &options.topology;
    let (mut entry, mut others) = (Vec::new(), Vec::new());
    if !of.pods.is_empty() && family == Family::V6 {
        entry.extend(["-s", "-d"].map(|side| spoofed(&format!(" {side} {MAPPED}"))));
    }
    // Also without pods of this family: the packet inside may be of the other one.
    let (lines, chains) = tunnels(topology, of);
    entry.extend(lines);
    others.extend(chains);
    if !of.pods.is_empty() {
        let (lines, chains) = sources(topology, family, of);
        entry.extend(lines);
        others.extend(chains);
    }
    let mut chains = vec![chain(ENTRY, entry)];
    chains.extend(others);
    chains.push(spoofed_chain(policy.mode, options));
    TableRules { table: Table::Raw, jumps: vec![jump("PREROUTING", ENTRY)], chains }
}

fn spoofed(matches: &str) -> Line {
    line(matches, "bridge:spoofed", &format!("-g {SPOOFED}"))
}

/// Returns the lines that lead packets of tunnels to chains of their own, and these: such packets of other hosts than nodes are
/// refused, since the packet inside would be believed. Where no node is known, no host may send them.
fn tunnels(topology: &Topology, of: &Networks) -> (Vec<Line>, Vec<Chain>) {
    if topology.tunnels.is_empty() {
        return Default::default();
    }
    let entry = topology.tunnels.iter().map(|tunnel| {
        let outer = match tunnel {
            Tunnel::Udp(port) => format!(" -p udp -m udp --dport {port}"),
            Tunnel::Protocol(number) => format!(" -p {number}"),
        };
        line(&outer, "bridge:tunnel", &format!("-j {TUNNEL}"))
    });
    let mut lines = each(&of.nodes, "-s", "bridge:node", TUNNEL_NODE);
    lines.push(spoofed(" -m addrtype --dst-type LOCAL"));
    lines.extend(of.nodes.iter().map(|prefix| spoofed(&format!(" -d {prefix}"))));
    let mut chains = vec![chain(TUNNEL, lines)];
    if !of.nodes.is_empty() {
        let believed = [inside(topology), vec![spoofed(" -m rpfilter --invert")]].concat();
        chains.push(chain(TUNNEL_NODE, believed));
    }
    (entry.collect(), chains)
}

/// Returns lines that pass the packets of tunnel interfaces.
fn inside(topology: &Topology) -> Vec<Line> {
    let inside = topology.tunnel_interfaces.iter();
    inside.map(|name| line(&format!(" -i {name}"), "bridge:tunnel", "-j RETURN")).collect()
}

/// Returns the lines that refuse forged sources, and the chains that they lead to.
fn sources(topology: &Topology, family: Family, of: &Networks) -> (Vec<Line>, Vec<Chain>) {
    let (mut entry, mut chains) = (Vec::new(), Vec::new());
    entry.push(spoofed(" -m rpfilter --invert -m addrtype --src-type LOCAL"));
    // Routes to these pods lead to the gateway, and prove of an interface only that the pod is behind one of them.
    for name in topology.internal.iter().chain(&topology.tunnel_interfaces) {
        for prefix in topology.gateways.iter().flat_map(|gateway| select(&gateway.pods, family)) {
            entry.push(line(&format!(" -i {name} -s {prefix}"), "bridge:gateway-pods", "-j RETURN"));
        }
    }
    // Before the nodes: a pod may forge the address of one.
    entry.extend(topology.internal.iter().map(|name| spoofed(&format!(" -i {name} -m rpfilter --invert"))));
    if !topology.settled.is_empty() {
        // A pod may send its first packets before the rules name its interface.
        entry.push(line("", "bridge:new-interface", &format!("-j {NEW}")));
        let known = topology.settled.iter().chain(&topology.internal);
        let mut lines: Vec<Line> =
            known.map(|name| line(&format!(" -i {name}"), "bridge:known-interface", "-j RETURN")).collect();
        lines.push(spoofed(" -m rpfilter --invert"));
        chains.push(chain(NEW, lines));
    }
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
    if !of.nodes.is_empty() {
        // A node may send through a tunnel with its LAN address: the outer packets are checked.
        let mut lines = inside(topology);
        // Towards the node itself, an address of another node by another way is not bridge's business.
        lines.extend(of.pods.iter().map(|prefix| spoofed(&format!(" -d {prefix} -m rpfilter --invert"))));
        chains.push(chain(NODE, lines));
    }
    (entry, chains)
}

fn spoofed_chain(mode: Mode, options: &Options) -> Chain {
    let verdict: Line = match mode {
        Mode::Enforce => line("", "bridge:deny", "-j DROP"),
        Mode::Audit => line("", "bridge:audit", ""),
    };
    chain(SPOOFED, [log(mode, options), vec![verdict]].concat())
}
