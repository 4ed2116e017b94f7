//! The rules of the policy as verdict maps.
//!
//! A rule is an element for each combination of its prefixes and port ranges. Where rules name many LAN hosts and many pods,
//! the pods are looked up first and lead to maps of LAN hosts only: the elements are then the sum of both, not the product.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use sha2::{Digest, Sha256};

use super::parts::{DENY, Family, Renderer, Section, select};
use super::shape::Shape;
use crate::model::{Action, Direction, Policy, PortRange, Protocol, Rule};
use crate::nftables::layers::{self, Cube};
use crate::nftables::ruleset::{Collection, Element};

/// The goto of elements that deny.
const DENY_RULE: &str = "deny-rule";

/// A rule with the prefixes it has in one family.
struct Selected<'a> {
    rule: &'a Rule,
    external: Vec<IpNet>,
    pods: Vec<IpNet>,
}

impl<'a> Selected<'a> {
    /// `None` if no packet of the family can match.
    fn of(rule: &'a Rule, family: Family) -> Option<Self> {
        let side = |nets: &Option<Vec<IpNet>>| {
            nets.as_ref().map_or_else(|| vec![family.everything()], |nets| select(nets, family))
        };
        let selected = Self { rule, external: side(&rule.external), pods: side(&rule.pods) };
        (!selected.external.is_empty() && !selected.pods.is_empty()).then_some(selected)
    }

    /// Combinations of port ranges; a rule without ports has one.
    fn ports(&self) -> usize {
        let count = |ports: &[PortRange]| PortRange::join(ports).len().max(1);
        count(&self.rule.ports).saturating_mul(count(&self.rule.source_ports))
    }

    fn elements(&self) -> usize {
        self.external.len().saturating_mul(self.pods.len()).saturating_mul(self.ports())
    }

    /// Whether the rule has more pairs of prefixes than prefixes.
    fn is_wide(&self) -> bool {
        self.external.len().saturating_mul(self.pods.len()) > self.external.len() + self.pods.len()
    }
}

fn selected(rules: &[Rule], family: Family, direction: Direction, action: Action) -> Vec<Selected<'_>> {
    let rules = rules.iter().filter(|rule| rule.direction == direction && rule.action == action);
    rules.filter_map(|rule| Selected::of(rule, family)).collect()
}

/// Addresses of pods, and the wide rules that name all of them.
struct Segment {
    first: IpAddr,
    last: IpAddr,
    rules: Vec<usize>,
}

/// The form of rules of one direction and action.
struct Form<'a, 's> {
    /// Rules whose pods are looked up first.
    by_pod: Vec<&'a Selected<'s>>,
    segments: Vec<Segment>,
    elements: usize,
}

impl<'a, 's> Form<'a, 's> {
    /// Chooses the form that takes fewer elements.
    fn choose(rules: &'a [Selected<'s>]) -> Self {
        let sum = |rules: &mut dyn Iterator<Item = &Selected<'_>>| {
            rules.map(Selected::elements).fold(0, usize::saturating_add)
        };
        let written_out = Self { by_pod: Vec::new(), segments: Vec::new(), elements: sum(&mut rules.iter()) };
        let by_pod: Vec<&Selected<'_>> = rules.iter().filter(|rule| rule.is_wide()).collect();
        if by_pod.is_empty() {
            return written_out;
        }
        let segments = segments(&by_pod);
        let classes: BTreeSet<&[usize]> = segments.iter().map(|segment| segment.rules.as_slice()).collect();
        let of_class = |rules: &[usize]| {
            let of = |index: &usize| by_pod[*index].external.len().saturating_mul(by_pod[*index].ports());
            rules.iter().map(of).fold(0, usize::saturating_add)
        };
        let elements = classes.into_iter().map(of_class).fold(segments.len(), usize::saturating_add);
        let elements = elements.saturating_add(sum(&mut rules.iter().filter(|rule| !rule.is_wide())));
        if elements < written_out.elements { Self { by_pod, segments, elements } } else { written_out }
    }
}

/// Returns the number of elements that rules take, without rendering them, and the rule that takes most of them.
pub(in crate::nftables) fn count(policy: &Policy) -> (usize, Option<&Rule>) {
    let mut total = 0usize;
    let mut most: Option<(usize, &Rule)> = None;
    for family in Family::ALL {
        for direction in [Direction::Inbound, Direction::Outbound] {
            for action in [Action::Deny, Action::Allow] {
                let rules = selected(&policy.rules, family, direction, action);
                let audited = selected(&policy.audited, family, direction, action);
                total = total.saturating_add(Form::choose(&rules).elements);
                // These are written out.
                total = audited.iter().map(Selected::elements).fold(total, usize::saturating_add);
                for rule in rules.iter().chain(&audited) {
                    if most.is_none_or(|(elements, _)| elements < rule.elements()) {
                        most = Some((rule.elements(), rule.rule));
                    }
                }
            }
        }
    }
    (total, most.map(|(_, rule)| rule))
}

/// Cuts the addresses of pods where the set of rules that name them changes.
fn segments(rules: &[&Selected<'_>]) -> Vec<Segment> {
    let mut changes: BTreeMap<u128, Vec<(usize, bool)>> = BTreeMap::new();
    let (mut v4, mut last) = (false, None);
    for (index, rule) in rules.iter().enumerate() {
        for prefix in &rule.pods {
            v4 |= matches!(prefix, IpNet::V4(_));
            changes.entry(number(prefix.network())).or_default().push((index, true));
            match number(prefix.broadcast()).checked_add(1) {
                Some(after) => changes.entry(after).or_default().push((index, false)),
                None => last = Some(u128::MAX),
            }
        }
    }
    let address = |number: u128| -> IpAddr {
        u32::try_from(number)
            .ok()
            .filter(|_| v4)
            .map_or_else(|| IpAddr::from(number.to_be_bytes()), |n| IpAddr::from(n.to_be_bytes()))
    };
    let mut segments: Vec<Segment> = Vec::new();
    let mut naming: BTreeMap<usize, u32> = BTreeMap::new();
    let mut from = 0;
    for (at, changed) in changes.into_iter().map(|(at, changed)| (Some(at), changed)).chain(
        // A prefix that reaches the last address.
        last.map(|_| (None, Vec::new())),
    ) {
        if !naming.is_empty() {
            let until = at.map_or(u128::MAX, |at| at - 1);
            let rules: Vec<usize> = naming.keys().copied().collect();
            match segments.last_mut() {
                Some(before) if before.rules == rules && number(before.last).checked_add(1) == Some(from) => {
                    before.last = address(until);
                }
                _ => segments.push(Segment { first: address(from), last: address(until), rules }),
            }
        }
        from = at.unwrap_or(from);
        for (index, begins) in changed {
            let count = naming.entry(index).or_default();
            if begins {
                *count += 1;
            } else {
                *count -= 1;
            }
            if *count == 0 {
                naming.remove(&index);
            }
        }
    }
    segments
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u32::from(address).into(),
        IpAddr::V6(address) => address.into(),
    }
}

/// Returns the part of the names of chains and sets that stands for an action.
const fn word(action: Action) -> &'static str {
    match action {
        Action::Allow => "allow",
        Action::Deny => "deny",
    }
}

/// The outcome for a packet that matches a rule.
#[derive(Clone, Copy)]
enum Outcome {
    Accept,
    Deny,
    /// The rule is in audit mode.
    Return,
}

impl Outcome {
    const fn of(action: Action) -> Self {
        match action {
            Action::Allow => Self::Accept,
            Action::Deny => Self::Deny,
        }
    }
}

impl Renderer<'_> {
    /// Adds the chain that judges new flows of one direction.
    pub(super) fn judge(&mut self, family: Family, direction: Direction) {
        let name = if direction == Direction::Inbound { "in" } else { "out" };
        let chain = family.of(name);
        // Towards a pod, the chain before has refused them.
        if direction == Direction::Outbound {
            self.silently_deny_for(&*chain, "ct state invalid", "invalid");
        }
        if family == Family::V6 {
            // Connection tracking takes more for a query than RFC 4443 does, and leaves neighbour discovery alone.
            self.silently_deny_for(&*chain, "icmpv6 type != 128", "icmp-type");
        }
        self.openers(&chain);
        let policy = self.policy;
        self.audited(&chain, family, direction);
        for action in [Action::Deny, Action::Allow] {
            let rules = selected(&policy.rules, family, direction, action);
            let form = Form::choose(&rules);
            let prefix = format!("{chain}-{}", word(action));
            let section = Section { chain: &chain, prefix: &prefix, family, direction, with_pods: true };
            let plain = rules.iter().filter(|rule| form.by_pod.is_empty() || !rule.is_wide());
            self.maps(&section, plain, Outcome::of(action));
            self.by_pod(&section, &form, action);
        }
        self.deny_for(chain, "", "no-rule");
    }

    /// Adds the chain of the rules in audit mode, which counts, and returns whatever matches.
    fn audited(&mut self, judging: &str, family: Family, direction: Direction) {
        let policy = self.policy;
        let chain = format!("{judging}-audited");
        for action in [Action::Deny, Action::Allow] {
            let rules = selected(&policy.audited, family, direction, action);
            if rules.is_empty() {
                continue;
            }
            if !self.rules.chains.contains_key(&chain) {
                self.rules.rule(judging, format!("jump {chain}"));
            }
            let prefix = format!("{chain}-{}", word(action));
            let section = Section { chain: &chain, prefix: &prefix, family, direction, with_pods: true };
            self.maps(&section, rules.iter(), Outcome::Return);
        }
    }

    /// Looks the pod up, and then the LAN hosts of the rules that name it.
    fn by_pod(&mut self, section: &Section<'_>, form: &Form<'_, '_>, action: Action) {
        if form.by_pod.is_empty() {
            return;
        }
        let side = if section.direction == Direction::Inbound { "daddr" } else { "saddr" };
        let key = format!("{} {side}", section.family.protocol());
        let map = format!("{}-pods", section.prefix);
        let mut elements = BTreeMap::new();
        let mut known: BTreeSet<String> = BTreeSet::new();
        for Segment { first, last, rules } in &form.segments {
            let chain =
                format!("{}-{}", section.prefix, class(rules.iter().map(|index| form.by_pod[*index].rule)));
            let range = if first == last { first.to_string() } else { format!("{first}-{last}") };
            let verdict = format!("jump {chain}");
            elements.insert(range, Element { rule: String::new(), verdict });
            if known.insert(chain.clone()) {
                let section = Section { chain: &chain, prefix: &chain, with_pods: false, ..*section };
                self.maps(&section, rules.iter().map(|index| form.by_pod[*index]), Outcome::of(action));
            }
        }
        self.rules.rule(section.chain, format!("{key} vmap @{map}"));
        self.rules.maps.insert(map, Collection { key, exact: false, counts: false, elements });
    }

    /// Adds the maps of rules of one action, and the rules that look them up.
    fn maps<'r>(
        &mut self,
        section: &Section<'_>,
        rules: impl Iterator<Item = &'r Selected<'r>>,
        outcome: Outcome,
    ) {
        self.rules.chains.entry(section.chain.to_owned()).or_default();
        let (mut with_ports, mut others) = (Vec::new(), Vec::new());
        for rule in rules {
            let everything = section.family.everything();
            let pods =
                if section.with_pods { rule.pods.as_slice() } else { std::slice::from_ref(&everything) };
            for external in &rule.external {
                for pods in pods {
                    let cube = |protocols, source_ports, ports| Cube {
                        external: *external,
                        pods: *pods,
                        protocols,
                        source_ports,
                        ports,
                    };
                    with_ports.extend(by_ports(rule.rule, cube).map(|cube| (cube, rule.rule)));
                    let protocols = match rule.rule.protocol {
                        Protocol::Icmp => Some((section.family.icmp(), section.family.icmp())),
                        Protocol::Any if rule.rule.ports.is_empty() && rule.rule.source_ports.is_empty() => {
                            Some((0, u8::MAX))
                        }
                        _ => None,
                    };
                    let of_all = protocols.map(|protocols| cube(protocols, PortRange::ALL, PortRange::ALL));
                    others.extend(of_all.map(|cube| (cube, rule.rule)));
                }
            }
        }
        self.layered(section, &with_ports, outcome, true);
        self.layered(section, &others, outcome, false);
    }

    fn layered(&mut self, section: &Section<'_>, cubes: &[(Cube, &Rule)], outcome: Outcome, ports: bool) {
        let cubes: Vec<(Cube, &Rule)> =
            cubes.iter().map(|(cube, rule)| (self.widened(*cube), *rule)).collect();
        let layers = layers::assign(&cubes.iter().map(|(cube, _)| *cube).collect::<Vec<_>>());
        let mut maps: BTreeMap<(usize, Shape), BTreeMap<String, Element>> = BTreeMap::new();
        let verdict = match outcome {
            Outcome::Accept => "accept".to_owned(),
            Outcome::Return => "return".to_owned(),
            Outcome::Deny => {
                self.rules.chains.entry(DENY_RULE.into()).or_default().rules =
                    vec![format!("counter name deny-rule goto {DENY}")];
                self.rules.counters.insert("deny-rule");
                format!("goto {DENY_RULE}")
            }
        };
        for ((cube, rule), layer) in cubes.iter().zip(layers) {
            let Some(layer) = layer else { continue };
            let shape = Shape::of(cube, ports);
            let element = Element { rule: rule.name.clone(), verdict: verdict.clone() };
            maps.entry((layer, shape)).or_default().insert(shape.element(cube), element);
        }
        // Boxes of a layer do not overlap: the smallest map comes first, as a lookup costs the more the more elements there are.
        let mut maps: Vec<_> = maps.into_iter().collect();
        maps.sort_by_key(|((layer, _), elements)| (*layer, elements.len()));
        for ((layer, shape), elements) in maps {
            let name = format!("{}-{}-{layer}", section.prefix, shape.name());
            let key = shape.key(section);
            self.rules.rule(section.chain, format!("{}{key} vmap @{name}", shape.protocols()));
            let other =
                self.rules.maps.insert(name, Collection { key, exact: shape.exact, counts: true, elements });
            debug_assert!(other.is_none(), "two maps of one name");
        }
    }

    /// Returns a box without the prefixes that each packet matches that gets as far as the rules.
    fn widened(&self, cube: Cube) -> Cube {
        let widen = |prefix: IpNet, networks: &[IpNet]| {
            let of_family = |net: &&IpNet| net.addr().is_ipv4() == prefix.addr().is_ipv4();
            let all = networks.iter().filter(of_family).all(|network| prefix.contains(network));
            if !all {
                return prefix;
            }
            if prefix.addr().is_ipv4() { Family::V4.everything() } else { Family::V6.everything() }
        };
        Cube {
            external: widen(cube.external, &self.policy.external),
            pods: widen(cube.pods, &self.policy.pods),
            ..cube
        }
    }
}

/// The boxes of a rule among the protocols with ports.
fn by_ports(
    rule: &Rule,
    cube: impl Fn((u8, u8), PortRange, PortRange) -> Cube,
) -> impl Iterator<Item = Cube> {
    let protocols = match rule.protocol {
        Protocol::Tcp => Some((6, 6)),
        Protocol::Udp => Some((17, 17)),
        Protocol::Sctp => Some((132, 132)),
        Protocol::Icmp => None,
        // Other protocols are not looked up in these maps.
        Protocol::Any => Some((0, u8::MAX)),
    };
    let ranges =
        |ports: &[PortRange]| if ports.is_empty() { vec![PortRange::ALL] } else { PortRange::join(ports) };
    let (sources, ports) = (ranges(&rule.source_ports), ranges(&rule.ports));
    let mut cubes = Vec::new();
    if let Some(protocols) = protocols {
        for source in &sources {
            cubes.extend(ports.iter().map(|ports| cube(protocols, *source, *ports)));
        }
    }
    cubes.into_iter()
}

/// A name for the pods that the same rules name; it stays when other rules come and go.
fn class<'r>(rules: impl Iterator<Item = &'r Rule>) -> String {
    let mut hasher = Sha256::new();
    for rule in rules {
        hasher.update(&rule.name);
        hasher.update([0]);
    }
    hasher.finalize().iter().take(6).map(|byte| format!("{byte:02x}")).collect()
}
