//! Traffic from the LAN to NodePorts, judged in mangle PREROUTING.
//!
//! Why there: it is the last hook before nat PREROUTING rewrites the destination (so the NodePort and the node's
//! address are still in the packet, whoever implements the Service), and it comes after connection tracking (so a
//! reply to the node itself, whose source port happens to be in the range, is not taken for a request; in table raw
//! it would be).
//!
//! The kernel allows REJECT in table filter only. A packet that is to be rejected therefore gets a mark, and filter
//! INPUT or FORWARD, whichever it comes to, rejects it; connection tracking turns the answer's addresses back.

use super::{
    DENY, Networks, Options, chain, each, established, jump, line, log, openers, ports, silent_deny,
};
use crate::iptables::ruleset::{Line, Table, TableRules};
use crate::model::{Mode, NodePorts, OnDeny, Policy};

const ENTRY: &str = "BRIDGE-NODEPORT";
const SOURCE: &str = "BRIDGE-NODEPORT-SRC";
const JUDGE: &str = "BRIDGE-NODEPORT-NEW";
const PROTOCOLS: [&str; 3] = ["tcp", "udp", "sctp"];

/// Table mangle.
pub(super) fn table(policy: &Policy, node_ports: &NodePorts, options: &Options, of: &Networks) -> TableRules {
    let range = node_ports.range;
    let mut entry = vec![established()];
    entry.extend(PROTOCOLS.iter().map(|protocol| {
        let dport = format!(" -p {protocol} -m {protocol} --dport {}:{}", range.first, range.last);
        line(&format!("{dport} -m addrtype --dst-type LOCAL"), "bridge:nodeport", &format!("-g {SOURCE}"))
    }));

    // The node's traffic to itself comes through PREROUTING of the loopback device.
    let mut source = vec![line(" -m addrtype --src-type LOCAL", "bridge:node", "-j RETURN")];
    source.extend(of.nodes.iter().map(|node| line(&format!(" -s {node}"), "bridge:node", "-j RETURN")));
    source.extend(each(&of.external, "-s", "bridge:from-lan", JUDGE));

    let invalid = silent_deny(policy.mode);
    let mut judge = vec![line(" -m conntrack --ctstate INVALID", "bridge:invalid", invalid)];
    judge.extend(openers());
    if !node_ports.allow.is_empty() {
        for protocol in PROTOCOLS {
            judge.extend(ports::matches(&[], &node_ports.allow).iter().map(|ports| {
                line(&format!(" -p {protocol}{ports}"), "bridge:nodeport-allowed", "-j RETURN")
            }));
        }
    }
    judge.push(line("", "bridge:nodeport-denied", &format!("-g {DENY}")));

    TableRules {
        table: Table::Mangle,
        jumps: vec![jump("PREROUTING", ENTRY)],
        chains: vec![
            chain(ENTRY, entry),
            chain(SOURCE, source),
            chain(JUDGE, judge),
            chain(DENY, deny(policy, options)),
        ],
    }
}

fn deny(policy: &Policy, options: &Options) -> Vec<Line> {
    let drop = || line("", "bridge:deny", "-j DROP");
    match (policy.mode, policy.on_deny) {
        (Mode::Audit, _) => [log(policy.mode, options), vec![line("", "bridge:audit", "")]].concat(),
        (Mode::Enforce, OnDeny::Drop) => [log(policy.mode, options), vec![drop()]].concat(),
        (Mode::Enforce, OnDeny::Reject) => {
            let mark = format!("-j MARK --set-xmark {0:#x}/{0:#x}", options.mark);
            // No answer exists for anything else.
            let answered =
                ["tcp", "udp"].map(|protocol| line(&format!(" -p {protocol}"), "bridge:deny", &mark));
            let rest = [log(policy.mode, options), vec![drop()]].concat();
            let returned = ["tcp", "udp"].map(|p| line(&format!(" -p {p}"), "bridge:deny", "-j RETURN"));
            answered.into_iter().chain(returned).chain(rest).collect()
        }
    }
}

/// What filter INPUT and FORWARD do with the mark. The port is asked for too, so that a foreign use of the bit on
/// other traffic has no effect.
pub(super) fn reject_lines(node_ports: &NodePorts, options: &Options) -> Vec<Line> {
    let range = node_ports.range;
    let conntrack = format!("-m conntrack --ctstate NEW --ctorigdstport {}:{}", range.first, range.last);
    ["tcp", "udp"]
        .map(|protocol| {
            let matches = format!(" -p {protocol} -m mark --mark {0:#x}/{0:#x} {conntrack}", options.mark);
            line(&matches, "bridge:nodeport-denied", &format!("-g {DENY}"))
        })
        .into()
}
