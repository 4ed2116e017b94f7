//! The packet filters of the kernel: the rules of bridge in iptables and nftables, rules of others, and translations.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use super::node::Live;
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
        walk::{self, Interfaces, Packet},
    },
    model::Mode,
};

type Tables = BTreeMap<String, ObservedTable>;

/// The rules of the kernel as its tools print them.
pub(super) struct Filter {
    /// By back end and family.
    tables: Vec<(Backend, Family, Tables)>,
    nft: Option<Ruleset>,
}

/// The connection as netfilter sees its first packet.
struct Passage {
    before: Packet,
    after: Packet,
}

impl Passage {
    fn new(question: &Question, local: &[IpAddr]) -> Self {
        let packet = |(destination, destination_port): (IpAddr, u16)| Packet {
            source: question.source,
            source_port: question.source_port.unwrap_or_default(),
            destination,
            destination_port,
            protocol: question.protocol.0,
            icmp_type: if question.source.is_ipv4() { 8 } else { 128 },
            to_node: local.contains(&destination),
        };
        let asked = (question.destination, question.destination_port);
        Self { before: packet(asked), after: packet(question.backend.unwrap_or(asked)) }
    }

    fn interfaces<'a>(&self, live: &'a Live<'_>) -> Interfaces<'a> {
        Interfaces {
            input: live.interface(self.after.source),
            output: live.interface(self.after.destination).filter(|_| !self.after.to_node),
        }
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
        let passage = Passage::new(question, &live.local);
        let interfaces = Interfaces { output: None, ..passage.interfaces(live) };
        let of = |(_, tables)| others::translations(tables, &passage.before, interfaces);
        let mut found: BTreeSet<(IpAddr, u16)> = self.of_family(question.source).flat_map(of).collect();
        let way = Way { before: &passage.before, after: &passage.before, interfaces };
        found.extend(self.nft.iter().flat_map(|nft| nft.destinations(&way)));
        found.into_iter().filter(|to| *to != (question.destination, question.destination_port)).collect()
    }

    /// Adds the verdict of each packet filter, and a masquerade. `by_ebpf`: a program of eBPF judges it as well.
    pub(super) fn add_stages(&self, explanation: &mut Explanation, live: &Live<'_>, by_ebpf: bool) {
        let passage = Passage::new(&explanation.question, &live.local);
        let interfaces = passage.interfaces(live);
        let audit = live.active.policy.mode == Mode::Audit;
        let mut own = Vec::new();
        for (backend, tables) in self.of_family(passage.before.source) {
            own.extend(own_iptables(backend, tables, &passage, audit));
        }
        let way = Way { before: &passage.before, after: &passage.after, interfaces };
        own.extend(self.nft.as_ref().filter(|nft| nft.has_own()).map(|nft| own_nftables(nft, &way)));
        // In audit mode the last chain accepts a packet that enforce mode denies.
        for engine in &own {
            explanation.add(engine.stage(audit));
        }
        let known = explanation.stages.iter().any(|stage| stage.seen.starts_with("known"));
        if !known {
            note_engines(explanation, &own, by_ebpf);
        }
        self.add_others(explanation, &passage, &way);
    }

    fn add_others(&self, explanation: &mut Explanation, passage: &Passage, way: &Way<'_>) {
        let mut any = false;
        let (mut dropped, mut may, mut masqueraded) = (Vec::new(), Vec::new(), Vec::new());
        let mut may_masquerade = Vec::new();
        for (_, tables) in self.of_family(passage.before.source) {
            any = true;
            let found = others::others(tables, &passage.before, &passage.after, way.interfaces);
            let Others { dropped_by, may_drop, masqueraded_by, may_masquerade: perhaps } = found;
            may_masquerade.extend(perhaps);
            dropped.extend(dropped_by);
            may.extend(may_drop);
            masqueraded.extend(masqueraded_by);
        }
        if let Some(nft) = &self.nft {
            any = true;
            let walked = nft.walk(way, Owner::Others);
            if walked.passes == Some(false) {
                dropped.extend(walked.rule);
            } else if walked.passes.is_none() {
                may.extend(walked.may_drop);
            }
            let Masquerades { certain, possible } = nft.masquerades(way);
            masqueraded.extend(certain);
            may_masquerade.extend(possible);
        }
        if let Some(rule) = dropped.first() {
            let why = "a rule of another program; bridge does not change it";
            explanation.add(Stage::new("firewall", StageOutcome::Deny, dropped.join("; "), why));
            explanation.dropped_elsewhere(rule);
        } else if !may.is_empty() {
            let why = "conditions that are not known here decide";
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
        if !masqueraded.is_empty() {
            let why = "the other end sees an address of this node, and perhaps another source port";
            explanation.add(Stage::new("masquerade", StageOutcome::Ok, masqueraded.join("; "), why));
        } else if !may_masquerade.is_empty() {
            let why = "conditions that are not known here decide whether the other end sees an address of this node";
            explanation.add(Stage::new("masquerade", StageOutcome::Unknown, may_masquerade.join("; "), why));
        }
    }
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
    fn stage(&self, audit: bool) -> Stage {
        let by = self.by.as_ref().map(|by| format!(" by {by}")).unwrap_or_default();
        let (outcome, seen) = match self.passes {
            Some(true) => (StageOutcome::Ok, format!("passes{by}")),
            Some(false) if audit => (StageOutcome::Ok, format!("would be denied{by}")),
            Some(false) => (StageOutcome::Deny, format!("denied{by}")),
            None => {
                let rule = self.rule.as_deref().unwrap_or("a rule");
                (StageOutcome::Unknown, format!("not known: {rule} has conditions that are not read here"))
            }
        };
        let rule = self.rule.as_ref().map(|rule| format!(": {rule}")).unwrap_or_default();
        Stage::new(self.name, outcome, seen, format!("{}{rule}", self.chains.join(" > ")))
    }
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

/// Compares the packet filters with the verdict by the policy. Without eBPF theirs counts.
fn note_engines(explanation: &mut Explanation, engines: &[Engine], has_ebpf: bool) {
    let policy = match explanation.verdict {
        Judged::Allow | Judged::Unjudged => true,
        Judged::Deny | Judged::Audit => false,
        Judged::Depends => return,
    };
    for engine in engines.iter().filter(|engine| engine.passes.is_some_and(|passes| passes != policy)) {
        let passes = engine.passes == Some(true);
        let word = if passes { "lets it pass" } else { "denies it" };
        explanation.summary += &format!(
            "\n{} {word}: its rules in the kernel are not those of the policy; `bridge-agent status` shows repairs",
            engine.name
        );
        if !has_ebpf {
            explanation.verdict = if passes { Judged::Unjudged } else { Judged::Deny };
            explanation.rule.clone_from(&engine.by);
        }
    }
    if !has_ebpf && engines.is_empty() {
        explanation.summary +=
            "\nNothing of bridge in the kernel judges it: it passes, whatever the rules say";
        explanation.verdict = Judged::Unjudged;
    }
}
