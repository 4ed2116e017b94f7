//! Reports packets that one engine allowed and the other denied.

use std::time::{Duration, Instant};

use crate::datapath::{FlowFilter, FlowView, Maps, Verdict};
use crate::iptables::divergence::Divergence;
use crate::iptables::walk::{self, Packet, State};
use crate::iptables::watch::Guard;
use crate::model::PortRange;
use crate::state::DivergenceStatus;

/// Converts counters for the status.
pub(super) fn status(seen: Divergence) -> DivergenceStatus {
    let Divergence { denied_by_iptables, denied_by_ebpf, last, compared, not_compared } = seen;
    let last_denied_by_ebpf = last.as_ref().map(five_tuple);
    DivergenceStatus {
        denied_by_iptables,
        denied_by_ebpf,
        last_denied_by_ebpf,
        compared,
        not_compared,
        ..DivergenceStatus::default()
    }
}

/// A packet that eBPF has denied, if it was the first of its flow and the policy was the reason. (A packet that is
/// malformed, or belongs to no flow and opens none, is not for the rules to judge.)
pub(super) fn first_packet(verdict: &Verdict) -> Option<Packet> {
    matches!(verdict.reason.as_str(), "no_rule" | "deny_rule").then_some(())?;
    let icmp = matches!(verdict.protocol.as_str(), "icmp" | "icmpv6");
    let port = |port| if icmp { 0 } else { port };
    Some(Packet {
        source: verdict.source,
        source_ports: PortRange::one(port(verdict.source_port)),
        destination: verdict.destination,
        destination_port: port(verdict.destination_port),
        protocol: protocol_number(&verdict.protocol)?,
        icmp_type: verdict.detail,
        to_node: verdict.direction == "nodeport",
        from_node: false,
        state: State::New,
    })
}

/// Returns the packet that opened a flow. Nearly all ICMP queries that eBPF follows are echo requests.
fn opener(flow: &FlowView) -> Option<Packet> {
    let protocol = protocol_number(&flow.protocol)?;
    let port = |port| if matches!(protocol, 1 | 58) { 0 } else { port };
    Some(Packet {
        source: flow.source,
        source_ports: PortRange::one(port(flow.source_port)),
        destination: flow.destination,
        destination_port: port(flow.destination_port),
        protocol,
        icmp_type: if protocol == 58 { 128 } else { 8 },
        to_node: flow.direction == "nodeport",
        from_node: false,
        state: State::New,
    })
}

/// As [`crate::datapath`] names them.
fn protocol_number(name: &str) -> Option<u8> {
    match name {
        "icmpv6" => Some(58),
        name => walk::protocol_number(name),
    }
}

fn five_tuple(packet: &Packet) -> String {
    let Packet { source, source_ports, destination, destination_port, protocol, .. } = *packet;
    let protocol = crate::datapath::protocol_name(protocol);
    if source_ports.first == 0 && destination_port == 0 {
        return format!("{protocol} {source} to {destination}");
    }
    let at = std::net::SocketAddr::new;
    format!("{protocol} {} to {}", at(source, source_ports.first), at(destination, destination_port))
}

/// Writes to the log, at most once in an interval.
#[derive(Debug)]
pub(super) struct Reporter {
    logged: (u64, u64),
    next: Instant,
}

const PAUSE: Duration = Duration::from_secs(10);
/// How long flows are looked at to find one that iptables would not have let through.
const SEARCH: Duration = Duration::from_millis(50);

impl Default for Reporter {
    fn default() -> Self {
        Self { logged: (0, 0), next: Instant::now() }
    }
}

impl Reporter {
    pub(super) fn report(&mut self, seen: &Divergence, guard: &Guard, maps: Option<&Maps>) {
        // Packets that connection tracking calls invalid are often late packets of a flow that has ended.
        let others = seen.denied_by_iptables.iter().filter(|(cause, _)| *cause != "bridge:invalid");
        let now = (others.map(|(_, packets)| packets).sum(), seen.denied_by_ebpf);
        if now == self.logged || Instant::now() < self.next {
            return;
        }
        if now.0 > self.logged.0 {
            // The counters of iptables do not show the packet; a flow that eBPF allowed does.
            let example = maps.and_then(|maps| denied_flow(guard, maps));
            let example = example.as_ref().map_or_else(|| "unknown".to_owned(), five_tuple);
            tracing::warn!(
                packets = now.0 - self.logged.0,
                by = ?seen.denied_by_iptables,
                example,
                "iptables has denied packets that eBPF let through: see `bridge-agent status`, and whether eBPF is \
                 attached to every interface that pods and LAN hosts are behind"
            );
        }
        if now.1 > self.logged.1 {
            let example = seen.last.as_ref().map(five_tuple);
            tracing::warn!(
                packets = now.1 - self.logged.1,
                example,
                "eBPF has denied packets that iptables would have allowed: see `bridge-agent status`, and what \
                 another program does to the chains BRIDGE-* or to the maps of bridge"
            );
        }
        self.logged = now;
        self.next = Instant::now() + PAUSE;
    }
}

/// A flow that eBPF knows and that the rules would deny.
fn denied_flow(guard: &Guard, maps: &Maps) -> Option<Packet> {
    let mut found = None;
    let end = Instant::now() + SEARCH;
    let looked = maps.for_each_flow(&FlowFilter::default(), |flow| {
        if found.is_none() && Instant::now() < end {
            let denied = |packet: &Packet| guard.verdict(packet) == Some(walk::Verdict::Denied);
            found = opener(&flow).filter(denied);
        }
    });
    if let Err(error) = looked {
        tracing::debug!(%error, "flows cannot be read");
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(reason: &str, protocol: &str, direction: &str) -> Verdict {
        Verdict {
            reason: reason.into(),
            direction: direction.into(),
            protocol: protocol.into(),
            detail: 8,
            ..Verdict::sample()
        }
    }

    #[test]
    fn only_what_the_policy_denied_is_compared() {
        let packet = first_packet(&verdict("no_rule", "tcp", "inbound")).unwrap();
        assert_eq!((packet.protocol, packet.destination_port, packet.to_node), (6, 22, false));
        assert_eq!(five_tuple(&packet), "tcp 192.168.31.67:50000 to 10.200.1.91:22");
        assert!(first_packet(&verdict("deny_rule", "udp", "nodeport")).unwrap().to_node);
        let ping = first_packet(&verdict("no_rule", "icmp", "inbound")).unwrap();
        assert_eq!((ping.protocol, ping.icmp_type, ping.source_ports.first), (1, 8, 0));
        assert_eq!(five_tuple(&ping), "icmp 192.168.31.67 to 10.200.1.91");
        for reason in ["not_syn", "established", "malformed"] {
            assert_eq!(first_packet(&verdict(reason, "tcp", "inbound")), None, "{reason}");
        }
        assert_eq!(first_packet(&verdict("no_rule", "47", "inbound")).unwrap().protocol, 47);
    }
}
