//! Follows a connection through the hooks of a node.

use std::{collections::BTreeSet, net::IpAddr};

use bridge_common::filter::{counters::Reason, policy::direction};

use super::{
    Class, Explanation, Facts, FlowTable, Judge, Kind, KnownFlow, Mark, Outcome, Packet, Place, Question,
    Remedy, Stage, StageOutcome, Verdict, is_rejected,
    judge::ip,
    nearly::{self, Sides},
    pool::{Opener, Ports, source_ports},
};
use crate::{
    model::{Action, Direction, Hook, Mode, OnDeny, PortRange},
    policy::{NODE_PORTS_RULE, reference, reference::Criterion},
};

/// The most source ports that are tried.
const MAX_TRIED: usize = 4096;

/// The outcome at the hook that decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Decision {
    hook: Hook,
    outcome: Outcome,
    sides: Option<Sides>,
    packet: Packet,
}

/// Explains a connection.
#[must_use]
pub fn explain(facts: &Facts<'_>, question: &Question) -> Explanation {
    let judge = Judge { policy: facts.policy, local: facts.local, state: facts.state };
    let mut stages = vec![
        end_stage(&judge, "source", question.source),
        end_stage(&judge, "destination", question.destination),
    ];
    let opener = match judge.class(question.source) {
        Class::Pod => Opener::Pod { pooled: facts.state.is_pooled(question.source) },
        Class::Local => Opener::Host,
        Class::Node | Class::External | Class::Foreign => Opener::Stranger,
    };
    let Ports { ranges, origin, stage } = source_ports(facts.pool, opener, question);
    stages.extend(stage);
    if question.protocol.has_ports() {
        stages.push(Stage::new("source port", StageOutcome::Ok, nearly::ports(&ranges), origin));
    }
    let decisions = decide(facts, &judge, question, &ranges);
    let (_, decision) = decisions[0];
    stages.push(hook_stage(facts, &decision));
    stages.push(flow_stage(facts, &decision));
    stages.push(rules_stage(&judge, &decisions));
    stages.extend(audited_stage(&judge, &decision));
    let mut explanation = Explanation {
        question: *question,
        verdict: verdict(facts, &decision.outcome),
        direction: direction_of(&decision.outcome)
            .map(|number| direction::NAMES[usize::from(number)].to_owned()),
        reason: reason_of(&decision.outcome).map(|reason| reason.name().to_owned()),
        rule: rule_of(&decision.outcome).map(|index| rule_name(&judge, index)),
        summary: String::new(),
        stages,
        nearly: Vec::new(),
        remedy: None,
        ports: decisions.iter().map(|(range, one)| (*range, verdict(facts, &one.outcome))).collect(),
    };
    let differing = decisions.iter().any(|(_, other)| !same(&other.outcome, &decision.outcome));
    if differing {
        explanation.verdict = Verdict::Depends;
        (explanation.reason, explanation.rule) = (None, None);
    }
    let denied = decisions.iter().find(|(_, decision)| matches!(decision.outcome, Outcome::Denied(..)));
    if let Some((range, denied)) = denied {
        if let Some(sides) = denied.sides {
            explanation.nearly = nearly::nearly(&judge, sides, &denied.packet);
        }
        // The packet has one port of the range.
        for near in explanation.nearly.iter_mut().filter(|near| near.criterion == Criterion::SourcePorts) {
            near.asked = range.to_string();
        }
        explanation.remedy = remedy(&judge, question, denied);
        if !differing {
            explanation.stages.push(answer_stage(facts, denied));
        }
    }
    explanation.summary = summary(&explanation, &decisions);
    if explanation.stages.iter().any(|stage| stage.name == "pool" && stage.outcome == StageOutcome::Deny) {
        explanation.summary += "\nREFUSED by the port pool: the program cannot connect from this port";
    }
    explanation
}

/// Whether two outcomes are the same for a reader: also the same rule.
fn same(a: &Outcome, b: &Outcome) -> bool {
    match (a, b) {
        (Outcome::Known(_), Outcome::Known(_)) => true,
        _ => a == b,
    }
}

fn end_stage(judge: &Judge<'_>, name: &str, address: IpAddr) -> Stage {
    let listed = |networks: &[ipnet::IpNet]| {
        let longest = networks.iter().filter(|network| network.contains(&address));
        longest.max_by_key(|network| network.prefix_len()).map(ToString::to_string).unwrap_or_default()
    };
    let (seen, why) = match judge.class(address) {
        Class::Local => ("this node", "an address of the node itself".to_owned()),
        Class::Node => ("a node", format!("networks.nodes has {}", listed(&judge.policy.nodes))),
        Class::Pod => ("a pod", format!("networks.pods has {}", listed(&judge.policy.pods))),
        Class::External => {
            ("a LAN host", format!("networks.external has {}", listed(&judge.policy.external)))
        }
        Class::Foreign => ("a foreign address", "no list of `networks` contains it".to_owned()),
    };
    let seen = match judge.state.hosted(address) {
        Some(_) if judge.class(address) == Class::Pod => "a pod of this node".to_owned(),
        None if judge.class(address) == Class::Pod => "a pod of another node".to_owned(),
        _ => seen.to_owned(),
    };
    Stage::new(name, StageOutcome::Ok, format!("{address} is {seen}"), why)
}

/// Judges the connection for each interval of source ports that rules distinguish; at least one.
fn decide(
    facts: &Facts<'_>,
    judge: &Judge<'_>,
    question: &Question,
    ranges: &[PortRange],
) -> Vec<(PortRange, Decision)> {
    let mut starts: BTreeSet<u16> = ranges.iter().map(|range| range.first).collect();
    if question.source_port.is_none() && question.protocol.has_ports() {
        let inside = |port: &u16| ranges.iter().any(|range| range.contains(*port));
        let relevant = judge.policy.rules.iter().flat_map(|rule| &rule.source_ports);
        let bounds = relevant.flat_map(|range| [Some(range.first), range.last.checked_add(1)]).flatten();
        starts.extend(bounds.filter(inside).take(MAX_TRIED));
    }
    let mut decisions: Vec<(PortRange, Decision)> = Vec::new();
    let starts: Vec<u16> = starts.into_iter().collect();
    for (index, first) in starts.iter().enumerate() {
        let next = starts.get(index + 1).map_or(u16::MAX, |next| next - 1);
        let last =
            ranges.iter().find(|range| range.contains(*first)).map_or(next, |range| range.last.min(next));
        let decision = follow(facts, judge, question, *first);
        match decisions.last_mut() {
            Some((range, before))
                if range.last.checked_add(1) == Some(*first) && same(&before.outcome, &decision.outcome) =>
            {
                range.last = last;
            }
            _ => decisions.push((PortRange { first: *first, last }, decision)),
        }
    }
    decisions
}

/// Follows the first packet of a connection to the hook that decides.
fn follow(facts: &Facts<'_>, judge: &Judge<'_>, question: &Question, source_port: u16) -> Decision {
    let Question { protocol, source, destination, destination_port, backend, .. } = *question;
    let mut packet = Packet {
        source,
        destination,
        protocol: protocol.0,
        source_port,
        destination_port,
        kind: Kind::Opening,
    };
    let class = judge.class(source);
    let hosted = facts.state.hosted(source).filter(|_| class == Class::Pod);
    let (hook, input) = match (class, hosted) {
        (Class::Local, _) => (Hook::ExternalEgress, 0),
        (_, Some(interface)) => (Hook::InternalIngress, interface),
        _ => (Hook::ExternalIngress, facts.lan_interface),
    };
    let mut place = Place { hook, input, mark: Mark::None };
    let mut outcome = judge.judge(place, &packet);
    let passed = match outcome {
        Outcome::Unjudged(mark) | Outcome::Followed(mark) => Some(mark),
        // The packet filter judges the end that it is translated to.
        Outcome::Allowed(direction, _)
        | Outcome::Denied(direction, Reason::no_rule | Reason::deny_rule, _)
            if !facts.by_ebpf && direction != direction::NODE_PORT =>
        {
            Some(Mark::Origin(source))
        }
        _ => None,
    };
    if let (Some(mark), Some((address, port))) = (passed, backend)
        && class != Class::Local
    {
        let to_pod = judge.class(address) == Class::Pod && facts.state.hosted(address).is_some();
        (packet.destination, packet.destination_port) = (address, port);
        let hook = if to_pod { Hook::InternalEgress } else { Hook::ExternalEgress };
        place = Place { hook, input, mark };
        outcome = judge.judge(place, &packet);
    }
    let sides = match direction_of(&outcome) {
        Some(direction::INBOUND) => {
            Some(Sides { direction: Direction::Inbound, external: packet.source, pod: packet.destination })
        }
        Some(direction::OUTBOUND) => {
            Some(Sides { direction: Direction::Outbound, external: packet.destination, pod: packet.source })
        }
        _ => None,
    };
    Decision { hook: place.hook, outcome, sides, packet }
}

const fn direction_of(outcome: &Outcome) -> Option<u8> {
    match outcome {
        Outcome::Allowed(direction, _) | Outcome::Denied(direction, ..) => Some(*direction),
        Outcome::Known(flow) | Outcome::Handshake(flow) => Some(flow.direction),
        Outcome::Unjudged(_) | Outcome::Followed(_) => None,
    }
}

const fn reason_of(outcome: &Outcome) -> Option<Reason> {
    match outcome {
        Outcome::Allowed(..) => Some(Reason::new_flow),
        Outcome::Denied(_, reason, _) => Some(*reason),
        Outcome::Known(_) => Some(Reason::established),
        Outcome::Handshake(_) | Outcome::Unjudged(_) | Outcome::Followed(_) => None,
    }
}

const fn rule_of(outcome: &Outcome) -> Option<u32> {
    match outcome {
        Outcome::Allowed(_, rule) => Some(*rule),
        Outcome::Denied(_, _, rule) => *rule,
        _ => None,
    }
}

fn verdict(facts: &Facts<'_>, outcome: &Outcome) -> Verdict {
    match outcome {
        Outcome::Known(KnownFlow { audit: true, .. }) => Verdict::Audit,
        Outcome::Known(KnownFlow { unrestricted: true, .. })
        | Outcome::Unjudged(_)
        | Outcome::Followed(_) => Verdict::Unjudged,
        Outcome::Known(_) | Outcome::Allowed(..) => Verdict::Allow,
        Outcome::Handshake(_) => Verdict::Depends,
        Outcome::Denied(..) if facts.policy.mode == Mode::Audit => Verdict::Audit,
        Outcome::Denied(..) => Verdict::Deny,
    }
}

fn rule_name(judge: &Judge<'_>, index: u32) -> String {
    let rule = judge.policy.rules.get(index as usize);
    rule.map_or_else(|| NODE_PORTS_RULE.to_owned(), |rule| rule.name.clone())
}

fn hook_stage(facts: &Facts<'_>, decision: &Decision) -> Stage {
    let why = match decision.hook {
        Hook::ExternalIngress => "it comes from the LAN",
        Hook::InternalIngress => "it comes from a pod",
        Hook::InternalEgress => "it is translated first, and then goes to a pod",
        Hook::ExternalEgress
            if matches!(decision.outcome, Outcome::Unjudged(_)) && decision.sides.is_none() =>
        {
            "it leaves by an interface towards the LAN"
        }
        Hook::ExternalEgress => "it is translated first, and then goes to the LAN",
    };
    let outcome = if facts.live { StageOutcome::Ok } else { StageOutcome::Unknown };
    let why = if facts.live {
        why.to_owned()
    } else {
        format!("{why}; whether it is attached, only the node knows")
    };
    Stage::new("hook", outcome, decision.hook.name(), why)
}

fn flow_stage(facts: &Facts<'_>, Decision { outcome, packet, .. }: &Decision) -> Stage {
    if !facts.live {
        return Stage::new("flow", StageOutcome::Unknown, "not read", "a new connection is assumed");
    }
    let tables = [(FlowTable::Established, "established"), (FlowTable::HalfOpen, "half-open")];
    let known = tables.into_iter().find_map(|(table, name)| Some((name, facts.state.flow(table, packet)?)));
    let (seen, why) = match (known, outcome) {
        (Some((table, _)), Outcome::Known(_)) => {
            (format!("known, {table}"), "its packets pass without a look at the rules")
        }
        (Some((table, _)), _) => {
            (format!("known, {table}"), "a packet that asks for a new connection is judged all the same")
        }
        (None, _) => ("not known".to_owned(), "its first packet is judged"),
    };
    Stage::new("flow", StageOutcome::Ok, seen, why)
}

fn rules_stage(judge: &Judge<'_>, decisions: &[(PortRange, Decision)]) -> Stage {
    let (_, decision) = decisions[0];
    let count = judge.policy.rules.len();
    let one = |outcome: &Outcome| match outcome {
        Outcome::Allowed(_, rule) => format!("{} allows it", rule_name(judge, *rule)),
        Outcome::Denied(_, _, Some(rule)) => format!("{} denies it", rule_name(judge, *rule)),
        Outcome::Denied(_, Reason::no_rule, None) => "no rule matches".to_owned(),
        Outcome::Denied(_, reason, None) => format!("not asked: {}", reason.name()),
        Outcome::Known(_) | Outcome::Handshake(_) => "not asked".to_owned(),
        Outcome::Unjudged(_) | Outcome::Followed(_) => "none restricts it".to_owned(),
    };
    if decisions.iter().any(|(_, other)| !same(&other.outcome, &decision.outcome)) {
        let each: Vec<String> =
            decisions.iter().map(|(range, other)| format!("{range}: {}", one(&other.outcome))).collect();
        return Stage::new("rules", StageOutcome::Unknown, each.join("; "), "the source port decides");
    }
    let why = match decision.outcome {
        Outcome::Allowed(direction::NODE_PORT, _) => "nodePorts.allow has the port".to_owned(),
        Outcome::Denied(direction::NODE_PORT, Reason::no_rule, _) => {
            let node_ports = judge.policy.node_ports.as_ref();
            let allow = node_ports.map(|node_ports| nearly::ports(&node_ports.allow)).unwrap_or_default();
            let range = node_ports.map(|node_ports| node_ports.range.to_string()).unwrap_or_default();
            format!("nodePorts.range {range} is judged by nodePorts.allow alone: {allow}")
        }
        Outcome::Allowed(direction, _)
        | Outcome::Denied(direction, Reason::no_rule | Reason::deny_rule, _) => {
            let name = direction::NAMES[usize::from(direction)];
            match decision.sides {
                Some(Sides { external, .. }) if judge.class(external) != Class::External => {
                    format!("{name}: {external} is not in networks.external, so no rule can match")
                }
                _ => format!("{name}; of {count} rules a deny wins, then the first allow"),
            }
        }
        Outcome::Denied(_, reason, _) => reason.text().to_owned(),
        Outcome::Known(_) => "the flow was let in before".to_owned(),
        Outcome::Handshake(_) if decision.packet.protocol == ip::SCTP => {
            "its verification tag decides".to_owned()
        }
        Outcome::Handshake(_) => "its sequence numbers decide".to_owned(),
        Outcome::Unjudged(_) | Outcome::Followed(_) => unjudged(judge, &decision.packet).to_owned(),
    };
    let outcome = match decision.outcome {
        Outcome::Denied(..) => StageOutcome::Deny,
        Outcome::Handshake(_) => StageOutcome::Unknown,
        _ => StageOutcome::Ok,
    };
    Stage::new("rules", outcome, one(&decision.outcome), why)
}

/// Returns the rule in audit mode that would decide, and whether it allows.
fn audited(judge: &Judge<'_>, decision: &Decision) -> Option<(String, bool)> {
    let Sides { direction, external, pod } = decision.sides?;
    if judge.class(external) != Class::External
        || !matches!(
            decision.outcome,
            Outcome::Allowed(..) | Outcome::Denied(_, Reason::no_rule | Reason::deny_rule, _)
        )
    {
        return None;
    }
    let rules = &judge.policy.audited;
    let (rule, action) = reference::winner(rules, direction, external, pod, &decision.packet.for_rules())?;
    Some((rules.get(rule as usize)?.name.clone(), action == Action::Allow))
}

fn audited_stage(judge: &Judge<'_>, decision: &Decision) -> Option<Stage> {
    let (name, allows) = audited(judge, decision)?;
    let seen = format!("{name} would {} it", if allows { "allow" } else { "deny" });
    Some(Stage::new(
        "audited rules",
        StageOutcome::Ok,
        seen,
        "its mode is audit, so it is counted and decides nothing",
    ))
}

/// Returns why no rule restricts a packet.
fn unjudged(judge: &Judge<'_>, packet: &Packet) -> &'static str {
    match (judge.class(packet.source), judge.class(packet.destination)) {
        (Class::Local, _) => "the node itself sends it",
        (Class::Pod, _) if judge.state.hosted(packet.source).is_none() => {
            "it comes from a pod of another node, which judges it"
        }
        (Class::Node, _) => "traffic inside the cluster is not judged",
        (Class::Pod, Class::Pod | Class::Node) => "traffic inside the cluster is not judged",
        (Class::Pod, _) => {
            "rules are about networks.external alone; for a Service, name the address behind it with --backend"
        }
        (_, Class::Pod) => "only the node of the pod judges",
        (_, Class::Local) => "the node itself is not protected, but for nodePorts.range",
        _ => "neither end is a pod of this node; for a Service, name the pod behind it with --backend",
    }
}

fn answer_stage(facts: &Facts<'_>, decision: &Decision) -> Stage {
    let Outcome::Denied(_, reason, _) = decision.outcome else {
        return Stage::new("answer", StageOutcome::Unknown, "", "");
    };
    let rejects = facts.policy.on_deny == OnDeny::Reject;
    if facts.policy.mode == Mode::Audit {
        let why = "enforcement.mode is audit";
        return Stage::new("answer", StageOutcome::Ok, "none: it passes, and is counted as audited", why);
    }
    let (seen, why) =
        match (is_rejected(&decision.packet, decision.hook, reason, rejects), decision.packet.protocol) {
            (true, 6) => ("an RST", "the client reports \"connection refused\" at once"),
            (true, _) => ("an ICMP port unreachable", "the client reports \"connection refused\" at once"),
            (false, _) if rejects => {
                ("none: dropped", "this hook, protocol or reason has no answer: the client times out")
            }
            (false, _) => ("none: dropped", "enforcement.onDeny is drop: the client times out"),
        };
    Stage::new("answer", StageOutcome::Deny, seen, why)
}

/// Returns the change that allows a denied connection.
fn remedy(judge: &Judge<'_>, question: &Question, decision: &Decision) -> Option<Remedy> {
    let plain = |text: String| Some(Remedy { text, config: None, policy: None });
    match decision.outcome {
        Outcome::Denied(_, Reason::deny_rule, Some(rule)) => {
            let name = rule_name(judge, rule);
            plain(format!("narrow or remove the rule {name}: a deny wins over every allow"))
        }
        Outcome::Denied(direction::NODE_PORT, Reason::no_rule, _) => {
            let port = question.destination_port;
            Some(Remedy {
                text: "add the port to nodePorts.allow, which allows it to all of networks.external"
                    .to_owned(),
                config: Some(format!("nodePorts:\n  allow: [{}]\n", allow_with(judge, port))),
                policy: None,
            })
        }
        Outcome::Denied(_, Reason::no_rule, _) => {
            let sides = decision.sides?;
            if judge.class(sides.external) != Class::External {
                let address = sides.external;
                return plain(format!("add a network with {address} to networks.external, and then a rule"));
            }
            let rule = nearly::rule(judge, sides, &decision.packet)?;
            let name = rule.name.as_str().to_owned();
            let rule_text = "add a rule to bridge.yaml, or apply the same as a BridgePolicy";
            let by_port = nearly::nearly(judge, sides, &decision.packet)
                .into_iter()
                .find(|one| one.criterion == Criterion::SourcePorts);
            if let Some((name, true)) = audited(judge, decision) {
                return plain(format!("set `mode: enforce` for the rule {name}, or for its policy"));
            }
            let text = match by_port {
                Some(nearly) => format!(
                    "let the client take a source port of {} (`bridge-agent exec`, docs/port-pool.md), or {rule_text}",
                    nearly.has
                ),
                None => rule_text.to_owned(),
            };
            Some(Remedy::of_rules(text, &name, &[rule]))
        }
        _ => None,
    }
}

fn allow_with(judge: &Judge<'_>, port: u16) -> String {
    let allow = judge.policy.node_ports.iter().flat_map(|node_ports| &node_ports.allow);
    let known =
        allow.map(|range| if range.first == range.last { range.to_string() } else { format!("\"{range}\"") });
    known.chain([port.to_string()]).collect::<Vec<_>>().join(", ")
}

fn summary(explanation: &Explanation, decisions: &[(PortRange, Decision)]) -> String {
    let by = explanation.rule.as_ref().map(|rule| format!(" by rule {rule}")).unwrap_or_default();
    let reason = || {
        let reason = explanation.reason.as_deref().unwrap_or_default();
        let text = Reason::ALL.iter().find(|one| one.name() == reason).map_or("", |reason| reason.text());
        format!("{reason}: {text}")
    };
    match explanation.verdict {
        Verdict::Allow => format!("ALLOWED{by}"),
        Verdict::Deny => format!("DENIED{by} ({})", reason()),
        Verdict::Audit => format!("AUDIT: would be denied{by} ({})", reason()),
        Verdict::Unjudged => "NOT JUDGED: bridge lets it pass".to_owned(),
        Verdict::Depends => {
            let allowed =
                |(_, decision): &&(PortRange, Decision)| matches!(decision.outcome, Outcome::Allowed(..));
            let ranges: Vec<PortRange> = decisions.iter().filter(allowed).map(|(range, _)| *range).collect();
            format!("DEPENDS on the source port: allowed from {}", nearly::ports(&ranges))
        }
    }
}

#[cfg(test)]
mod tests;
