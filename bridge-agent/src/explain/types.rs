//! The parts of an explanation.

use std::net::IpAddr;

use bridge_common::filter::counters::Reason;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{NodeState, Question};
use crate::{
    config::PoolScope,
    datapath::Verdict as Event,
    model::{Policy, PortRange},
    policy::reference::Criterion,
};

/// The process that opens the connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Client {
    /// For people, such as `pid 4711 (curl)`.
    pub name: String,
    /// Path of its control group below the mount.
    pub cgroup: String,
    /// Whether the hooks of the pool see its sockets.
    pub hook: Hook,
}

/// Whether the hooks of the pool see the sockets of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hook {
    /// Those of this control group do.
    By(String),
    /// None does.
    None,
    /// Why that is not known.
    Unknown(String),
}

/// The facts about the pool and its client.
#[derive(Clone, Copy, Default)]
pub struct PoolFacts<'a> {
    /// The pool of this host.
    pub scope: Option<&'a PoolScope>,
    /// The process that opens the connection, if it is known.
    pub client: Option<&'a Client>,
    /// The ports that this host gives to clients, where the client is on it; `None`: those of Linux.
    pub ephemeral: Option<PortRange>,
}

/// The facts that an explanation is made of.
#[derive(Clone, Copy)]
pub struct Facts<'a> {
    /// The policy that judges.
    pub policy: &'a Policy,
    /// The addresses of the node.
    pub local: &'a [IpAddr],
    /// The rest of its state.
    pub state: &'a dyn NodeState,
    /// The port pool of the node.
    pub pool: PoolFacts<'a>,
    /// Index of an interface that leads to the LAN.
    pub lan_interface: u32,
    /// Whether the state is that of a running node.
    pub live: bool,
    /// Whether programs of eBPF judge. Without them the packet filter does, behind translations of the destination.
    pub by_ebpf: bool,
}

/// The verdict on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// A rule allows it, or it belongs to a flow that was let in.
    Allow,
    /// It is denied.
    Deny,
    /// It passes in audit mode only.
    Audit,
    /// No rule restricts it.
    Unjudged,
    /// Its source port, or sequence numbers, decide.
    Depends,
}

impl Verdict {
    /// The name, as it is shown and as cases write it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
            Self::Audit => "audit",
            Self::Unjudged => "unjudged",
            Self::Depends => "depends",
        }
    }
}

/// A step on the way of the connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Stage {
    /// Its name.
    pub name: String,
    /// The fact that counts.
    pub seen: String,
    /// Where the fact comes from, or its consequence.
    pub why: String,
    /// `ok`, `deny`, or `unknown`.
    pub outcome: StageOutcome,
}

/// The outcome of a stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum StageOutcome {
    /// The connection goes on.
    Ok,
    /// The connection ends here.
    Deny,
    /// The fact is not known here.
    Unknown,
}

impl Stage {
    pub(crate) fn new(
        name: &str,
        outcome: StageOutcome,
        seen: impl Into<String>,
        why: impl Into<String>,
    ) -> Self {
        Self { name: name.to_owned(), seen: seen.into(), why: why.into(), outcome }
    }
}

/// A rule that does not match because of one criterion.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Nearly {
    /// Name of the rule.
    pub rule: String,
    /// The criterion.
    pub criterion: Criterion,
    /// The values that the rule has.
    pub has: String,
    /// The value of the connection.
    pub asked: String,
}

/// The change of the configuration that would allow a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Remedy {
    /// The change, in a sentence.
    pub text: String,
    /// Lines for bridge.yaml.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<String>,
    /// The same as a BridgePolicy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
}

/// The explanation of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    /// The connection.
    pub question: Question,
    /// The verdict.
    pub verdict: Verdict,
    /// `inbound`, `outbound` or `nodeport`; `None`: it is not judged.
    pub direction: Option<String>,
    /// Name of a [`bridge_common::filter::counters::Reason`].
    pub reason: Option<String>,
    /// The rule that decides.
    pub rule: Option<String>,
    /// The verdict in a sentence.
    pub summary: String,
    /// The way of the connection.
    pub stages: Vec<Stage>,
    /// Rules that miss it by one criterion; at most [`MAX_NEARLY`].
    pub nearly: Vec<Nearly>,
    /// The change that would allow it.
    pub remedy: Option<Remedy>,
    /// The verdict by source port: each interval that rules distinguish.
    #[serde(skip)]
    pub(crate) ports: Vec<(PortRange, Verdict)>,
}

/// The most rules that [`Explanation::nearly`] has.
pub const MAX_NEARLY: usize = 5;

impl Explanation {
    /// Adds a stage of the node, before the answer.
    pub(crate) fn add(&mut self, stage: Stage) {
        let answer = self.stages.iter().position(|stage| stage.name == "answer").unwrap_or(self.stages.len());
        self.stages.insert(answer, stage);
    }

    /// Notes that another program drops the connection.
    pub(crate) fn dropped_elsewhere(&mut self, rule: &str) {
        self.summary += &format!("\nDROPPED by another firewall: {rule}");
    }

    /// Notes that another program may drop the connection: its rule has conditions that are not known. `place`: a part of a sentence.
    pub(crate) fn perhaps_dropped(&mut self, rule: &str, place: &str) {
        // The first such rule is enough: each has a stage.
        if self.verdict != Verdict::Deny && !self.summary.contains("\nPERHAPS DROPPED") {
            self.summary += &format!("\nPERHAPS DROPPED by another firewall{place}: {rule}");
        }
    }

    /// Notes that a rule of the node changes the source of what passes.
    pub(crate) fn masqueraded(&mut self, rule: &str) {
        if self.verdict != Verdict::Deny {
            self.summary += &format!("\nMASQUERADED: the other end sees an address of this node: {rule}");
        }
    }

    /// Notes the event that the question comes from: its packet may have been denied for another reason.
    pub(crate) fn note_event(&mut self, event: &Event) {
        let reason = Reason::ALL.iter().find(|reason| reason.name() == event.reason);
        let text = reason.map_or("", |reason| reason.text());
        let seen = format!("{} at {} on {}: {}", event.verdict, event.time, event.interface, event.reason);
        let outcome = match event.verdict.as_str() {
            "allow" | "audit" => StageOutcome::Ok,
            _ => StageOutcome::Deny,
        };
        self.stages.insert(0, Stage::new("event", outcome, seen, text));
        let by_rules = matches!(event.reason.as_str(), "no_rule" | "deny_rule" | "new_flow");
        if !by_rules {
            self.remedy = None;
            let now = std::mem::take(&mut self.summary);
            self.summary =
                format!("The packet of the event was not judged by rules: {text}\nA new connection: {now}");
        }
    }
}
