//! `POST /v1/explain`: why a connection passes or does not, by the state of this node.

mod filter;
mod host;
mod node;
mod way;

use axum::{extract::State, http::StatusCode, response::Response};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use self::{filter::Filter, node::Live};
use super::{
    Problem,
    large::{Payload, Turn},
    no_ebpf,
    openapi::{Method, Operation},
};
use crate::{
    datapath::Verdict,
    explain::{
        self, Class, Client, Directory, Explanation, Facts, Judge, ParseError, PoolFacts, Question, Request,
        Stage, StageOutcome, Verdict as Judged,
    },
    pool::hooked,
    state::{ActivePolicy, Shared},
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
    let active = shared.active();
    if active.is_none() && shared.routes().is_none() && shared.pool().is_none() {
        return Err(no_ebpf());
    }
    // It runs iptables-save: for one client of a class at a time, and not on the thread that serves.
    let work = move || {
        let client = host::client(&shared, &request)?;
        let filter = Filter::read();
        let question = request.resolve(&Known { shared: &shared, filter: &filter })?;
        let mut explanation = match &active {
            None => host::explain(&shared, &question, client.as_ref())?,
            Some(active) => {
                let live = Live::new(&shared, active);
                let mut explanation = of_node(&live, &filter, client.as_ref(), &question);
                host::add_supply(&mut explanation, shared.pool().as_deref());
                explanation
            }
        };
        if let Some(event) = event {
            explanation.note_event(&event);
        }
        Ok::<_, Problem>(explanation)
    };
    turn.json(work).await
}

/// Names that the agent and the rules of kube-proxy know.
struct Known<'a> {
    shared: &'a Shared,
    filter: &'a Filter,
}

impl Directory for Known<'_> {
    fn pod(&self, namespace: &str, name: &str) -> Option<Vec<std::net::IpAddr>> {
        self.shared.pod_addresses(namespace, name)
    }

    fn service(&self, namespace: &str, name: &str) -> Option<Vec<(std::net::IpAddr, u16)>> {
        Some(self.filter.service(namespace, name))
    }
}

/// Explains a connection, with each address behind its destination where the node translates it.
fn of_node(live: &Live<'_>, filter: &Filter, client: Option<&Client>, question: &Question) -> Explanation {
    let backends = match question.backend {
        Some(_) => Vec::new(),
        None => filter.backends(question, live),
    };
    let Some((first, rest)) = backends.split_first() else {
        return of_connection(live, filter, client, question);
    };
    let behind =
        |backend| of_connection(live, filter, client, &Question { backend: Some(backend), ..*question });
    let mut explanation = behind(*first);
    let others: Vec<(_, Explanation)> = rest.iter().map(|backend| (*backend, behind(*backend))).collect();
    let shown: Vec<String> = backends.iter().map(|(address, port)| text_of(*address, *port)).collect();
    let why = "nat rules of this node translate the destination to one of these";
    explanation.stages.insert(2, Stage::new("service", StageOutcome::Ok, shown.join(", "), why));
    if others
        .iter()
        .any(|(_, other)| (other.verdict, &other.rule) != (explanation.verdict, &explanation.rule))
    {
        let each =
            std::iter::once((*first, &explanation)).chain(others.iter().map(|(one, other)| (*one, other)));
        let each: Vec<String> = each
            .map(|((address, port), one)| {
                let by = one.rule.as_ref().map(|rule| format!(" by {rule}")).unwrap_or_default();
                format!("{} {}{by}", text_of(address, port), one.verdict.name())
            })
            .collect();
        explanation.summary = format!("DEPENDS on the endpoint: {}", each.join("; "));
        explanation.verdict = Judged::Depends;
        (explanation.reason, explanation.rule) = (None, None);
    }
    explanation
}

fn text_of(address: std::net::IpAddr, port: u16) -> String {
    if port == 0 { address.to_string() } else { std::net::SocketAddr::new(address, port).to_string() }
}

fn of_connection(
    live: &Live<'_>,
    filter: &Filter,
    client: Option<&Client>,
    question: &Question,
) -> Explanation {
    let ActivePolicy { policy, pool, .. } = live.active;
    let of_node = live.local.contains(&question.source);
    let ephemeral = if of_node { hooked::ephemeral() } else { None };
    let facts = Facts {
        policy,
        local: &live.local,
        state: live,
        pool: PoolFacts { scope: pool.as_ref(), client, ephemeral },
        lan_interface: live.lan_interface(),
        live: true,
        by_ebpf: live.is_judged_by_ebpf(),
    };
    let mut explanation = explain::explain(&facts, question);
    let by_ebpf = live.complete(&mut explanation);
    let judge = Judge { policy, local: &live.local, state: live };
    // The node itself is on the link of its LAN hosts.
    if judge.class(question.source) == Class::External && judge.class(question.destination) != Class::Local {
        let to = question.destination;
        let seen = format!(
            "{} needs a route to {to} by this node; whether it has one, only it knows",
            question.source
        );
        let why = "there: `bridge-agent routes list`, or `ip route get`; `bridge-agent routes export` has the commands";
        explanation.stages.insert(2, Stage::new("lan route", StageOutcome::Unknown, seen, why));
    }
    let passed = filter.add_stages(&mut explanation, live, by_ebpf);
    way::add(&mut explanation, live, &judge, &passed);
    let is_known = explanation.stages.iter().any(|stage| stage.seen.starts_with("known"));
    if by_ebpf && !is_known && !matches!(explanation.verdict, Judged::Deny | Judged::Audit) {
        let source = passed.source.and_then(|new| {
            let to = question.backend.map_or(question.destination, |(address, _)| address);
            Some((new.address.or_else(|| way::masquerade(live, to))?, new.port))
        });
        let mut allowed = explanation.ports.iter().filter(|(_, verdict)| *verdict != Judged::Deny);
        let lost = allowed.find_map(|(range, _)| {
            let source = source.map(|(address, port)| (address, port.unwrap_or(range.first)));
            explain::lost(&facts, question, range.first, source)
        });
        if let Some(lost) = lost {
            explanation.lost(&lost, passed.rule.as_deref());
        }
    }
    explanation
}
