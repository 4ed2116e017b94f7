//! The objects of a ruleset.

use std::{collections::BTreeMap, net::IpAddr};

use serde_json::Value;

use crate::{
    iptables::walk::{Interfaces, Packet},
    nftables::TABLE,
};

/// Names of table and chain, or table and set, of one family.
pub(super) type Place = (String, String, String);

/// A base chain or another.
#[derive(Clone, Debug, Default)]
pub(super) struct Chain {
    pub(super) hook: Option<String>,
    /// Interfaces of a chain at ingress or egress.
    pub(super) devices: Vec<String>,
    /// Whether it translates addresses.
    pub(super) translates: bool,
    pub(super) priority: i64,
    /// Whether packets that reach the end are dropped.
    pub(super) drops: bool,
    pub(super) rules: Vec<Rule>,
}

#[derive(Clone, Debug)]
pub(super) struct Rule {
    pub(super) parts: Vec<Value>,
    pub(super) comment: Option<String>,
}

/// Returns the kind and the contents of a statement or an expression: an object with one field. `None`: it is none.
pub(super) fn statement(json: &Value) -> Option<(&String, &Value)> {
    json.as_object()?.iter().next()
}

/// A ruleset of nftables.
#[derive(Clone, Debug, Default)]
pub struct Ruleset {
    pub(super) chains: BTreeMap<Place, Chain>,
    /// Elements of sets and maps.
    pub(super) elements: BTreeMap<Place, Vec<Value>>,
}

/// Tables to follow a packet through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The table of bridge.
    Bridge,
    /// Tables of other programs, but for those of iptables, which `iptables-save` prints.
    Others,
}

/// A packet where it comes in, and behind a translation of its destination.
#[derive(Clone, Copy, Debug)]
pub struct Way<'a> {
    /// As it comes in.
    pub before: &'a Packet,
    /// As it is routed.
    pub after: &'a Packet,
    /// Its interfaces.
    pub interfaces: Interfaces<'a>,
}

impl Way<'_> {
    /// Whether its destination is translated.
    #[must_use]
    pub fn is_translated(&self) -> bool {
        (self.before.destination, self.before.destination_port)
            != (self.after.destination, self.after.destination_port)
    }
}

fn place(object: &Value, name: &str) -> Place {
    let part = |key: &str| object[key].as_str().unwrap_or_default().to_owned();
    (part("family"), part("table"), part(name))
}

impl Ruleset {
    /// Reads the output of nft; a text that is none has no rules.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let mut ruleset: Value = serde_json::from_str(text).unwrap_or_default();
        let mut found = Self::default();
        let Some(objects) = ruleset["nftables"].as_array_mut() else { return found };
        for object in objects {
            if let Some(chain) = object.get("chain") {
                let entry = found.chains.entry(place(chain, "name")).or_default();
                entry.hook = chain["hook"].as_str().map(str::to_owned);
                let devices =
                    chain["dev"].as_array().map_or(std::slice::from_ref(&chain["dev"]), Vec::as_slice);
                entry.devices = devices.iter().filter_map(Value::as_str).map(str::to_owned).collect();
                entry.translates = chain["type"] == "nat";
                entry.priority = chain["prio"].as_i64().unwrap_or_default();
                entry.drops = chain["policy"] == "drop";
            } else if let Some(rule) = object.get_mut("rule") {
                let parts = rule["expr"].take();
                let rule_of = Rule {
                    parts: if let Value::Array(parts) = parts { parts } else { Vec::new() },
                    comment: rule["comment"].as_str().map(str::to_owned),
                };
                found.chains.entry(place(rule, "chain")).or_default().rules.push(rule_of);
            } else if let Some(set) = ["set", "map"].iter().find(|kind| object.get(**kind).is_some()) {
                let set = &mut object[*set];
                let elements = set["elem"].take();
                let elements = if let Value::Array(elements) = elements { elements } else { Vec::new() };
                found.elements.insert(place(set, "name"), elements);
            }
        }
        found
    }

    /// Whether the table of bridge is in it.
    #[must_use]
    pub fn has_own(&self) -> bool {
        self.chains.keys().any(is_own)
    }

    /// Returns base chains at a hook that packets to an address come to, those that come first first.
    pub(super) fn base(&self, hook: &str, owner: Owner, to: IpAddr) -> Vec<(&Place, &Chain)> {
        let of_owner = |place: &Place| match owner {
            Owner::Bridge => is_own(place),
            Owner::Others => !is_own(place) && !is_of_iptables(place),
        };
        let at_hook = |(place, chain): &(&Place, &Chain)| {
            let family = match place.0.as_str() {
                "ip" => to.is_ipv4(),
                "ip6" => to.is_ipv6(),
                family => matches!(family, "inet" | "netdev"),
            };
            family && chain.hook.as_deref() == Some(hook) && of_owner(place)
        };
        let mut found: Vec<_> = self.chains.iter().filter(at_hook).collect();
        found.sort_by_key(|(_, chain)| chain.priority);
        found
    }
}

fn is_own((family, table, _): &Place) -> bool {
    family == "inet" && table == TABLE
}

/// Whether iptables-nft shows the base chain: `iptables-save` prints it.
fn is_of_iptables((family, table, name): &Place) -> bool {
    matches!(family.as_str(), "ip" | "ip6")
        && matches!(table.as_str(), "raw" | "mangle" | "nat" | "filter" | "security")
        && name.chars().all(|letter| letter.is_ascii_uppercase())
}
