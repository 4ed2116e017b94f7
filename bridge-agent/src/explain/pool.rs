//! The part of the port pool: the source ports that a client may get, and why it gets none of the pool.

use super::{Client, Hook, PoolFacts, Question, Stage, StageOutcome, nearly};
use crate::{config::PoolScope, model::PortRange};

/// The ports that Linux gives to clients by default (`net.ipv4.ip_local_port_range`).
const EPHEMERAL: PortRange = PortRange { first: 32768, last: 60999 };

/// The end that opens the connection, if no process is named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Opener {
    /// A pod; `pooled`: it has the annotation, and its control group is hooked.
    Pod { pooled: bool },
    /// This host.
    Host,
    /// Another host.
    Stranger,
}

/// The source ports that a client may get.
pub(super) struct Ports {
    pub(super) ranges: Vec<PortRange>,
    /// Where they are known from.
    pub(super) origin: String,
    /// The pool's part, if there is something to say.
    pub(super) stage: Option<Stage>,
}

/// Whether a client gets a port of the pool.
enum Share {
    Pool(String),
    Other(String),
    Open(String),
}

/// Returns the source ports that the client of a question may get.
pub(super) fn source_ports(facts: PoolFacts<'_>, opener: Opener, question: &Question) -> Ports {
    if !question.protocol.has_ports() {
        let ranges = vec![PortRange { first: 0, last: 0 }];
        return Ports { ranges, origin: String::new(), stage: None };
    }
    let given = question.source_port.map(|port| PortRange { first: port, last: port });
    let ephemeral = facts.ephemeral.unwrap_or(EPHEMERAL);
    if opener == Opener::Stranger && facts.client.is_none() {
        return without(given, EPHEMERAL, None);
    }
    let Some(pool) = facts.scope.filter(|pool| !pool.ports.is_empty()) else {
        let stage = facts.client.map(|client| {
            let why = "the kernel chooses the port; `portPool` gives connections ports that rules can name";
            let seen = format!("{} gets no port of a pool: no portPool is configured", client.name);
            Stage::new("pool", StageOutcome::Ok, seen, why)
        });
        return without(given, ephemeral, stage);
    };
    let share = share(pool, facts.client, opener, question);
    let (outcome, seen, why) = match &share {
        Share::Pool(why) => (StageOutcome::Ok, format!("one of {}", nearly::ports(&pool.ports)), why),
        Share::Other(why) => (StageOutcome::Ok, "no port of the pool".to_owned(), why),
        Share::Open(why) => (StageOutcome::Unknown, "perhaps a port of the pool".to_owned(), why),
    };
    let (outcome, seen) = match given {
        // A port that the program binds itself, or that a packet had.
        Some(given) if pool.ports.iter().any(|range| range.contains(given.first)) => {
            (StageOutcome::Ok, format!("{given} is a port of the pool"))
        }
        Some(given) if pool.strict && facts.client.is_some() && matches!(share, Share::Pool(_)) => {
            let seen =
                format!("{given} is no port of the pool: `connect` is refused, since portPool.strict is on");
            (StageOutcome::Deny, seen)
        }
        Some(given) => (StageOutcome::Ok, format!("{given} is no port of the pool")),
        None => (outcome, seen),
    };
    let stage = Some(Stage::new("pool", outcome, seen, why.clone()));
    match (given, share) {
        (Some(_), _) | (None, Share::Other(_)) => without(given, ephemeral, stage),
        (None, Share::Pool(_)) => {
            let origin = "the pool gives one to each connection".to_owned();
            Ports { ranges: pool.ports.clone(), origin, stage }
        }
        (None, Share::Open(_)) => {
            let mut ranges = pool.ports.clone();
            ranges.push(ephemeral);
            Ports { ranges, origin: "of the pool, or any that Linux gives to clients".to_owned(), stage }
        }
    }
}

fn without(given: Option<PortRange>, ephemeral: PortRange, stage: Option<Stage>) -> Ports {
    let (range, origin) = match given {
        Some(given) => (given, "as given"),
        None => (ephemeral, "not given: any port that Linux gives to clients"),
    };
    Ports { ranges: vec![range], origin: origin.to_owned(), stage }
}

/// Decides whether the pool serves the client. The hook sees the destination that the program names, before any translation.
fn share(pool: &PoolScope, client: Option<&Client>, opener: Opener, question: &Question) -> Share {
    const TCP: u8 = 6;
    const UDP: u8 = 17;
    if !matches!(question.protocol.0, TCP | UDP) {
        return Share::Other(format!("the pool serves TCP and UDP, not {}", question.protocol));
    }
    let to = question.destination;
    if !pool.destinations.iter().any(|network| network.contains(&to)) {
        let networks: Vec<String> = pool.destinations.iter().map(ToString::to_string).collect();
        let of = networks.join(", ");
        return Share::Other(format!("{to} is no destination of the pool: portPool.destinations is {of}"));
    }
    let groups = pool.cgroups.join(", ");
    let everything = pool.cgroups.iter().any(|group| group.trim_matches('/').is_empty());
    match (client, opener) {
        (Some(Client { name, cgroup, hook }), _) => match hook {
            Hook::By(group) if group == cgroup => {
                Share::Pool(format!("{name} is hooked by its control group {group}"))
            }
            Hook::By(group) => Share::Pool(format!("{name} is hooked by the control group {group}")),
            Hook::None => Share::Other(format!(
                "{name} is not hooked, by no control group from {cgroup} up: start it with `bridge-agent exec`, or add the group to \
                 portPool.transparent.cgroups"
            )),
            Hook::Unknown(why) => Share::Open(format!("{name}: {why}")),
        },
        (None, _) if everything => Share::Pool("the pool is for every process".to_owned()),
        (None, Opener::Host | Opener::Stranger) => {
            Share::Open("whether the process is hooked, --pid or --cgroup says".to_owned())
        }
        (None, Opener::Pod { pooled: true }) => {
            Share::Pool("the pod has the annotation, and its control group is hooked".to_owned())
        }
        (None, Opener::Pod { .. }) if pool.cgroups.is_empty() => Share::Other(
            "portPool.transparent has no control group, so only `bridge-agent exec`, leases and pods with the annotation get one"
                .to_owned(),
        ),
        (None, Opener::Pod { .. }) if pool.cgroups.iter().any(|group| holds_pods(group)) => {
            Share::Pool(format!("the pool is for {groups}"))
        }
        (None, Opener::Pod { .. }) => Share::Open(format!(
            "the pool is for {groups}: whether the process is there, --pid or --cgroup says"
        )),
    }
}

/// Whether a control group holds all pods of a node.
fn holds_pods(group: &str) -> bool {
    let last = group.trim_matches('/').rsplit('/').next().unwrap_or_default();
    last.is_empty() || matches!(last, "kubepods" | "kubepods.slice") || last.ends_with("-kubepods.slice")
}
