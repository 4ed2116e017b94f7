//! The walk through base chains.

use serde_json::Value as Json;

use super::{
    ruleset::{Chain, Owner, Place, Rule, Ruleset, Way, statement},
    show,
    value::{At, Tracked, Value},
};
use crate::iptables::walk::Packet;

/// Deeper than the kernel lets chains be nested.
pub(super) const DEPTH: u32 = 17;
/// Destinations are translated at this priority of prerouting.
const DNAT: i64 = -100;
/// Connection tracking looks a packet up at this priority of prerouting and output.
const CONNTRACK: i64 = -200;

/// A walk through rules: its end, and the rules that led there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Walked {
    /// Whether the packet passes; `None`: conditions that are not known here decide.
    pub passes: Option<bool>,
    /// The chains on the way to the verdict.
    pub chains: Vec<String>,
    /// The rule with the verdict.
    pub rule: Option<String>,
    /// The configured name of the rule of bridge, or the name of the counter.
    pub name: Option<String>,
    /// Rules that may drop it.
    pub may_drop: Vec<String>,
    /// The mark that it has as it is routed; `None`: 0, or not known.
    pub mark: Option<u64>,
}

/// How a chain may end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Ends {
    accept: bool,
    drop: bool,
    /// Back to the rule after the one that led there.
    back: bool,
}

impl Ends {
    const ACCEPT: Self = Self { accept: true, drop: false, back: false };
    const DROP: Self = Self { accept: false, drop: true, back: false };
    const BACK: Self = Self { accept: false, drop: false, back: true };

    fn add(&mut self, other: Self) {
        self.accept |= other.accept;
        self.drop |= other.drop;
        self.back |= other.back;
    }
}

/// The action of a rule.
enum Action<'r> {
    /// On to the next rule.
    None,
    End(Ends),
    Jump(&'r str),
    Goto(&'r str),
}

struct Walk<'a> {
    ruleset: &'a Ruleset,
    at: At<'a>,
    walked: Walked,
    /// Whether a condition on the way was not known.
    uncertain: bool,
}

impl Ruleset {
    /// Follows a packet through the chains of type filter at its hooks, in their order.
    #[must_use]
    pub fn walk(&self, way: &Way<'_>, owner: Owner) -> Walked {
        walk(self, way, owner)
    }
}

/// Returns the hooks that a packet comes to. The table of bridge has some of them.
const fn hooks(packet: &Packet, owner: Owner) -> &'static [&'static str] {
    match (owner, packet.from_node, packet.to_node) {
        (Owner::Bridge, _, true) => &["prerouting", "input"],
        (Owner::Bridge, _, false) => &["prerouting", "forward"],
        (Owner::Others, true, _) => &["output", "postrouting", "egress"],
        (Owner::Others, false, true) => &["ingress", "prerouting", "input"],
        (Owner::Others, false, false) => &["ingress", "prerouting", "forward", "postrouting", "egress"],
    }
}

fn walk(ruleset: &Ruleset, way: &Way<'_>, owner: Owner) -> Walked {
    let (mut mark, mut tracked) = (Some(0), Tracked::new(way.before));
    let mut all = Walked { passes: Some(true), ..Walked::default() };
    for hook in hooks(way.after, owner) {
        let (before_routing, leaves) =
            (matches!(*hook, "ingress" | "prerouting"), matches!(*hook, "postrouting" | "egress"));
        for (place, chain) in ruleset.base(hook, owner, way.after.destination) {
            let early = *hook == "ingress" || (*hook == "prerouting" && chain.priority <= DNAT);
            let packet = if early { way.before } else { way.after };
            let interface = if leaves { way.interfaces.output } else { way.interfaces.input };
            let at_device = match interface {
                _ if !matches!(*hook, "ingress" | "egress") => Some(true),
                // Before version 1.0.7, nft does not show them.
                _ if chain.devices.is_empty() => None,
                Some(name) => Some(chain.devices.iter().any(|device| device == name)),
                None => None,
            };
            if at_device == Some(false) {
                continue;
            }
            let not_yet = *hook == "ingress"
                || (matches!(*hook, "prerouting" | "output") && chain.priority < CONNTRACK);
            // Sources that are not true are refused there; the question is about a packet of its own sender.
            let at = At {
                packet,
                original_port: way.before.destination_port,
                translated: !early && way.is_translated(),
                input: way.interfaces.input.filter(|_| !leaves),
                output: way.interfaces.output.filter(|_| !before_routing),
                mark,
                tracked: if not_yet { Tracked { mark: tracked.mark, ..Tracked::NOT_YET } } else { tracked },
            };
            let uncertain = at_device.is_none();
            let mut walk = Walk { ruleset, at, walked: Walked::default(), uncertain };
            let ends = walk.base(place, chain);
            mark = walk.at.mark;
            tracked.mark = walk.at.tracked.mark;
            if walk.at.tracked.state != Tracked::NOT_YET.state {
                tracked.state = walk.at.tracked.state;
            }
            if before_routing {
                all.mark = mark.filter(|mark| *mark != 0);
            }
            let Walked { chains, rule, name, may_drop, .. } = walk.walked;
            all.may_drop.extend(may_drop);
            let passes = match (ends.drop, ends.accept || ends.back || uncertain) {
                (true, false) => Some(false),
                (false, _) => Some(true),
                (true, true) => None,
            };
            match passes {
                Some(false) => {
                    return Walked { passes, chains, rule, name, may_drop: all.may_drop, mark: all.mark };
                }
                None => all.passes = None,
                Some(true) => {}
            }
            // The last hook has the verdict that a reader asks for.
            if name.is_some() || *hook != "prerouting" {
                (all.chains, all.rule, all.name) = (chains, rule, name);
            }
        }
    }
    all
}

impl<'a> Walk<'a> {
    fn base(&mut self, place: &Place, chain: &'a Chain) -> Ends {
        self.walked.chains.push(show_chain(place));
        let mut ends = self.rules(place, &chain.rules, 0);
        if ends.back {
            ends.back = false;
            ends.add(if chain.drops { Ends::DROP } else { Ends::ACCEPT });
            if chain.drops && self.walked.rule.is_none() {
                self.walked.rule = Some(format!("{}: policy drop", show_chain(place)));
                if ends.accept || self.uncertain {
                    self.walked.may_drop.extend(self.walked.rule.clone());
                }
            }
        }
        ends
    }

    /// Follows the packet through rules, as far as one certainly ends them.
    fn rules(&mut self, place: &Place, rules: &'a [Rule], depth: u32) -> Ends {
        let mut ends = Ends::default();
        for rule in rules {
            let marked = self.at.mark;
            let (matches, action, name) = self.read(place, rule);
            if matches == Some(false) {
                continue;
            }
            let certain = matches == Some(true);
            let before = self.uncertain;
            self.uncertain |= !certain;
            // The ends of the rule, and whether the next one may follow.
            let (of_rule, goes_on) = match action {
                Action::None => (Ends::default(), true),
                Action::End(end) => {
                    self.note(place, rule, end, name);
                    (end, false)
                }
                Action::Jump(target) => {
                    let end = self.chain(place, target, name, depth);
                    (Ends { back: false, ..end }, end.back)
                }
                Action::Goto(target) => (self.chain(place, target, name, depth), false),
            };
            self.uncertain = before;
            if !certain && self.at.mark != marked {
                self.at.mark = None;
            }
            ends.add(of_rule);
            if certain && !goes_on {
                return ends;
            }
            // Only some of the ways reach the rules that follow.
            self.uncertain |= of_rule != Ends::default();
        }
        ends.back = true;
        ends
    }

    fn chain(&mut self, (family, table, _): &Place, name: &str, rule: Option<String>, depth: u32) -> Ends {
        let place = (family.clone(), table.clone(), name.to_owned());
        let Some(chain) = self.ruleset.chains.get(&place).filter(|_| depth < DEPTH) else {
            return Ends { accept: true, drop: true, back: true };
        };
        let known = self.walked.chains.len();
        let named = self.walked.name.clone();
        if rule.is_some() && !self.uncertain {
            self.walked.name = rule;
        }
        self.walked.chains.push(name.to_owned());
        let ends = self.rules(&place, &chain.rules, depth + 1);
        if ends == Ends::BACK {
            self.walked.chains.truncate(known);
            self.walked.name = named;
        }
        ends
    }

    /// Notes a verdict.
    fn note(&mut self, place: &Place, rule: &Rule, end: Ends, name: Option<String>) {
        if end.back {
            return;
        }
        if self.uncertain || (end.drop && end.accept) {
            if end.drop {
                self.walked.may_drop.push(show::rule(place, rule));
            }
        } else if self.walked.rule.is_none() {
            self.walked.rule = Some(show::rule(place, rule));
            if self.walked.name.is_none() {
                self.walked.name = name;
            }
        }
    }

    /// Returns whether a rule matches, if that is known, its action, and the name of a rule of bridge.
    fn read<'r>(&mut self, place: &Place, rule: &'r Rule) -> (Option<bool>, Action<'r>, Option<String>)
    where
        'a: 'r,
    {
        let mut matches = Some(true);
        let mut name = None;
        for part in &rule.parts {
            let Some((kind, inner)) = statement(part) else {
                continue;
            };
            match kind.as_str() {
                "match" => match self.ruleset.holds(&self.at, inner, place) {
                    Some(true) => {}
                    Some(false) => return (Some(false), Action::None, None),
                    None => matches = None,
                },
                "vmap" => {
                    let (found, verdict, of_element) = self.look_up(inner, place);
                    if found == Some(false) {
                        return (found, Action::None, None);
                    }
                    let matches = if matches == Some(true) { found } else { None };
                    return match verdict.and_then(verdict_of) {
                        Some(action) => (matches, action, of_element),
                        // One of several that are not distinguished here.
                        None => (None, Action::End(Ends { accept: true, drop: true, back: true }), None),
                    };
                }
                "counter" => name = inner.as_str().map(str::to_owned).or(name),
                "log" | "tcp option" => {}
                "notrack" => {
                    let sure = matches == Some(true) && !self.uncertain;
                    self.at.tracked.state = if sure { Tracked::UNTRACKED } else { None };
                }
                "mangle" if inner["key"]["ct"]["key"] == "mark" => {
                    self.at.tracked.mark = match (matches, self.at.value(&inner["value"])) {
                        (Some(true), Value::Number(mark)) if !self.uncertain => Some(mark),
                        _ => None,
                    };
                }
                "mangle" if inner["key"]["meta"]["key"] == "mark" => {
                    self.at.mark = match (matches, self.at.value(&inner["value"])) {
                        (Some(true), Value::Number(mark)) => Some(mark),
                        _ => None,
                    };
                }
                "mangle" => {}
                _ => match verdict_of(part) {
                    Some(action) => return (matches, action, name),
                    // A limit, a quota, a match of x_tables.
                    None => matches = None,
                },
            }
        }
        (matches, Action::None, name)
    }

    /// Looks a verdict map up: whether an element has the key, its verdict and its comment.
    fn look_up<'r>(&self, vmap: &'r Json, place: &Place) -> (Option<bool>, Option<&'r Json>, Option<String>)
    where
        'a: 'r,
    {
        let key = self.at.value(&vmap["key"]);
        let absent = |value: &Value| *value == Value::Absent;
        if absent(&key) || matches!(&key, Value::Concat(parts) if parts.iter().any(absent)) {
            return (Some(false), None, None);
        }
        let elements: &[Json] = match vmap["data"].as_str().and_then(|name| name.strip_prefix('@')) {
            Some(name) => {
                let (family, table, _) = place;
                match self.ruleset.elements.get(&(family.clone(), table.clone(), name.to_owned())) {
                    Some(elements) => elements,
                    None => return (None, None, None),
                }
            }
            None => vmap["data"]["set"].as_array().map(Vec::as_slice).unwrap_or_default(),
        };
        let mut unknown = false;
        for element in elements {
            match self.ruleset.fits(&key, &element[0], place) {
                Some(true) if unknown => return (None, None, None),
                Some(true) => {
                    let comment = element[0]["elem"]["comment"].as_str().map(str::to_owned);
                    return (Some(true), Some(&element[1]), comment);
                }
                Some(false) => {}
                None => unknown = true,
            }
        }
        if unknown { (None, None, None) } else { (Some(false), None, None) }
    }
}

/// Returns the action of a verdict statement.
fn verdict_of(statement: &Json) -> Option<Action<'_>> {
    let (kind, inner) = statement.as_object()?.iter().next()?;
    Some(match kind.as_str() {
        "accept" => Action::End(Ends::ACCEPT),
        "drop" | "reject" => Action::End(Ends::DROP),
        "return" => Action::End(Ends::BACK),
        // A program decides; without one, the packet is dropped.
        "queue" => Action::End(Ends { accept: true, drop: true, back: false }),
        "continue" => Action::None,
        "jump" => Action::Jump(inner["target"].as_str()?),
        "goto" => Action::Goto(inner["target"].as_str()?),
        _ => return None,
    })
}

fn show_chain((family, table, name): &Place) -> String {
    format!("{family} {table} {name}")
}
