//! Sources that cannot be true, refused before connection tracking: a forged packet neither creates an entry nor changes one.
//!
//! `fib saddr . iif oif 0` is true where no route leads back to the source by the interface of the packet, for IPv4 and IPv6
//! alike, whatever the `rp_filter` sysctls say.

use super::parts::{Family, Networks, Renderer, among, list, quoted, select};
use crate::model::{Mode, RoutedPods, Tunnel};

const RAW: i32 = -300;
const ENTRY: &str = "prerouting-raw";
const SPOOFED: &str = "spoofed";
/// No route leads back to the source by this interface.
const NO_WAY_BACK: &str = "fib saddr . iif oif 0";
/// IPv4 addresses in IPv6 form (RFC 4291, 2.5.5.2) never appear on a link.
const MAPPED: &str = "::ffff:0.0.0.0/96";

impl Renderer<'_> {
    pub(super) fn sources(&mut self, families: &[(Family, Networks); 2]) {
        self.rules.base(ENTRY, "prerouting", RAW);
        let has_tunnels = !self.options.topology.tunnels.is_empty();
        for (family, of) in families.iter().filter(|(_, of)| has_tunnels || !of.pods.is_empty()) {
            let chain = family.of("sources");
            let number = if *family == Family::V4 { "ipv4" } else { "ipv6" };
            self.rules.rule(ENTRY, format!("meta nfproto {number} goto {chain}"));
            if of.pods.is_empty() {
                // The packet inside may be of the other family.
                self.tunnels(*family, of, &chain);
            } else {
                self.sources_of(*family, of, &chain);
            }
        }
        self.rules.chains.entry(SPOOFED.into()).or_default();
        self.log(SPOOFED);
        self.rules.counters.insert("spoofed");
        let verdict = match self.policy.mode {
            Mode::Enforce => "drop",
            Mode::Audit => "accept",
        };
        self.rules.rule(SPOOFED, format!("counter name spoofed {verdict}"));
    }

    fn sources_of(&mut self, family: Family, of: &Networks, chain: &str) {
        let options = self.options;
        let topology = &options.topology;
        let (protocol, of_pod) = (family.protocol(), family.of("pod-source"));
        let rules = &mut self.rules;
        let spoofed = |matches: &str| format!("{matches} goto {SPOOFED}");
        if family == Family::V6 {
            for side in ["saddr", "daddr"] {
                rules.rule(chain, spoofed(&format!("ip6 {side} {MAPPED}")));
            }
        }
        self.tunnels(family, of, chain);
        let rules = &mut self.rules;
        rules.rule(chain, spoofed(&format!("fib saddr type local {NO_WAY_BACK}")));
        // Routes to these pods lead to the gateway, and prove of an interface only that the pod is behind one of them.
        let prefixes: Vec<_> =
            topology.gateways.iter().flat_map(|gateway| select(&gateway.pods, family)).collect();
        for interface in topology.internal.iter().chain(&topology.tunnel_interfaces) {
            if !prefixes.is_empty() {
                let from = format!("iifname {} {protocol} saddr {}", quoted(interface), list(&prefixes));
                rules.rule(chain, format!("{from} accept"));
            }
        }
        // Before the nodes: a pod may forge the address of one.
        for interface in &topology.internal {
            // Duplicate address detection; the kernel forwards none of it.
            let unspecified = if family == Family::V6 { "ip6 saddr != :: " } else { "" };
            let from = format!("iifname {} {unspecified}{NO_WAY_BACK}", quoted(interface));
            rules.rule(chain, format!("{from} goto {SPOOFED}"));
        }
        if !topology.settled.is_empty() {
            // A pod may send its first packets before the rules name its interface.
            let new = family.of("new-source");
            rules.rule(chain, format!("jump {new}"));
            for interface in topology.settled.iter().chain(&topology.internal) {
                rules.rule(&*new, format!("iifname {} return", quoted(interface)));
            }
            let unspecified = if family == Family::V6 { "ip6 saddr != :: " } else { "" };
            rules.rule(new, spoofed(&format!("{unspecified}{NO_WAY_BACK}")));
        }
        // Before the pods: a node may have an address in their networks.
        let node = family.of("node");
        for matches in among(family, "saddr", "nodes", &of.nodes) {
            rules.rule(chain, format!("{matches} goto {node}"));
        }
        for matches in among(family, "saddr", "pods", &of.pods) {
            rules.rule(chain, format!("{matches} jump {of_pod}"));
        }
        rules.rule(&*of_pod, spoofed(NO_WAY_BACK));
        // A pod address without a route of its own leads where the default route leads: that proves nothing.
        for RoutedPods { interface, pods } in &topology.remote {
            let prefixes = select(pods, family);
            if !prefixes.is_empty() {
                let from = format!("iifname {} {protocol} saddr {}", quoted(interface), list(&prefixes));
                rules.rule(&*of_pod, format!("{from} accept"));
            }
        }
        for interface in &topology.external {
            rules.rule(&*of_pod, spoofed(&format!("iifname {}", quoted(interface))));
        }
        if !of.nodes.is_empty() {
            // A node may send through a tunnel with its LAN address: the outer packets are checked.
            for interface in &topology.tunnel_interfaces {
                rules.rule(&*node, format!("iifname {} accept", quoted(interface)));
            }
            // Towards the node itself, an address of another node by another way is not bridge's business.
            for matches in among(family, "daddr", "pods", &of.pods) {
                rules.rule(&*node, format!("{matches} {NO_WAY_BACK} goto {SPOOFED}"));
            }
        }
    }
    /// Refuses packets of tunnels from other hosts than nodes: the packet inside would be believed. Where no node is known, no host
    /// may send them.
    fn tunnels(&mut self, family: Family, of: &Networks, chain: &str) {
        let topology = &self.options.topology;
        if topology.tunnels.is_empty() {
            return;
        }
        let rules = &mut self.rules;
        let spoofed = |matches: &str| format!("{matches} goto {SPOOFED}");
        let (tunnel, from_node) = (family.of("tunnel"), family.of("tunnel-node"));
        for outer in &topology.tunnels {
            let outer = match outer {
                Tunnel::Udp(port) => format!("udp dport {port}"),
                Tunnel::Protocol(number) => format!("meta l4proto {number}"),
            };
            rules.rule(chain, format!("{outer} jump {tunnel}"));
        }
        for matches in among(family, "saddr", "nodes", &of.nodes) {
            rules.rule(&*tunnel, format!("{matches} goto {from_node}"));
        }
        rules.rule(&*tunnel, spoofed("fib daddr type local"));
        for matches in among(family, "daddr", "nodes", &of.nodes) {
            rules.rule(&*tunnel, spoofed(&matches));
        }
        if !of.nodes.is_empty() {
            for interface in &topology.tunnel_interfaces {
                rules.rule(&*from_node, format!("iifname {} return", quoted(interface)));
            }
            rules.rule(from_node, spoofed(NO_WAY_BACK));
        }
    }
}
