//! Classes of connections that rules denied, or would have denied, as the programs count them.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    net::IpAddr,
    time::{Duration, SystemTime},
};

use bridge_common::filter::{
    counters::Reason,
    denial::{self, DenialKey, SETS},
    event::verdict,
    policy::direction,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::kernel::clock;

use super::{
    error::{Error, Result},
    flows::protocol_name,
    maps::{Maps, now},
};

/// Connections that differ in their source port alone.
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
    /// Verdict on the latest: `audit`, `drop` or `reject`.
    pub verdict: String,
    /// Reason of the latest: `no_rule` or `deny_rule`.
    pub reason: String,
    /// The rule that denied the latest, if one did and its policy is still known.
    pub rule: Option<String>,
    /// Packets that asked for a connection.
    pub count: u64,
    /// Time of the first; RFC 3339, UTC.
    pub first: String,
    /// Time of the latest.
    pub last: String,
    /// Lowest and highest source port.
    pub source_ports: [u16; 2],
}

impl Maps {
    /// Returns the classes that were seen within `since`, sorted, and the number of those that made room for others.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn denials(&self, since: Option<Duration>) -> Result<(Vec<Denial>, u64)> {
        let mut classes: BTreeMap<DenialKey, denial::Denial> = BTreeMap::new();
        let mut evicted = 0;
        for set in 0..SETS {
            for of_cpu in self.denials.get(&set, 0).map_err(Error::aya_map("denials"))?.iter() {
                evicted += of_cpu.evicted;
                for seen in of_cpu.ways.iter().filter(|seen| seen.count > 0) {
                    // Of two reasons the latest counts.
                    let key = DenialKey { reason: 0, ..seen.key };
                    match classes.entry(key) {
                        Entry::Vacant(free) => drop(free.insert(*seen)),
                        Entry::Occupied(mut known) => merge(known.get_mut(), seen),
                    }
                }
            }
        }
        let names = self.rule_names()?;
        let (now, wall_clock) = (now(), SystemTime::now());
        let time = |of: u64| clock::at(wall_clock - Duration::from_nanos(now.saturating_sub(of)));
        let is_recent = |seen: &denial::Denial| {
            since.is_none_or(|since| Duration::from_nanos(now.saturating_sub(seen.last)) <= since)
        };
        let view = |seen: &denial::Denial| {
            let name = |names: &[&str], number: u8| {
                names.get(usize::from(number)).map_or("?", |name| *name).to_owned()
            };
            let rule = seen.rule.checked_sub(1).and_then(|index| names.get(seen.generation, index));
            let reason = Reason::ALL.get(usize::from(seen.key.reason));
            Denial {
                class: DenialClass {
                    direction: name(&direction::NAMES, seen.key.direction),
                    external: seen.key.external.into(),
                    pod: seen.key.pod.into(),
                    protocol: protocol_name(seen.key.protocol),
                    port: u16::from_be_bytes(seen.key.port),
                },
                verdict: name(&verdict::NAMES, seen.verdict),
                reason: reason.map_or("?", |reason| reason.name()).to_owned(),
                rule: rule.map(str::to_owned),
                count: seen.count,
                first: time(seen.first),
                last: time(seen.last),
                source_ports: [seen.lowest, seen.highest],
            }
        };
        let mut list: Vec<Denial> = classes.values().filter(|seen| is_recent(seen)).map(view).collect();
        list.sort_by(|a, b| a.class.cmp(&b.class));
        Ok((list, evicted))
    }
}

/// Adds the connections of another CPU, or of another reason.
fn merge(known: &mut denial::Denial, seen: &denial::Denial) {
    let latest = if seen.last > known.last { *seen } else { *known };
    *known = denial::Denial {
        count: known.count + seen.count,
        first: known.first.min(seen.first),
        lowest: known.lowest.min(seen.lowest),
        highest: known.highest.max(seen.highest),
        ..latest
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_class_on_two_cpus_is_one() {
        let of = |count, first, last, port, rule| denial::Denial {
            count,
            first,
            last,
            lowest: port,
            highest: port,
            rule,
            ..denial::Denial::default()
        };
        let mut known = of(2, 5, 9, 70, 1);
        merge(&mut known, &of(3, 4, 8, 60, 2));
        assert_eq!((known.count, known.first, known.last), (5, 4, 9));
        assert_eq!((known.lowest, known.highest, known.rule), (60, 70, 1));
        merge(&mut known, &of(1, 10, 10, 80, 3));
        assert_eq!((known.count, known.last, known.highest, known.rule), (6, 10, 80, 3));
    }
}
