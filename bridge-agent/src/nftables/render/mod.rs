//! Renders a policy as one table of family inet; pure.
//!
//! ```text
//! prerouting, raw         -> sources4, sources6    sources that cannot be true            -> spoofed
//! prerouting, mangle      -> nodeport-range        LAN host to a NodePort of this node: mark, before DNAT
//! forward, before filter     replies and related packets: accept, the rest               -> scope
//!   scope                    marked as NodePort                                          -> nodeport-judge
//!                            destination is a pod                                        -> to-pod4, to-pod6
//!                            destination is a LAN host                                   -> to-lan4, to-lan6
//!   to-pod                   from a node or a pod: accept; from a LAN host               -> in4, in6
//!   to-lan                   from a pod                                                  -> out4, out6
//!   in, out                  packets that open no flow, then the maps of denies and of allows, then -> deny
//! input, before filter       marked as NodePort                                          -> nodeport-judge
//! ```
//!
//! The forward hook comes after DNAT and before SNAT: a packet has the real peer as its source and the final destination,
//! whichever Service, hostPort or masquerade it goes through. So translation exempts nothing.
//!
//! `accept` ends the base chain of bridge and no other: a packet that bridge allows still has to pass the chains of
//! others at the same hook. bridge only restricts.

mod judge;
mod node_ports;
mod parts;
mod shape;
mod sources;

pub(super) use self::judge::count;
use self::parts::{
    DENY, FILTER, FORWARD, Family, Networks, REJECTS, Renderer, SCOPE, among, joined, list, quoted, select,
    takes_a_set, text,
};
use super::ruleset::{Collection, Element, Ruleset};
use crate::config::Scope;
pub use crate::firewall::Options;
use crate::model::{Direction, Mode, OnDeny, Policy, RoutedPods};

/// Returns the rules that enforce `policy`; empty if the policy has nothing to judge.
#[must_use]
pub fn ruleset(policy: &Policy, options: &Options) -> Ruleset {
    let mut renderer = Renderer { policy, options, rules: Ruleset::default() };
    let families = Family::ALL.map(|family| (family, Networks::of(policy, family)));
    let strict = options.scope == Scope::Strict;
    let has_pods = families.iter().any(|(_, of)| !of.pods.is_empty());
    let node_ports =
        policy.node_ports.as_ref().filter(|_| families.iter().any(|(_, of)| !of.external.is_empty()));
    if !has_pods && node_ports.is_none() && !strict {
        return renderer.rules;
    }
    for (family, of) in &families {
        renderer.networks(*family, of);
    }
    if has_pods {
        renderer.sources(&families);
    }
    if let Some(node_ports) = node_ports {
        renderer.node_ports(node_ports, &families);
    }
    renderer.forward(has_pods);
    renderer.scope(&families, strict);
    for (family, of) in families.iter().filter(|(_, of)| !of.pods.is_empty()) {
        renderer.towards_pod(*family, of, strict);
        if !of.external.is_empty() {
            renderer.towards_lan(*family, of, strict);
            for direction in [Direction::Inbound, Direction::Outbound] {
                renderer.judge(*family, direction);
            }
        }
    }
    renderer.deny();
    renderer.rules
}

impl Renderer<'_> {
    fn networks(&mut self, family: Family, of: &Networks) {
        let sets = [("pods", &of.pods), ("external", &of.external), ("nodes", &of.nodes)];
        for (name, prefixes) in sets.into_iter().filter(|(_, prefixes)| takes_a_set(prefixes)) {
            let elements = prefixes.iter().map(|prefix| (text(prefix), Element::default())).collect();
            let key = format!("{} saddr", family.protocol());
            self.rules
                .sets
                .insert(family.of(name), Collection { key, exact: false, counts: false, elements });
        }
    }

    fn forward(&mut self, has_pods: bool) {
        self.rules.base(FORWARD, "forward", FILTER);
        self.opening(FORWARD, SCOPE);
        // The pod's own node sees the address of this one: the real peer is judged here, packet by packet.
        for remote in self.options.topology.remote.iter().filter(|_| has_pods) {
            let masqueraded =
                format!("oifname {} ct status snat ct direction original", quoted(&remote.interface));
            self.rules.rule(FORWARD, format!("{masqueraded} goto {SCOPE}"));
        }
        self.rules.rule(FORWARD, "ct state established,related accept");
        self.rules.rule(FORWARD, format!("goto {SCOPE}"));
    }

    fn scope(&mut self, families: &[(Family, Networks); 2], strict: bool) {
        self.rules.chains.entry(SCOPE.into()).or_default();
        if self.policy.node_ports.is_some() && self.rules.chains.contains_key(node_ports::JUDGE) {
            self.judged_node_ports(SCOPE);
        }
        for (family, of) in families.iter().filter(|(_, of)| !of.pods.is_empty()) {
            let f = *family;
            for (name, prefixes, to) in [("pods", &of.pods, "to-pod"), ("external", &of.external, "to-lan")] {
                for matches in among(f, "daddr", name, prefixes) {
                    self.rules.rule(SCOPE, format!("{matches} goto {}", f.of(to)));
                }
            }
        }
        if strict {
            self.deny_for(SCOPE, "", "strict");
        }
    }

    /// Lets a packet that is none of bridge's business go.
    fn leave(&mut self, chain: &str, matches: &str, strict: bool) {
        if strict {
            self.deny_for(chain, matches, "strict");
        } else {
            self.rules.rule(chain, joined(matches, "accept"));
        }
    }

    fn pass_nodes(&mut self, chain: &str, family: Family, of: &Networks, strict: bool) {
        for side in ["saddr", "daddr"] {
            for matches in among(family, side, "nodes", &of.nodes) {
                self.leave(chain, &matches, strict);
            }
        }
    }

    /// Passes neighbour solicitations and advertisements, which only a bridge forwards: connection tracking leaves them
    /// alone.
    fn neighbour_discovery(&mut self, chain: &str, family: Family) {
        if family == Family::V6 {
            self.rules.rule(chain, "icmpv6 type { 135, 136 } accept");
        }
    }

    /// Passes traffic inside the cluster; the rest is judged by its peer.
    fn towards_pod(&mut self, family: Family, of: &Networks, strict: bool) {
        let (chain, peer) = (family.of("to-pod"), family.of("peer"));
        self.pass_nodes(&chain, family, of, strict);
        self.neighbour_discovery(&chain, family);
        // Prerouting has refused pods' addresses that came by a wrong interface.
        for matches in among(family, "saddr", "pods", &of.pods) {
            self.leave(&chain, &matches, strict);
        }
        // Pods of other nodes are judged there, by the real peer, unless this node hides it.
        for RoutedPods { interface, .. } in &self.options.topology.remote {
            let out = format!("oifname {}", quoted(interface));
            self.rules.rule(&*chain, format!("{out} ct status & (snat | dnat) != 0 goto {peer}"));
            self.leave(&chain, &out, strict);
        }
        self.rules.rule(chain, format!("goto {peer}"));

        self.silently_deny_for(&*peer, "ct state invalid", "invalid");
        for matches in among(family, "saddr", "external", &of.external) {
            self.rules.rule(&*peer, format!("{matches} goto {}", family.of("in")));
        }
        // No rule can name another source.
        self.deny_for(peer, "", "foreign");
    }

    fn towards_lan(&mut self, family: Family, of: &Networks, strict: bool) {
        let chain = family.of("to-lan");
        self.pass_nodes(&chain, family, of, strict);
        self.neighbour_discovery(&chain, family);
        for RoutedPods { interface, pods } in &self.options.topology.remote {
            let prefixes = select(pods, family);
            if !prefixes.is_empty() {
                let from =
                    format!("iifname {} {} saddr {}", quoted(interface), family.protocol(), list(&prefixes));
                self.leave(&chain, &from, strict);
            }
        }
        for matches in among(family, "saddr", "pods", &of.pods) {
            self.rules.rule(&*chain, format!("{matches} goto {}", family.of("out")));
        }
        if strict {
            self.deny_for(chain, "", "strict");
        }
    }

    /// Adds the last chain of every denied packet.
    fn deny(&mut self) {
        self.rules.chains.entry(DENY.into()).or_default();
        self.log(DENY);
        match (self.policy.mode, self.policy.on_deny) {
            (Mode::Audit, _) => {
                self.rules.counters.insert("audited");
                self.rules.rule(DENY, "counter name audited accept");
            }
            (Mode::Enforce, OnDeny::Drop) => self.rules.rule(DENY, "drop"),
            (Mode::Enforce, OnDeny::Reject) => {
                let limit = format!("limit rate {REJECTS}/second burst {REJECTS} packets");
                self.rules.rule(DENY, format!("meta l4proto 6 {limit} reject with tcp reset"));
                // Port unreachable, of either family.
                self.rules
                    .rule(DENY, format!("meta l4proto 17 {limit} reject with icmpx type port-unreachable"));
                self.rules.rule(DENY, "drop");
            }
        }
    }
}

#[cfg(test)]
mod tests;
