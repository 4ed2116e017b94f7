//! Traffic from the LAN to NodePorts: recognised before DNAT, judged at the filter.
//!
//! Mangle is the last place before the destination is replaced, so the packet still has the node's address and the NodePort,
//! whatever implements the Service. It comes after connection tracking, so a reply to the node itself whose source port lies
//! in the range is not taken for a request.
//!
//! The packet gets a mark, by which the filter knows that the allow list of `nodePorts` decides, and not the rules for the
//! pod it is translated to.

use super::parts::{FILTER, Family, Networks, Renderer, among};
use crate::model::{NodePorts, PortRange};

const MANGLE: i32 = -150;
const ENTRY: &str = "prerouting-mangle";
const INPUT: &str = "input";
const RANGE: &str = "nodeport-range";
const SOURCE: &str = "nodeport-source";
const MARK: &str = "nodeport-mark";
pub(super) const JUDGE: &str = "nodeport-judge";

impl Renderer<'_> {
    pub(super) fn node_ports(&mut self, node_ports: &NodePorts, families: &[(Family, Networks); 2]) {
        self.rules.base(ENTRY, "prerouting", MANGLE);
        self.opening(ENTRY, RANGE);
        if !self.options.topology.remote.is_empty() {
            // A masqueraded flow to another node is judged packet by packet, by the port it was sent to.
            self.rules.rule(ENTRY, format!("ct status snat ct direction original goto {RANGE}"));
        }
        self.rules.rule(ENTRY, "ct state established,related accept");
        self.rules.rule(ENTRY, format!("goto {RANGE}"));
        let ports = node_ports.range;
        let to_range = format!("meta l4proto {{ 6, 17, 132 }} th dport {ports} fib daddr type local");
        self.rules.rule(RANGE, format!("{to_range} goto {SOURCE}"));

        // The node's traffic to itself comes through prerouting of the loopback device.
        self.rules.rule(SOURCE, "fib saddr type local accept");
        for (family, of) in families.iter().filter(|(_, of)| !of.external.is_empty()) {
            for matches in among(*family, "saddr", "nodes", &of.nodes) {
                self.rules.rule(SOURCE, format!("{matches} accept"));
            }
            for matches in among(*family, "saddr", "external", &of.external) {
                self.rules.rule(SOURCE, format!("{matches} goto {MARK}"));
            }
        }
        self.silently_deny_for(MARK, "ct state invalid", "invalid");
        self.rules.rule(MARK, format!("meta mark set meta mark | {:#x}", self.options.mark));

        self.rules.base(INPUT, "input", FILTER);
        self.judged_node_ports(INPUT);
        self.openers(JUDGE);
        for range in PortRange::join(&node_ports.allow) {
            self.rules.counters.insert("nodeport-allowed");
            for matches in original_port(range) {
                self.rules.rule(JUDGE, format!("{matches} counter name nodeport-allowed accept"));
            }
        }
        self.deny_for(JUDGE, "", "nodeport-denied");
    }

    /// Sends marked packets to be judged. The port is compared too, so that a foreign use of the bit on other traffic has no
    /// effect.
    pub(super) fn judged_node_ports(&mut self, chain: &str) {
        let mark = self.options.mark;
        let range = self.policy.node_ports.as_ref().map_or(PortRange::ALL, |node_ports| node_ports.range);
        for matches in original_port(range) {
            self.rules.rule(chain, format!("meta mark & {mark:#x} == {mark:#x} {matches} goto {JUDGE}"));
        }
    }
}

/// Compares the port before translation. nft reads such a port only beside a single protocol.
fn original_port(range: PortRange) -> [String; 3] {
    ["tcp", "udp", "sctp"].map(|protocol| format!("meta l4proto {protocol} ct original proto-dst {range}"))
}
