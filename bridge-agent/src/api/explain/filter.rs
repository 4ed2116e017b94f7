//! The packet filters of the kernel: the rules of bridge in iptables and nftables, rules of others, and translations.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use super::{
    node::Live,
    way::{self, Passed},
};
use crate::{
    explain::{
        Explanation, Question, Stage, StageOutcome, Verdict as Judged,
        nft::{Masquerades, Owner, Ruleset, Way},
    },
    iptables::{
        self, Backend, Programs,
        observe::{ObservedTable, OwnRules},
        others::{self, Others},
        ruleset::{Family, Table},
        walk::{self, Interfaces, NewSource, Packet, State},
    },
    model::{Mode, PortRange},
};

type Tables = BTreeMap<String, ObservedTable>;

/// The rules of the kernel as its tools print them.
pub(super) struct Filter {
    /// By back end and family.
    tables: Vec<(Backend, Family, Tables)>,
    nft: Option<Ruleset>,
}

/// A packet of the connection as netfilter sees it.
struct Passage {
    before: Packet,
    after: Packet,
}

impl Passage {
    fn new(question: &Question, source_ports: PortRange, local: &[IpAddr]) -> Self {
        let packet = |(destination, destination_port): (IpAddr, u16)| Packet {
            source: question.source,
            source_ports,
            destination,
            destination_port,
            protocol: question.protocol.0,
            icmp_type: if question.source.is_ipv4() { 8 } else { 128 },
            to_node: local.contains(&destination),
            from_node: local.contains(&question.source),
            state: State::New,
        };
        let asked = (question.destination, question.destination_port);
        Self { before: packet(asked), after: packet(question.backend.unwrap_or(asked)) }
    }

    fn interfaces<'a>(&self, live: &'a Live<'_>) -> Interfaces<'a> {
        Interfaces {
            input: live.interface(self.after.source).filter(|_| !self.after.from_node),
            output: live.interface(self.after.destination).filter(|_| !self.after.to_node),
        }
    }

    /// Its first answer, without translations.
    const fn reply(&self) -> Self {
        let reply = self.after.reply();
        Self { before: reply, after: reply }
    }

    /// The packet of the opener after that.
    const fn following(&self) -> Self {
        Self { before: self.before.following(), after: self.after.following() }
    }
}

impl Filter {
    /// Reads all rules that the tools of this node show.
    pub(super) fn read() -> Self {
        let programs = Programs::default();
        let save = |backend, family| {
            let program = programs.tool(family, backend, "-save").ok()?;
            let output = programs.run::<[&str; 0], &str>(&program, [], None).ok()?;
            let text = String::from_utf8_lossy(&output.stdout);
            output.status.success().then(|| iptables::observe::parse(&text))
        };
        let both = [Backend::Nft, Backend::Legacy].into_iter();
        let each = both.flat_map(|backend| Family::ALL.map(|family| (backend, family)));
        let tables =
            each.filter_map(|(backend, family)| Some((backend, family, save(backend, family)?))).collect();
        let nft = programs.find("nft").and_then(|program| {
            let arguments = ["--json", "--numeric", "list", "ruleset"];
            let output = programs.run(&program, arguments, None).ok()?;
            output.status.success().then(|| Ruleset::parse(&String::from_utf8_lossy(&output.stdout)))
        });
        Self { tables, nft }
    }

    fn of_family(&self, address: IpAddr) -> impl Iterator<Item = (Backend, &Tables)> {
        let wanted = if address.is_ipv4() { Family::V4 } else { Family::V6 };
        self.tables.iter().filter(move |one| one.1 == wanted).map(|one| (one.0, &one.2))
    }

    /// Returns addresses and ports of a Service by the rules of kube-proxy.
    pub(super) fn service(&self, namespace: &str, name: &str) -> Vec<(IpAddr, u16)> {
        let each = self.tables.iter().flat_map(|(.., tables)| others::service(tables, namespace, name));
        let of_nft = self.nft.iter().flat_map(|nft| nft.service(namespace, name));
        each.chain(of_nft).collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// Returns where the node may translate the destination of a connection to.
    pub(super) fn backends(&self, question: &Question, live: &Live<'_>) -> Vec<(IpAddr, u16)> {
        let passage =
            Passage::new(question, question.source_port.map_or(PortRange::ALL, PortRange::one), &live.local);
        let interfaces = Interfaces { output: None, ..passage.interfaces(live) };
        let of = |(_, tables)| others::translations(tables, &passage.before, interfaces);
        let mut found: BTreeSet<(IpAddr, u16)> = self.of_family(question.source).flat_map(of).collect();
        let way = Way { before: &passage.before, after: &passage.before, interfaces };
        found.extend(self.nft.iter().flat_map(|nft| nft.destinations(&way)));
        let redirected = |(address, port): (IpAddr, u16)| match address.is_unspecified() {
            true => Some((way::redirected(live, question.source)?, port)),
            false => Some((address, port)),
        };
        found
            .into_iter()
            .filter_map(redirected)
            .filter(|to| *to != (question.destination, question.destination_port))
            .collect()
    }

    /// Adds the verdict of each packet filter, and a masquerade. `by_ebpf`: a program of eBPF judges it as well.
    pub(super) fn add_stages(&self, explanation: &mut Explanation, live: &Live<'_>, by_ebpf: bool) -> Passed {
        let audit = live.active.policy.mode == Mode::Audit;
        let question = explanation.question;
        let each = |range: PortRange| Passage::new(&question, range, &live.local);
        let passages: Vec<Passage> = explanation.ports.iter().map(|(range, _)| each(*range)).collect();
        let engines: Vec<Vec<Engine>> =
            passages.iter().map(|passage| self.own(passage, live, audit)).collect();
        for engine in 0..engines.first().map_or(0, Vec::len) {
            let by_port =
                explanation.ports.iter().zip(&engines).map(|((range, _), own)| (*range, &own[engine]));
            explanation.add(stage_of(&by_port.collect::<Vec<_>>(), audit));
        }
        let known = explanation.stages.iter().any(|stage| stage.seen.starts_with("known"));
        if !known {
            note_engines(explanation, &engines, by_ebpf);
        }
        // Other programs see what bridge lets pass.
        let passed =
            explanation.ports.iter().zip(&passages).filter(|((_, verdict), _)| *verdict != Judged::Deny);
        let mut seen: Vec<&Passage> = passed.map(|(_, passage)| passage).collect();
        if seen.is_empty() {
            seen.extend(&passages);
        }
        let found = merge(seen.iter().map(|passage| self.others(passage, live, 0)).collect());
        let later = |packet: fn(&Passage) -> Passage| {
            let each = seen.iter().map(|passage| self.others(&packet(passage), live, found.connection_mark));
            merge(each.collect())
        };
        let (answers, following) = (later(Passage::reply), later(Passage::following));
        let rule = found.masqueraded.first().cloned();
        let passed = Passed { mark: found.mark, back: answers.mark, source: found.source, rule };
        let is_dropped = !found.dropped.is_empty();
        let is_open = !found.may_drop.is_empty();
        self.add_others(explanation, found);
        if !is_dropped {
            add_later(explanation, &answers, "on the way back", "firewall, back", "it is about the answers");
            if answers.dropped.is_empty() && !is_open {
                let why = "it is about the packets after the answer";
                add_later(explanation, &following, "after the answer", "firewall, later", why);
            }
        }
        passed
    }

    /// Walks the rules of bridge in each packet filter.
    fn own(&self, passage: &Passage, live: &Live<'_>, audit: bool) -> Vec<Engine> {
        let mut own: Vec<Engine> = self
            .of_family(passage.before.source)
            .filter_map(|(backend, tables)| own_iptables(backend, tables, passage, audit))
            .collect();
        let interfaces = passage.interfaces(live);
        let way = Way { before: &passage.before, after: &passage.after, interfaces };
        own.extend(self.nft.as_ref().filter(|nft| nft.has_own()).map(|nft| own_nftables(nft, &way)));
        own
    }

    /// Walks the rules of others.
    fn others(&self, passage: &Passage, live: &Live<'_>, connection_mark: u32) -> Foreign {
        let interfaces = passage.interfaces(live);
        let mut all = Foreign::default();
        for (_, tables) in self.of_family(passage.before.source) {
            let Passage { before, after } = passage;
            let found = others::others(tables, before, after, interfaces, Some(connection_mark));
            let Others { dropped_by, may_drop, masqueraded_by, may_masquerade, .. } = found;
            all.mark |= found.mark.unwrap_or_default();
            all.connection_mark |= found.connection_mark.unwrap_or_default();
            all.source = all.source.or(found.source);
            all.dropped.extend(dropped_by);
            all.may_drop.extend(may_drop);
            all.masqueraded.extend(masqueraded_by);
            all.may_masquerade.extend(may_masquerade);
        }
        if let Some(nft) = &self.nft {
            let way = Way { before: &passage.before, after: &passage.after, interfaces };
            let walked = nft.walk(&way, Owner::Others);
            all.mark |= walked.mark.and_then(|mark| u32::try_from(mark).ok()).unwrap_or_default();
            if walked.passes == Some(false) {
                all.dropped.extend(walked.rule);
            } else if walked.passes.is_none() {
                all.may_drop.extend(walked.may_drop);
            }
            let Masquerades { certain, possible, source } = match passage.after.state {
                State::New => nft.masquerades(&way),
                _ => Masquerades::default(),
            };
            all.source = all.source.or(source);
            all.masqueraded.extend(certain);
            all.may_masquerade.extend(possible);
        }
        all
    }

    fn add_others(&self, explanation: &mut Explanation, found: Foreign) {
        let Foreign { dropped, may_drop: may, masqueraded, may_masquerade, .. } = found;
        let family = explanation.question.source;
        let any = self.nft.is_some() || self.of_family(family).next().is_some();
        if let Some(rule) = dropped.first() {
            let why = "a rule of another program; bridge does not change it";
            explanation.add(Stage::new("firewall", StageOutcome::Deny, dropped.join("; "), why));
            explanation.dropped_elsewhere(rule);
        } else if !may.is_empty() {
            let why = "conditions that are not known here decide";
            explanation.perhaps_dropped(&may[0], "");
            explanation.add(Stage::new("firewall", StageOutcome::Unknown, may.join("; "), why));
        } else if any {
            let why = "by iptables-save and nft";
            let seen = "no rule of another program drops it";
            explanation.add(Stage::new("firewall", StageOutcome::Ok, seen, why));
        } else {
            let why = "neither iptables-save nor nft is installed here, or they may not be run";
            explanation.add(Stage::new(
                "firewall",
                StageOutcome::Unknown,
                "rules of others are not read",
                why,
            ));
        }
        if let Some(rule) = masqueraded.first() {
            if dropped.is_empty() {
                explanation.masqueraded(rule);
            }
            let why = "the other end sees an address of this node, and perhaps another source port; `bridge-agent doctor` \
                       says how to exclude LAN hosts";
            explanation.add(Stage::new("masquerade", StageOutcome::Ok, masqueraded.join("; "), why));
        } else if !may_masquerade.is_empty() {
            let why = "conditions that are not known here decide whether the other end sees an address of this node";
            explanation.add(Stage::new("masquerade", StageOutcome::Unknown, may_masquerade.join("; "), why));
        }
    }
}

/// The effect of the rules of other programs.
#[derive(Default)]
struct Foreign {
    dropped: Vec<String>,
    may_drop: Vec<String>,
    masqueraded: Vec<String>,
    may_masquerade: Vec<String>,
    /// The source that the packet gets.
    source: Option<NewSource>,
    mark: u32,
    connection_mark: u32,
}

/// Adds a stage where rules of others drop a later packet, or may do so.
fn add_later(explanation: &mut Explanation, later: &Foreign, place: &str, name: &str, why: &str) {
    let (outcome, rules) = match (later.dropped.first(), later.may_drop.first()) {
        (Some(rule), _) => {
            explanation.summary += &format!("\nDROPPED by another firewall, {place}: {rule}");
            (StageOutcome::Deny, &later.dropped)
        }
        (None, Some(rule)) => {
            explanation.perhaps_dropped(rule, &format!(", {place}"));
            (StageOutcome::Unknown, &later.may_drop)
        }
        (None, None) => return,
    };
    explanation.add(Stage::new(name, outcome, rules.join("; "), why));
}

/// Returns the effect on a connection whose source port is in one of several intervals: certain is only the effect on all.
fn merge(mut found: Vec<Foreign>) -> Foreign {
    let all_dropped = found.iter().all(|one| !one.dropped.is_empty());
    let all_masqueraded = found.iter().all(|one| !one.masqueraded.is_empty());
    let Some(mut first) = found.pop() else { return Foreign::default() };
    let demote = |certain: &mut Vec<String>, possible: &mut Vec<String>, all: bool| {
        if !all {
            possible.append(certain);
        }
    };
    demote(&mut first.dropped, &mut first.may_drop, all_dropped);
    demote(&mut first.masqueraded, &mut first.may_masquerade, all_masqueraded);
    let add = |to: &mut Vec<String>, from: Vec<String>| {
        for one in from {
            if !to.contains(&one) {
                to.push(one);
            }
        }
    };
    for mut one in found {
        demote(&mut one.dropped, &mut one.may_drop, all_dropped);
        demote(&mut one.masqueraded, &mut one.may_masquerade, all_masqueraded);
        add(&mut first.dropped, one.dropped);
        add(&mut first.may_drop, one.may_drop);
        add(&mut first.masqueraded, one.masqueraded);
        add(&mut first.may_masquerade, one.may_masquerade);
    }
    first
}

/// The rules of bridge in one packet filter, and their verdict.
struct Engine {
    name: &'static str,
    passes: Option<bool>,
    chains: Vec<String>,
    rule: Option<String>,
    by: Option<String>,
}

impl Engine {
    fn outcome(&self, audit: bool) -> StageOutcome {
        match self.passes {
            Some(false) if !audit => StageOutcome::Deny,
            Some(_) => StageOutcome::Ok,
            None => StageOutcome::Unknown,
        }
    }

    fn seen(&self, audit: bool) -> String {
        let by = self.by.as_ref().map(|by| format!(" by {by}")).unwrap_or_default();
        match self.passes {
            Some(true) => format!("passes{by}"),
            // In audit mode the last chain accepts a packet that enforce mode denies.
            Some(false) if audit => format!("would be denied{by}"),
            Some(false) => format!("denied{by}"),
            None => {
                let rule = self.rule.as_deref().unwrap_or("a rule");
                format!("not known: {rule} has conditions that are not read here")
            }
        }
    }
}

/// Returns the stage of a packet filter, by source port where that decides.
fn stage_of(by_port: &[(PortRange, &Engine)], audit: bool) -> Stage {
    let (_, first) = by_port[0];
    let outcome = first.outcome(audit);
    if by_port.iter().any(|(_, engine)| (engine.passes, &engine.by) != (first.passes, &first.by)) {
        let each = by_port.iter().map(|(range, engine)| format!("{range}: {}", engine.seen(audit)));
        let seen = each.collect::<Vec<_>>().join("; ");
        let same = by_port.iter().all(|(_, engine)| engine.outcome(audit) == outcome);
        let outcome = if same { outcome } else { StageOutcome::Unknown };
        return Stage::new(first.name, outcome, seen, "the source port decides");
    }
    let rule = first.rule.as_ref().map(|rule| format!(": {rule}")).unwrap_or_default();
    Stage::new(first.name, outcome, first.seen(audit), format!("{}{rule}", first.chains.join(" > ")))
}

fn own_iptables(backend: Backend, tables: &Tables, passage: &Passage, audit: bool) -> Option<Engine> {
    let family = if passage.before.source.is_ipv4() { Family::V4 } else { Family::V6 };
    if !tables.values().any(|table| table.own_chains().next().is_some()) {
        return None;
    }
    let own: BTreeMap<(Family, Table), OwnRules> = Table::ALL
        .into_iter()
        .filter_map(|table| Some(((family, table), tables.get(table.name())?.own())))
        .collect();
    let walked = walk::walk(&own, &passage.before, &passage.after, audit);
    let passes = walked.verdict.map(|verdict| verdict == walk::Verdict::Passes);
    let name = if backend == Backend::Nft { "iptables" } else { "iptables-legacy" };
    Some(Engine { name, passes, chains: walked.chains, rule: walked.rule, by: walked.name })
}

fn own_nftables(nft: &Ruleset, way: &Way<'_>) -> Engine {
    let walked = nft.walk(way, Owner::Bridge);
    let audited = walked.passes == Some(true) && walked.chains.last().is_some_and(|chain| chain == "deny");
    Engine {
        name: "nftables",
        passes: if audited { Some(false) } else { walked.passes },
        chains: walked.chains,
        rule: walked.rule,
        by: walked.name,
    }
}

/// Compares the packet filters, for each interval of source ports, with the verdict by the policy. Without eBPF theirs counts.
fn note_engines(explanation: &mut Explanation, by_port: &[Vec<Engine>], has_ebpf: bool) {
    let allowed = |verdict: Judged| match verdict {
        Judged::Allow | Judged::Unjudged => Some(true),
        Judged::Deny | Judged::Audit => Some(false),
        Judged::Depends => None,
    };
    let count = by_port.first().map_or(0, Vec::len);
    for engine in 0..count {
        let each: Vec<(&Engine, Option<bool>)> = explanation
            .ports
            .iter()
            .zip(by_port)
            .map(|((_, verdict), own)| (&own[engine], allowed(*verdict)))
            .collect();
        let differs = |(engine, policy): &&(&Engine, Option<bool>)| {
            engine.passes.zip(*policy).is_some_and(|(a, b)| a != b)
        };
        let Some((first, _)) = each.iter().find(differs) else { continue };
        let passes = first.passes == Some(true);
        let word = if passes { "lets it pass" } else { "denies it" };
        explanation.summary += &format!(
            "\n{} {word}: its rules in the kernel are not those of the policy; `bridge-agent status` shows repairs",
            first.name
        );
        if !has_ebpf {
            let uniform = each.iter().all(|(one, _)| one.passes == first.passes);
            explanation.verdict = match (uniform, passes) {
                (false, _) => Judged::Depends,
                (true, true) => Judged::Unjudged,
                (true, false) => Judged::Deny,
            };
            explanation.rule = if uniform { first.by.clone() } else { None };
        }
    }
    if !has_ebpf && count == 0 {
        explanation.summary +=
            "\nNothing of bridge in the kernel judges it: it passes, whatever the rules say";
        explanation.verdict = Judged::Unjudged;
    }
}
