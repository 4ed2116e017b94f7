//! Packets that one engine let through and the other did not, with eBPF and iptables side by side.
//!
//! eBPF judges first, at the interface, so the two kinds are counted in different ways:
//!
//! - **iptables denied** packets that eBPF had let through: the counters of the rules that deny, since packets that eBPF
//!   denies do not come this far. Exact, but for packets between the reading of a chain and its replacement by a reload or a repair.
//!   In audit mode every packet comes to iptables, so nothing is counted.
//! - **eBPF denied** packets that iptables would have let through: iptables never sees them. The events of eBPF report
//!   denied packets; each that is the first of its flow is followed through the chains as they then stand in the kernel.
//!   A lower bound: events are rate-limited, and no more than a twentieth of the time is spent on following them.

use std::collections::{BTreeMap, HashMap};

use super::observe::{ObservedTable, comment, target};
use super::render::DENY;
use super::ruleset::is_own;
use super::ruleset::{Family, Table};
use super::walk::Packet;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Divergence {
    /// Packets that iptables denied though eBPF had let them through, by the name of the rule: `bridge:...`, or `rule`
    /// for those of the configuration, or `foreign` for one that another program added to bridge's chains.
    pub denied_by_iptables: BTreeMap<String, u64>,
    /// Packets that eBPF denied though iptables would have let them through, at the least.
    pub denied_by_ebpf: u64,
    /// The last one of them.
    pub last: Option<Packet>,
    /// Packets that eBPF denied and that were held against the rules of iptables.
    pub compared: u64,
    /// Packets that eBPF denied and that could not be held against iptables: too many at a time, or a rule that
    /// another program wrote and that is not understood.
    pub not_compared: u64,
}

/// The counter of each rule that denies, as last read.
#[derive(Debug, Default)]
pub(super) struct Counters {
    read: BTreeMap<(Family, Table), HashMap<String, u64>>,
}

impl Counters {
    /// Ignores everything counted so far.
    pub(super) fn begin(&mut self, tables: &BTreeMap<(Family, Table), ObservedTable>) {
        self.read.clear();
        self.count(tables, &mut BTreeMap::new());
    }

    /// Adds the packets counted since the tables were last read.
    pub(super) fn count(
        &mut self,
        tables: &BTreeMap<(Family, Table), ObservedTable>,
        sums: &mut BTreeMap<String, u64>,
    ) {
        for (key, there) in tables {
            let mut now: HashMap<String, (&str, u64)> = HashMap::new();
            for (id, cause, packets) in denials(there) {
                now.entry(id).or_insert((cause, 0)).1 += packets;
            }
            let before = self.read.entry(*key).or_default();
            for (id, (cause, packets)) in &now {
                // Another program may have set the counter to zero.
                let known = before.get(id).copied().filter(|known| known <= packets).unwrap_or_default();
                if *packets > known {
                    *sums.entry((*cause).to_owned()).or_default() += packets - known;
                }
            }
            *before = now.into_iter().map(|(id, (_, packets))| (id, packets)).collect();
        }
    }
}

/// Returns the rules of own chains that deny: an identifier, the reason, and the number of packets.
fn denials(there: &ObservedTable) -> impl Iterator<Item = (String, &str, u64)> {
    // Packets that end in BRIDGE-DENY were counted on their way there.
    let chains = there.chains.iter().filter(|chain| is_own(&chain.name) && chain.name != DENY);
    chains.flat_map(move |chain| {
        chain.rules.iter().filter_map(move |rule| {
            let denies = matches!(target(&rule.rule), Some("DROP" | "REJECT" | DENY));
            let cause = match comment(&rule.rule) {
                // Not eBPF's business: `scope: strict` is for iptables alone.
                Some("bridge:strict") => return None,
                Some(own) if own.starts_with("bridge:") => own,
                Some(_) => "rule",
                None => "foreign",
            };
            denies.then(|| (format!("{} {}", chain.name, rule.rule), cause, rule.hits.packets))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::super::observe::parse;
    use super::*;

    const SAVE: &str = "*filter\n:FORWARD ACCEPT [0:0]\n:BRIDGE-INBOUND - [0:0]\n:BRIDGE-NODEPORT-NEW - [0:0]\n:BRIDGE-DENY - [0:0]\n\
        [9:9] -A FORWARD -j DROP\n\
        [4:4] -A BRIDGE-INBOUND -m conntrack --ctstate INVALID -m comment --comment \"bridge:invalid\" -j DROP\n\
        [2:2] -A BRIDGE-INBOUND -m comment --comment \"bridge:strict\" -g BRIDGE-DENY\n\
        [7:7] -A BRIDGE-INBOUND -m comment --comment no-ssh -g BRIDGE-DENY\n\
        [8:8] -A BRIDGE-INBOUND -m comment --comment ping -j RETURN\n\
        [11:11] -A BRIDGE-NODEPORT-NEW -m comment --comment \"bridge:nodeport-denied\" -g BRIDGE-DENY\n\
        [3:3] -A BRIDGE-INBOUND -m comment --comment \"bridge:no-rule\" -g BRIDGE-DENY\n\
        [12:12] -A BRIDGE-DENY -m comment --comment \"bridge:deny\" -j DROP\nCOMMIT\n";

    fn tables(save: &str) -> BTreeMap<(Family, Table), ObservedTable> {
        BTreeMap::from([((Family::V4, Table::Filter), parse(save).remove("filter").unwrap())])
    }

    fn sums(expected: &[(&str, u64)]) -> BTreeMap<String, u64> {
        expected.iter().map(|(cause, packets)| ((*cause).to_owned(), *packets)).collect()
    }

    #[test]
    fn every_packet_that_was_denied_counts_once() {
        let mut seen = BTreeMap::new();
        Counters::default().count(&tables(SAVE), &mut seen);
        assert_eq!(
            seen,
            sums(&[
                ("bridge:invalid", 4),
                ("bridge:nodeport-denied", 11),
                ("rule", 7),
                ("bridge:no-rule", 3)
            ])
        );
    }

    #[test]
    fn only_what_is_new_counts() {
        let (mut counters, mut seen) = (Counters::default(), BTreeMap::new());
        counters.begin(&tables(SAVE));
        counters.count(&tables(SAVE), &mut seen);
        assert_eq!(seen, BTreeMap::new());
        counters.count(&tables(&SAVE.replace("[3:3]", "[5:5]")), &mut seen);
        assert_eq!(seen, sums(&[("bridge:no-rule", 2)]));
        // Set to zero by `iptables -Z`, and one more since.
        counters.count(&tables(&SAVE.replace("[3:3]", "[1:1]")), &mut seen);
        assert_eq!(seen, sums(&[("bridge:no-rule", 3)]));
    }

    #[test]
    fn a_foreign_rule_counts_and_a_removed_one_does_not_uncount() {
        let (mut counters, mut seen) = (Counters::default(), BTreeMap::new());
        counters.begin(&tables(SAVE));
        let added = SAVE
            .replace("[4:4] -A BRIDGE-INBOUND", "[6:6] -A BRIDGE-INBOUND -j DROP\n[4:4] -A BRIDGE-INBOUND");
        counters.count(&tables(&added), &mut seen);
        counters.count(&tables(SAVE), &mut seen);
        assert_eq!(seen, sums(&[("foreign", 6)]));
    }
}
