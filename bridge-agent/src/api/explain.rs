//! `POST /v1/explain`: why a connection passes or does not, by the state of this node.

use std::collections::BTreeMap;
use std::net::IpAddr;

use axum::{extract::State, http::StatusCode, response::Response};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    Problem,
    large::{Payload, Turn},
    no_ebpf,
    openapi::{Method, Operation},
};
use crate::{
    datapath::{Maps, Verdict},
    explain::{
        self, Explanation, Facts, FlowTable, KnownFlow, NftRules, NodeState, Packet, ParseError, Request,
        Stage, StageOutcome,
    },
    iptables::{
        self, Backend, Programs,
        observe::ObservedTable,
        others::{self, Others},
        ruleset::Family,
        walk,
    },
    state::{ActivePolicy, AttachedInterface, Shared},
};

/// The body of `POST /v1/explain`: one of the three.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Ask {
    /// A connection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connection: Option<Request>,
    /// An event, as `GET /v1/events` sends it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub event: Option<Verdict>,
    /// The latest event that denied a packet.
    #[serde(default)]
    pub last_denied: bool,
}

const HELP: &str = "write {\"connection\": {\"from\": \"192.168.31.67\", \"to\": \"10.200.1.91:8080\"}}, \
                    {\"event\": ...} or {\"lastDenied\": true}";

impl From<ParseError> for Problem {
    fn from(error: ParseError) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "request", error.to_string())
    }
}

/// A node as its maps and its agent know it.
struct Live<'a> {
    maps: &'a Maps,
    interfaces: &'a [AttachedInterface],
}

impl NodeState for Live<'_> {
    fn hosted(&self, pod: IpAddr) -> Option<u32> {
        self.maps.hosted_interface(pod)
    }

    // The question is about a packet of its own sender.
    fn leads_to(&self, _: IpAddr, _: u32) -> bool {
        true
    }

    fn is_external(&self, interface: u32) -> bool {
        self.interfaces.iter().any(|one| one.index == interface && one.role == "external")
    }

    fn has_tunnel(&self, protocol: u8, port: u16) -> bool {
        self.maps.has_tunnel(protocol, port)
    }

    fn flow(&self, table: FlowTable, packet: &Packet) -> Option<KnownFlow> {
        let (key, source) = packet.flow_key();
        let flow = self.maps.usable_flow(table == FlowTable::HalfOpen, &key).ok()??;
        Some(KnownFlow::new(&flow, source))
    }
}

pub(super) fn operation() -> Operation {
    Operation::new(
        Method::Post,
        "explain",
        "Explains why a connection passes or not, by the state of this node",
    )
    .answers::<Explanation>(StatusCode::OK)
    .body::<Ask>()
    .error(StatusCode::NOT_FOUND, "No packet was denied since the agent started")
    .needs_ebpf()
    .large()
}

pub(super) async fn explain(
    State(shared): State<Shared>,
    turn: Turn,
    Payload(body): Payload,
) -> Result<Response, Problem> {
    let bad = |text: String| Problem::new(StatusCode::BAD_REQUEST, "request", text);
    let ask: Ask = serde_json::from_slice(&body).map_err(|error| bad(format!("{error}; {HELP}")))?;
    let event = match (&ask.connection, ask.event, ask.last_denied) {
        (Some(_), None, false) => None,
        (None, Some(event), false) => Some(event),
        (None, None, true) => {
            let last = shared.last_denied().ok_or_else(|| {
                let text = "no packet was denied since the agent started, or events are limited to 0 a second \
                            (enforcement.events.rate)";
                Problem::new(StatusCode::NOT_FOUND, "no-denial", text)
            })?;
            Some((*last).clone())
        }
        _ => return Err(bad(HELP.to_owned())),
    };
    let request = match (&event, ask.connection) {
        (Some(event), _) => explain::Request::of_event(event)?,
        (None, Some(request)) => request,
        (None, None) => return Err(bad(HELP.to_owned())),
    };
    let (maps, active) = (shared.maps().ok_or_else(no_ebpf)?, shared.active().ok_or_else(no_ebpf)?);
    // It runs iptables-save: for one client of a class at a time, and not on the thread that serves.
    let work = move || {
        let question = request.resolve(&|namespace, name| shared.pod_addresses(namespace, name))?;
        let enforcement = shared.status().enforcement.unwrap_or_default();
        let live = Live { maps: &maps, interfaces: &enforcement.interfaces };
        let mut explanation = of_node(&active, &live, &question);
        if let Some(event) = event {
            explanation.note_event(&event);
        }
        Ok::<_, Problem>(explanation)
    };
    turn.json(work).await
}

fn of_node(active: &ActivePolicy, live: &Live<'_>, question: &explain::Question) -> Explanation {
    let external = live.interfaces.iter().find(|one| one.role == "external");
    let facts = Facts {
        policy: &active.policy,
        local: &active.local,
        state: live,
        pool: active.pool.as_ref(),
        lan_interface: external.map_or(0, |interface| interface.index),
        live: true,
    };
    let mut explanation = explain::explain(&facts, question);
    attachment(&mut explanation, live);
    firewall(&mut explanation, active, live);
    explanation
}

/// Completes the stage of the hook: which interfaces have it.
fn attachment(explanation: &mut Explanation, live: &Live<'_>) {
    let Some(stage) = explanation.stages.iter_mut().find(|stage| stage.name == "hook") else { return };
    let attached = live.maps.attached_interfaces().unwrap_or_default();
    let suffix = format!(" {}", stage.seen);
    let names: Vec<&str> = attached.iter().filter_map(|one| one.strip_suffix(suffix.as_str())).collect();
    if names.is_empty() {
        stage.outcome = StageOutcome::Unknown;
        stage.seen += ", attached to no interface: nothing is judged there";
    } else {
        const SHOWN: usize = 3;
        let more =
            if names.len() > SHOWN { format!(" and {} more", names.len() - SHOWN) } else { String::new() };
        stage.seen +=
            &format!(" on {}{more}", names.iter().take(SHOWN).copied().collect::<Vec<_>>().join(", "));
    }
}

/// Adds the verdict of other programs' rules in iptables, and their masquerade.
fn firewall(explanation: &mut Explanation, active: &ActivePolicy, live: &Live<'_>) {
    let question = explanation.question;
    let (destination, destination_port) =
        question.backend.unwrap_or((question.destination, question.destination_port));
    let name = |index: Option<u32>| {
        let index = index?;
        live.interfaces.iter().find(|one| one.index == index).map(|one| one.name.as_str())
    };
    let mut lan = live.interfaces.iter().filter(|one| one.role == "external");
    // With several, the route decides, which is not asked here.
    let lan = match (lan.next(), lan.next()) {
        (Some(one), None) => Some(one.name.as_str()),
        _ => None,
    };
    let side = |address: IpAddr| match live.hosted(address) {
        Some(index) => name(Some(index)),
        None => lan,
    };
    let packet = walk::Packet {
        source: question.source,
        source_port: question.source_port.unwrap_or_default(),
        destination,
        destination_port,
        protocol: question.protocol.0,
        icmp_type: if question.source.is_ipv4() { 8 } else { 128 },
        to_node: active.local.contains(&destination),
    };
    let interfaces = walk::Interfaces {
        input: side(question.source),
        output: side(destination).filter(|_| !packet.to_node),
    };
    let mut any = false;
    for backend in [Backend::Nft, Backend::Legacy] {
        let Some(tables) = tables(backend, question.source) else { continue };
        any = true;
        let Others { dropped_by, may_drop, masqueraded_by } = others::others(&tables, &packet, interfaces);
        if let Some(rule) = dropped_by {
            let why = "a rule of another program; bridge does not change it";
            explanation.add(Stage::new("firewall", StageOutcome::Deny, rule.clone(), why));
            explanation.dropped_elsewhere(&rule);
        } else if !may_drop.is_empty() {
            let why = "conditions that are not known here decide";
            explanation.add(Stage::new("firewall", StageOutcome::Unknown, may_drop.join("; "), why));
        }
        if let Some(rule) = masqueraded_by {
            let why = "the other end sees an address of this node, and perhaps another source port";
            explanation.add(Stage::new("masquerade", StageOutcome::Ok, rule, why));
        }
    }
    if let Some(NftRules { drops, masquerades }) = nft() {
        any = true;
        if !drops.is_empty() {
            let why = "chains of nftables that may drop it: their conditions are not read";
            explanation.add(Stage::new("firewall", StageOutcome::Unknown, drops.join("; "), why));
        }
        if !masquerades.is_empty() {
            let why =
                "chains of nftables that may give it an address of this node: their conditions are not read";
            explanation.add(Stage::new("masquerade", StageOutcome::Unknown, masquerades.join("; "), why));
        }
    }
    if !any {
        let why = "iptables-save is not installed here, or may not be run";
        explanation.add(Stage::new("firewall", StageOutcome::Unknown, "rules of others are not read", why));
    } else if !explanation.stages.iter().any(|stage| stage.name == "firewall") {
        let why = "by iptables-save and nft";
        explanation.add(Stage::new("firewall", StageOutcome::Ok, "no rule of another program drops it", why));
    }
}

/// Reads the chains of nftables.
fn nft() -> Option<NftRules> {
    let programs = Programs::default();
    let program = programs.find("nft")?;
    let output = programs.run(&program, ["--json", "list", "ruleset"], None).ok()?;
    output.status.success().then(|| NftRules::parse(&String::from_utf8_lossy(&output.stdout)))
}

/// Reads all tables of a back end.
fn tables(backend: Backend, source: IpAddr) -> Option<BTreeMap<String, ObservedTable>> {
    let programs = Programs::default();
    let family = if source.is_ipv4() { Family::V4 } else { Family::V6 };
    let program = programs.tool(family, backend, "-save").ok()?;
    let output = programs.run::<[&str; 0], &str>(&program, [], None).ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    output.status.success().then(|| iptables::observe::parse(&text))
}
