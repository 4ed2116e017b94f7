//! Translations of addresses by chains of other programs.

use std::net::{IpAddr, SocketAddr};

use serde_json::Value as Json;

use crate::iptables::{others::unspecified, walk::NewSource};

use super::{
    ruleset::{Chain, Owner, Place, Ruleset, Way, statement},
    show,
    value::{At, Tracked, Value},
    walk::DEPTH,
};

/// The table of kube-proxy.
const KUBE_PROXY: &str = "kube-proxy";

/// The rules that give a packet another source.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Masquerades {
    /// Those that certainly do.
    pub certain: Vec<String>,
    /// Those whose conditions are not known here.
    pub possible: Vec<String>,
    /// That source, by the first that is certain.
    pub source: Option<NewSource>,
}

/// Whether a packet reaches the rule after the one that led to a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Reached,
    Perhaps,
    NotReached,
}

/// The target of a rule.
enum Target<'r> {
    Translate(&'r str, &'r Json),
    End,
    Return,
    Jump(&'r str),
    Goto(&'r str),
}

/// A translation that a packet comes to.
struct Found {
    certain: bool,
    kind: String,
    target: Json,
    place: Place,
    rule: String,
}

struct Walk<'a> {
    ruleset: &'a Ruleset,
    at: At<'a>,
    found: Vec<Found>,
}

impl Ruleset {
    /// Returns addresses and ports that the destination of a packet may be translated to; none: it is not translated. The unspecified
    /// address stands for that of the interface that it comes in by.
    #[must_use]
    pub fn destinations(&self, way: &Way<'_>) -> Vec<(IpAddr, u16)> {
        let mut walk = Walk::before_routing(self, way);
        let found = std::mem::take(&mut walk.found);
        let translated = found.iter().filter(|one| matches!(one.kind.as_str(), "dnat" | "redirect"));
        translated.flat_map(|one| walk.ends(&one.target, &one.place)).collect()
    }

    /// Returns addresses and ports of a Service, by the chains of kube-proxy: `service-HASH-NAMESPACE/NAME/PROTOCOL/PORT`.
    #[must_use]
    pub fn service(&self, namespace: &str, name: &str) -> Vec<(IpAddr, u16)> {
        let wanted = format!("-{namespace}/{name}/");
        let maps = self.elements.iter().filter(|((_, table, map), _)| {
            table == KUBE_PROXY && matches!(map.as_str(), "service-ips" | "no-endpoint-services")
        });
        let of_service = |element: &Json| {
            // One without endpoints is named by the comment of its element.
            let comment = element[0]["elem"]["comment"].as_str().unwrap_or_default();
            let chain = element[1]["goto"]["target"].as_str().unwrap_or_default();
            let is_it = chain.contains(&wanted) || comment.starts_with(&format!("{namespace}/{name}:"));
            let key = if element[0].get("elem").is_some() { &element[0]["elem"]["val"] } else { &element[0] };
            let parts = key["concat"].as_array().filter(|_| is_it)?;
            let address = parts.first()?.as_str()?.parse().ok()?;
            Some((address, u16::try_from(parts.get(2)?.as_u64()?).ok()?))
        };
        maps.flat_map(|(_, elements)| elements).filter_map(of_service).collect()
    }

    /// Returns the rules of other programs behind routing that give the packet another source.
    #[must_use]
    pub fn masquerades(&self, way: &Way<'_>) -> Masquerades {
        let mark = Walk::before_routing(self, way).at.mark;
        let at = At {
            packet: way.after,
            original_port: way.before.destination_port,
            translated: way.is_translated(),
            input: None,
            output: way.interfaces.output,
            mark,
            tracked: Tracked::new(way.after),
        };
        let mut walk = Walk { ruleset: self, at, found: Vec::new() };
        walk.hook("postrouting");
        let mut masquerades = Masquerades::default();
        for one in walk.found.into_iter().filter(|one| !matches!(one.kind.as_str(), "dnat" | "redirect")) {
            if one.certain && masquerades.certain.is_empty() {
                masquerades.source = source(&one.kind, &one.target);
            }
            if one.certain { &mut masquerades.certain } else { &mut masquerades.possible }.push(one.rule);
        }
        masquerades
    }
}

impl<'a> Walk<'a> {
    fn before_routing(ruleset: &'a Ruleset, way: &Way<'a>) -> Self {
        let at = At {
            packet: way.before,
            original_port: way.before.destination_port,
            translated: false,
            input: way.interfaces.input,
            output: None,
            mark: Some(0),
            tracked: Tracked::new(way.before),
        };
        let mut walk = Self { ruleset, at, found: Vec::new() };
        walk.hook("prerouting");
        walk
    }

    fn hook(&mut self, hook: &str) {
        let ruleset = self.ruleset;
        let mut certain = true;
        for (place, chain) in ruleset.base(hook, Owner::Others, self.at.packet.destination) {
            let before = self.found.len();
            self.chain(place, chain, 0, certain);
            if chain.translates && self.found.len() > before {
                // A packet is translated once.
                if self.found[before..].iter().any(|one| one.certain) {
                    return;
                }
                certain = false;
            }
        }
    }

    fn chain(&mut self, place: &Place, chain: &'a Chain, depth: u32, mut certain: bool) -> Next {
        let mut next = Next::Reached;
        for rule in &chain.rules {
            let mut holds = Some(true);
            let mut targets: Vec<(bool, Target<'a>)> = Vec::new();
            for part in &rule.parts {
                let Some((kind, inner)) = statement(part) else {
                    continue;
                };
                match kind.as_str() {
                    "match" => match self.ruleset.holds(&self.at, inner, place) {
                        Some(true) => {}
                        Some(false) => {
                            holds = Some(false);
                            break;
                        }
                        None => holds = None,
                    },
                    "vmap" => {
                        targets = self.elements(inner, place);
                        if targets.is_empty() {
                            holds = Some(false);
                        }
                    }
                    "mangle" if inner["key"]["meta"]["key"] == "mark" => {
                        let value = match self.at.value(&inner["value"]) {
                            Value::Number(mark) => Some(mark),
                            _ => None,
                        };
                        let sure = certain && holds == Some(true);
                        self.at.mark = value.filter(|value| sure || self.at.mark == Some(*value));
                    }
                    "counter" | "log" | "notrack" | "mangle" | "update" | "add" => {}
                    _ => match target(kind, inner) {
                        Some(target) => targets.push((true, target)),
                        // A limit, a quota, a match of x_tables.
                        None => holds = None,
                    },
                }
            }
            if holds == Some(false) {
                continue;
            }
            for (only, target) in targets {
                let sure = certain && holds == Some(true) && only;
                let after = match target {
                    Target::Return if sure => return next,
                    Target::Return => Next::Perhaps,
                    Target::End => Next::NotReached,
                    Target::Translate(kind, inner) => {
                        let (kind, target) = (kind.to_owned(), inner.clone());
                        let (place, rule) = (place.clone(), show::rule(place, rule));
                        self.found.push(Found { certain: sure, kind, target, place, rule });
                        Next::NotReached
                    }
                    Target::Jump(name) => self.called(place, name, depth, sure),
                    Target::Goto(name) => {
                        let after = self.called(place, name, depth, sure);
                        if sure {
                            return after;
                        }
                        after
                    }
                };
                match after {
                    Next::NotReached if sure => return Next::NotReached,
                    Next::Reached => {}
                    Next::NotReached | Next::Perhaps => (certain, next) = (false, Next::Perhaps),
                }
            }
        }
        next
    }

    fn called(&mut self, (family, table, _): &Place, name: &str, depth: u32, certain: bool) -> Next {
        let place = (family.clone(), table.clone(), name.to_owned());
        match self.ruleset.chains.get(&place).filter(|_| depth < DEPTH) {
            Some(chain) => self.chain(&place, chain, depth + 1, certain),
            None => Next::Perhaps,
        }
    }

    /// Returns the verdicts of a map that the packet may have, and whether it is the only one.
    fn elements(&self, vmap: &'a Json, place: &Place) -> Vec<(bool, Target<'a>)> {
        let key = self.at.value(&vmap["key"]);
        let mut found = Vec::new();
        for element in self.ruleset.data(&vmap["data"], place) {
            match self.ruleset.fits(&key, &element[0], place) {
                Some(false) => {}
                fits => {
                    let verdict = statement(&element[1]);
                    let target = verdict.and_then(|(kind, inner)| target(kind, inner));
                    found.extend(target.map(|target| (fits == Some(true), target)));
                }
            }
        }
        if found.len() > 1 {
            // One of several by chance, as kube-proxy chooses an endpoint.
            found.iter_mut().for_each(|(only, _)| *only = false);
        }
        found
    }

    /// Returns the ends that a translation leads to.
    fn ends(&self, dnat: &Json, place: &Place) -> Vec<(IpAddr, u16)> {
        let port = |json: &Json| json.as_u64().and_then(|port| u16::try_from(port).ok());
        let own_port = || port(&dnat["port"]).unwrap_or(self.at.packet.destination_port);
        let one = |json: &Json| -> Option<(IpAddr, u16)> {
            match json.as_str() {
                Some(text) => match (text.parse::<SocketAddr>(), text.parse::<IpAddr>()) {
                    (Ok(to), _) => Some((to.ip(), to.port())),
                    (_, Ok(address)) => Some((address, own_port())),
                    _ => None,
                },
                None => Some((
                    json["concat"][0].as_str()?.parse().ok()?,
                    port(&json["concat"][1]).unwrap_or_else(own_port),
                )),
            }
        };
        if dnat["addr"].is_null() {
            return vec![(unspecified(self.at.packet.source), own_port())];
        }
        match dnat["addr"].get("map") {
            None => one(&dnat["addr"]).into_iter().collect(),
            Some(map) => {
                let key = self.at.value(&map["key"]);
                let elements = self.ruleset.data(&map["data"], place).iter();
                let fitting =
                    elements.filter(|element| self.ruleset.fits(&key, &element[0], place) != Some(false));
                fitting.filter_map(|element| one(&element[1])).collect()
            }
        }
    }
}

impl Ruleset {
    /// Returns the elements of a map: of a named one, or those that are written in the rule.
    fn data<'r>(&'r self, data: &'r Json, (family, table, _): &Place) -> &'r [Json] {
        match data.as_str().and_then(|name| name.strip_prefix('@')) {
            Some(name) => {
                let place = (family.clone(), table.clone(), name.to_owned());
                self.elements.get(&place).map(Vec::as_slice).unwrap_or_default()
            }
            None => data["set"].as_array().map(Vec::as_slice).unwrap_or_default(),
        }
    }
}

/// Returns the source that a statement gives; `None`: it does not say.
fn source(kind: &str, inner: &Json) -> Option<NewSource> {
    // Alone, or the first of an interval.
    let first = |json: &Json| if json["range"].is_null() { json.clone() } else { json["range"][0].clone() };
    let port = first(&inner["port"]).as_u64().and_then(|port| u16::try_from(port).ok());
    let address = match kind {
        "masquerade" => None,
        _ => Some(first(&inner["addr"]).as_str()?.parse().ok()?),
    };
    Some(NewSource { address, port })
}

fn target<'r>(kind: &'r str, inner: &'r Json) -> Option<Target<'r>> {
    Some(match kind {
        "dnat" | "redirect" | "snat" | "masquerade" => Target::Translate(kind, inner),
        "accept" | "drop" | "reject" | "queue" => Target::End,
        "return" => Target::Return,
        "jump" => Target::Jump(inner["target"].as_str()?),
        "goto" => Target::Goto(inner["target"].as_str()?),
        _ => return None,
    })
}
