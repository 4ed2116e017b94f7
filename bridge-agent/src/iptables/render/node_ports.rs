//! Traffic from the LAN to NodePorts: recognised in mangle PREROUTING, judged in filter.
//!
//! Mangle PREROUTING is the last hook before nat PREROUTING replaces the destination, so the packet still has the node's
//! address and the NodePort, whatever implements the Service. It comes after connection tracking, so a reply to the node
//! itself whose source port lies in the range is not taken for a request; in table raw it would be.
//!
//! The packet gets a mark, by which filter INPUT or FORWARD knows that the allow list of `nodePorts` decides, and not the
//! rules for the pod it is translated to. REJECT exists in table filter only; connection tracking translates the answer.

use super::parts::{
    DENY, Networks, chain, each, established, jump, line, log, openers, opening, silent_deny,
};
use crate::firewall::Options;
use crate::iptables::ruleset::{Chain, Line, Table, TableRules};
use crate::model::{Mode, NodePorts, Policy, PortRange};

const ENTRY: &str = "BRIDGE-NODEPORT";
const RANGE: &str = "BRIDGE-NODEPORT-RANGE";
const SOURCE: &str = "BRIDGE-NODEPORT-SRC";
const MARK: &str = "BRIDGE-NODEPORT-MARK";
const JUDGE: &str = "BRIDGE-NODEPORT-NEW";
const PROTOCOLS: [&str; 3] = ["tcp", "udp", "sctp"];

/// Returns the rules of table mangle.
pub(super) fn table(policy: &Policy, node_ports: &NodePorts, options: &Options, of: &Networks) -> TableRules {
    let ports = node_ports.range;
    let mut entry = opening(RANGE);
    if !options.topology.remote.is_empty() {
        // A masqueraded flow to another node is judged packet by packet, by the port it was sent to.
        let masqueraded = " -m conntrack --ctstate SNAT --ctdir ORIGINAL";
        entry.push(line(masqueraded, "bridge:scope", &format!("-g {RANGE}")));
    }
    entry.extend([established(), line("", "bridge:scope", &format!("-g {RANGE}"))]);
    let range = PROTOCOLS.map(|protocol| {
        let dport = format!(" -p {protocol} -m {protocol} --dport {}:{}", ports.first, ports.last);
        line(&format!("{dport} -m addrtype --dst-type LOCAL"), "bridge:nodeport", &format!("-g {SOURCE}"))
    });

    // The node's traffic to itself comes through PREROUTING of the loopback device.
    let mut source = vec![line(" -m addrtype --src-type LOCAL", "bridge:node", "-j RETURN")];
    source.extend(of.nodes.iter().map(|node| line(&format!(" -s {node}"), "bridge:node", "-j RETURN")));
    source.extend(each(&of.external, "-s", "bridge:from-lan", MARK));

    let mark = vec![
        line(" -m conntrack --ctstate INVALID", "bridge:invalid", silent_deny(policy.mode)),
        line("", "bridge:nodeport", &format!("-j MARK --set-xmark {0:#x}/{0:#x}", options.mark)),
    ];
    let mut chains =
        vec![chain(ENTRY, entry), chain(RANGE, range.into()), chain(SOURCE, source), chain(MARK, mark)];
    if policy.mode == Mode::Audit {
        let count = vec![line("", "bridge:audit", "")];
        chains.push(chain(DENY, [log(policy.mode, options), count].concat()));
    }
    TableRules { table: Table::Mangle, jumps: vec![jump("PREROUTING", ENTRY)], chains }
}

/// Returns the line of table filter for marked packets. It compares the port too, so that a foreign use of the bit on
/// other traffic has no effect.
pub(super) fn judged(node_ports: &NodePorts, options: &Options) -> Line {
    let port = original_port(node_ports.range);
    let matches = format!(" -m mark --mark {0:#x}/{0:#x}{port}", options.mark);
    line(&matches, "bridge:nodeport", &format!("-g {JUDGE}"))
}

/// Returns the chain of table filter that judges marked packets by the port they were sent to.
pub(super) fn judge(node_ports: &NodePorts) -> Chain {
    let mut lines = Vec::from(openers());
    lines.extend(
        PortRange::join(&node_ports.allow)
            .into_iter()
            .map(|range| line(&original_port(range), "bridge:nodeport-allowed", "-j RETURN")),
    );
    lines.push(line("", "bridge:nodeport-denied", &format!("-g {DENY}")));
    chain(JUDGE, lines)
}

/// Compares the port before translation.
fn original_port(range: PortRange) -> String {
    let PortRange { first, last } = range;
    let ports = if first == last { first.to_string() } else { format!("{first}:{last}") };
    format!(" -m conntrack --ctorigdstport {ports}")
}
