//! Rules of other programs in nf_tables and x_tables, as far as they decide about forwarded packets.

use std::{collections::BTreeSet, process::Command};

use ipnet::IpNet;
use serde_json::Value;

use crate::iptables::{Programs, backend, observe, ruleset::Family};

/// A base chain, or a chain that one leads to.
#[derive(Debug)]
struct Chain<'a> {
    family: &'a str,
    table: &'a str,
    name: &'a str,
}

/// The ruleset of nf_tables in this network namespace.
#[derive(Debug)]
pub(super) struct Ruleset(Vec<Value>);

/// A chain that drops forwarded packets.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Drop {
    /// For people: family, table and chain.
    pub(super) place: String,
    /// `policy drop`, or the last rule.
    pub(super) how: String,
    /// It leads to the rules of bridge, which accept first.
    pub(super) leads_to_bridge: bool,
    /// A rule before accepts packets of a network.
    pub(super) accepts: bool,
}

impl Ruleset {
    /// Reads it by nft(8).
    pub(super) fn read() -> Result<Self, String> {
        let programs = Programs::default();
        let nft = programs.find("nft").ok_or("nft is not installed, so rules of nf_tables are not seen")?;
        let output = Command::new(nft).args(["--json", "list", "ruleset"]).output();
        let output = output.map_err(|error| format!("nft cannot be run: {error}"))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(format!(
                "nft cannot list the ruleset: {}",
                said.lines().next().unwrap_or("as root it can")
            ));
        }
        let mut ruleset: Value =
            serde_json::from_slice(&output.stdout).map_err(|error| format!("nft's JSON: {error}"))?;
        match ruleset["nftables"].take() {
            Value::Array(objects) => Ok(Self(objects)),
            _ => Err("nft's JSON has no ruleset".to_owned()),
        }
    }

    /// Base chains of others at a hook.
    fn base_chains<'a>(&'a self, hook: &'a str) -> impl Iterator<Item = (&'a Value, Chain<'a>)> {
        self.0.iter().filter_map(move |object| {
            let chain = &object["chain"];
            let place = Chain {
                family: chain["family"].as_str()?,
                table: chain["table"].as_str()?,
                name: chain["name"].as_str()?,
            };
            (chain["hook"] == hook && !place.table.starts_with("bridge")).then_some((chain, place))
        })
    }

    fn rules<'a>(&'a self, at: &'a Chain<'a>) -> impl Iterator<Item = &'a [Value]> {
        self.0.iter().filter_map(|object| {
            let rule = &object["rule"];
            let here = rule["family"] == at.family && rule["table"] == at.table && rule["chain"] == at.name;
            rule["expr"].as_array().filter(|_| here).map(Vec::as_slice)
        })
    }

    /// Visits the rules of a chain, and of those that it leads to; each with the names of the chains on the way.
    fn walk<'a>(
        &'a self,
        at: &Chain<'a>,
        seen: &mut BTreeSet<String>,
        visit: &mut impl FnMut(&str, &'a [Value]),
    ) {
        if !seen.insert(at.name.to_owned()) {
            return;
        }
        let rules: Vec<&'a [Value]> = self
            .0
            .iter()
            .filter_map(|object| {
                let rule = &object["rule"];
                let here =
                    rule["family"] == at.family && rule["table"] == at.table && rule["chain"] == at.name;
                rule["expr"].as_array().filter(|_| here).map(Vec::as_slice)
            })
            .collect();
        for rule in rules {
            visit(at.name, rule);
            for target in rule.iter().filter_map(target) {
                self.walk(&Chain { name: target, ..*at }, seen, visit);
            }
        }
    }

    /// Chains of others that drop what they do not accept, at the hooks of forwarded packets.
    pub(super) fn drops(&self, pods: &[IpNet]) -> Vec<Drop> {
        let mut drops = Vec::new();
        for (chain, place) in
            ["prerouting", "forward", "postrouting"].into_iter().flat_map(|hook| self.base_chains(hook))
        {
            if !matches!(place.family, "ip" | "ip6" | "inet") {
                continue;
            }
            let last = self.rules(&place).last().filter(|rule| ends(rule));
            let how = match (chain["policy"] == "drop", last) {
                (true, _) => "policy drop",
                (false, Some(_)) => "its last rule drops or rejects every packet",
                _ => continue,
            };
            let (mut leads_to_bridge, mut accepts) = (false, false);
            self.walk(&place, &mut BTreeSet::new(), &mut |name, rule| {
                leads_to_bridge |= name.starts_with("BRIDGE-");
                let text = serde_json::to_string(rule).unwrap_or_default();
                accepts |= rule.iter().any(|statement| statement.get("accept").is_some())
                    && pods.iter().any(|net| text.contains(&format!("\"{}\"", net.network())));
            });
            let place = format!("nftables chain {} {} {}", place.family, place.table, place.name);
            drops.push(Drop { place, how: how.to_owned(), leads_to_bridge, accepts });
        }
        drops
    }

    /// Rules of others that give packets of pods to LAN hosts another source address.
    pub(super) fn masquerades(&self, pods: &[IpNet], external: &[IpNet]) -> Vec<String> {
        let mut found = Vec::new();
        for (_, place) in self.base_chains("postrouting") {
            self.walk(&place, &mut BTreeSet::new(), &mut |name, rule| {
                if rule.iter().any(is_source_nat) && concerns(rule, pods, external) {
                    found.push(format!("nftables chain {} {} {name}", place.family, place.table));
                }
            });
        }
        found.dedup();
        found
    }
}

/// The chain that a statement leads to.
fn target(statement: &Value) -> Option<&str> {
    let jump = statement.get("jump").or_else(|| statement.get("goto"))?;
    jump["target"].as_str()
}

/// Whether a rule without conditions drops or rejects.
fn ends(rule: &[Value]) -> bool {
    let harmless = |key: &str| matches!(key, "counter" | "log" | "comment" | "limit");
    let mut dropped = false;
    for statement in rule {
        let key = statement.as_object().and_then(|object| object.keys().next()).map_or("", String::as_str);
        match key {
            "drop" | "reject" => dropped = true,
            "xt" if statement["xt"]["name"] == "REJECT" => dropped = true,
            key if harmless(key) => {}
            _ => return false,
        }
    }
    dropped
}

fn is_source_nat(statement: &Value) -> bool {
    statement.get("masquerade").is_some()
        || statement.get("snat").is_some()
        || matches!(statement["xt"]["name"].as_str(), Some("MASQUERADE" | "SNAT"))
}

/// Whether the conditions of a rule let a packet from a pod to a LAN host through. Unknown conditions are taken to.
fn concerns(rule: &[Value], pods: &[IpNet], external: &[IpNet]) -> bool {
    rule.iter().all(|statement| {
        let condition = &statement["match"];
        // kube-proxy masquerades packets that it has marked.
        if condition["left"].pointer("/meta/key").is_some_and(|key| key == "mark")
            || condition["left"].get("&").is_some()
            || statement["xt"]["name"] == "mark"
        {
            return false;
        }
        let side = match condition.pointer("/left/payload/field").and_then(Value::as_str) {
            Some("saddr") => pods,
            Some("daddr") => external,
            _ => return true,
        };
        let named = networks(&condition["right"]);
        let overlaps = |net: &IpNet| named.iter().any(|other| net.contains(other) || other.contains(net));
        let inside = |net: &IpNet| named.iter().any(|other| other.contains(net));
        match condition["op"].as_str() {
            _ if named.is_empty() => true,
            Some("!=") => !side.iter().all(inside),
            _ => side.iter().any(overlaps),
        }
    })
}

/// The networks of the right side of a match.
fn networks(value: &Value) -> Vec<IpNet> {
    if let Some(text) = value.as_str() {
        return text.parse::<std::net::IpAddr>().map(IpNet::from).into_iter().collect();
    }
    if let Some(prefix) = value.get("prefix") {
        let net = prefix["addr"].as_str().zip(prefix["len"].as_u64());
        return net.and_then(|(addr, len)| format!("{addr}/{len}").parse().ok()).into_iter().collect();
    }
    value["set"].as_array().into_iter().flatten().flat_map(networks).collect()
}

/// The same of x_tables, which nft(8) does not show.
pub(super) fn legacy_drops() -> Vec<Drop> {
    let mut drops = Vec::new();
    for family in Family::ALL {
        let Some(save) = backend::legacy_rules(&Programs::default(), family) else { continue };
        let tables = observe::parse(&save);
        for (table, found) in &tables {
            for chain in found.chains.iter().filter(|chain| chain.name == "FORWARD") {
                let all = |rule: &str| ["-j DROP", "-j REJECT"].iter().any(|start| rule.starts_with(start));
                let how = match (chain.policy == "DROP", chain.rules.last()) {
                    (true, _) => "policy DROP",
                    (false, Some(last)) if all(&last.rule) => "its last rule drops or rejects every packet",
                    _ => continue,
                };
                drops.push(Drop {
                    place: format!("{}-legacy table {table:?} chain FORWARD", family.program()),
                    how: how.to_owned(),
                    leads_to_bridge: chain.rules.iter().any(|rule| rule.rule.contains("BRIDGE-")),
                    accepts: false,
                });
            }
        }
    }
    drops
}
