//! Classes of connections that were denied, or would have been, from the events of the programs.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::datapath::Verdict;

/// The most classes that are kept; the one that was not seen for the longest time makes room.
pub const MAX_CLASSES: usize = 4096;

/// Connections that a rule does not tell apart but by their source port.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DenialClass {
    /// `inbound`, `outbound` or `nodeport`.
    pub direction: String,
    /// The LAN host.
    pub external: IpAddr,
    /// The pod; with `nodeport`, the node.
    pub pod: IpAddr,
    /// As events have it.
    pub protocol: String,
    /// Destination port; 0 where there is none.
    pub port: u16,
}

/// The connections of a class.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Denial {
    /// The class.
    #[serde(flatten)]
    pub class: DenialClass,
    /// Verdict of the latest: `audit`, `drop` or `reject`.
    pub verdict: String,
    /// Reason of the latest: `no_rule` or `deny_rule`.
    pub reason: String,
    /// The rule that denied the latest, if one did.
    pub rule: Option<String>,
    /// Events.
    pub count: u64,
    /// Time of the first event; RFC 3339, UTC.
    pub first: String,
    /// Time of the latest event.
    pub last: String,
    /// Lowest and highest source port.
    pub source_ports: [u16; 2],
}

#[derive(Debug)]
struct Entry {
    denial: Denial,
    seen: Instant,
    order: u64,
}

/// The classes of this run of the agent.
#[derive(Debug, Default)]
pub(crate) struct Denials {
    entries: HashMap<DenialClass, Entry>,
    /// From the one that was not seen for the longest time.
    by_age: BTreeMap<u64, DenialClass>,
    next: u64,
    evicted: u64,
}

impl Denials {
    /// Notes a verdict, if it is that of rules on a new connection.
    pub(crate) fn note(&mut self, verdict: &Verdict) {
        if !matches!(verdict.reason.as_str(), "no_rule" | "deny_rule") {
            return;
        }
        let Verdict { source, destination, source_port, .. } = *verdict;
        let (external, pod) =
            if verdict.direction == "outbound" { (destination, source) } else { (source, destination) };
        let has_ports = matches!(verdict.protocol.as_str(), "tcp" | "udp" | "sctp");
        let class = DenialClass {
            direction: verdict.direction.clone(),
            external,
            pod,
            protocol: verdict.protocol.clone(),
            port: if has_ports { verdict.destination_port } else { 0 },
        };
        let order = self.next;
        self.next += 1;
        if let Some(entry) = self.entries.get_mut(&class) {
            self.by_age.remove(&entry.order);
            (entry.order, entry.seen) = (order, Instant::now());
            let denial = &mut entry.denial;
            denial.count += 1;
            denial.last.clone_from(&verdict.time);
            denial.verdict.clone_from(&verdict.verdict);
            denial.reason.clone_from(&verdict.reason);
            denial.rule.clone_from(&verdict.rule);
            let [low, high] = denial.source_ports;
            denial.source_ports = [low.min(source_port), high.max(source_port)];
        } else {
            if self.entries.len() >= MAX_CLASSES
                && let Some((_, oldest)) = self.by_age.pop_first()
            {
                self.entries.remove(&oldest);
                self.evicted += 1;
            }
            let denial = Denial {
                class: class.clone(),
                verdict: verdict.verdict.clone(),
                reason: verdict.reason.clone(),
                rule: verdict.rule.clone(),
                count: 1,
                first: verdict.time.clone(),
                last: verdict.time.clone(),
                source_ports: [source_port; 2],
            };
            self.entries.insert(class.clone(), Entry { denial, seen: Instant::now(), order });
        }
        self.by_age.insert(order, class);
    }

    /// Returns the classes that were seen within `since`, sorted.
    pub(crate) fn list(&self, since: Option<Duration>) -> Vec<Denial> {
        let recent = |entry: &&Entry| since.is_none_or(|since| entry.seen.elapsed() <= since);
        let mut list: Vec<Denial> =
            self.entries.values().filter(recent).map(|entry| entry.denial.clone()).collect();
        list.sort_by(|a, b| a.class.cmp(&b.class));
        list
    }

    /// Returns how many classes were evicted.
    pub(crate) const fn evicted(&self) -> u64 {
        self.evicted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(port: u16, source_port: u16, reason: &str) -> Verdict {
        serde_json::from_value(serde_json::json!({
            "time": format!("t{source_port}"), "verdict": "audit", "reason": reason, "direction": "outbound",
            "protocol": "tcp", "source": "10.200.1.91", "sourcePort": source_port, "destination": "192.168.31.67",
            "destinationPort": port, "rule": null, "interface": "cali1", "length": 60, "detail": 2, "generation": 1,
            "suppressed": 0
        }))
        .unwrap()
    }

    #[test]
    fn connections_that_differ_in_their_source_port_are_one_class() {
        let mut denials = Denials::default();
        for (port, source_port, reason) in
            [(502, 5, "no_rule"), (502, 3, "no_rule"), (503, 4, "deny_rule"), (504, 1, "not_syn")]
        {
            denials.note(&verdict(port, source_port, reason));
        }
        let list = denials.list(None);
        assert_eq!(
            list.iter().map(|denial| (denial.class.port, denial.count)).collect::<Vec<_>>(),
            [(502, 2), (503, 1)]
        );
        assert_eq!((list[0].class.pod.to_string().as_str(), list[0].source_ports), ("10.200.1.91", [3, 5]));
        assert_eq!((list[0].first.as_str(), list[0].last.as_str()), ("t5", "t3"));
        assert!(denials.list(Some(Duration::ZERO)).is_empty());
    }

    #[test]
    fn the_class_that_was_not_seen_for_the_longest_time_makes_room() {
        let mut denials = Denials::default();
        for port in 1..=u16::try_from(MAX_CLASSES).unwrap() {
            denials.note(&verdict(port, 1, "no_rule"));
        }
        denials.note(&verdict(1, 1, "no_rule"));
        denials.note(&verdict(60_000, 1, "no_rule"));
        let ports: Vec<u16> = denials.list(None).iter().map(|denial| denial.class.port).collect();
        assert_eq!((ports.len(), denials.evicted()), (MAX_CLASSES, 1));
        assert!(ports.contains(&1) && ports.contains(&60_000) && !ports.contains(&2));
    }
}
