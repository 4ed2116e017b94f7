//! The route stage: the route that bridge wants for a destination, the health of its next hops, and the choice of the kernel.

use std::{io, net::IpAddr};

use super::{
    Explanation, PoolFacts, Question, Remedy, Stage, StageOutcome, Verdict, nearly,
    pool::{Opener, Ports, source_ports},
};
use crate::{
    kernel::netlink::Way,
    routes::{NextHop, RouteStatus, Snapshot, State, Target},
};

/// The way of packets to an address, as bridge wants it and as the kernel has it.
#[derive(Clone, Debug)]
pub struct RouteFacts {
    to: IpAddr,
    /// The longest desired route that holds the address.
    wanted: Option<RouteStatus>,
    /// Its next hops; `None`: whether they answer is not known.
    hops: Vec<(IpAddr, Option<bool>)>,
    /// The kernel's choice, or why there is none.
    kernel: Result<Way, String>,
}

impl RouteFacts {
    /// Compares desired routes with the choice of the kernel. `None` for `routes`: none are configured.
    #[must_use]
    pub fn new(to: IpAddr, routes: Option<&Snapshot>, kernel: io::Result<Way>) -> Self {
        let found = routes.and_then(|snapshot| snapshot.covering(to));
        let answers = |hop: &NextHop| {
            let mut known = routes.into_iter().flat_map(Snapshot::next_hops);
            (hop.via, known.find(|known| known.address == hop.via).map(|known| known.up))
        };
        let hops = match found.as_ref().map(|(desired, _)| &desired.target) {
            Some(Target::Forward { via, backup }) => via.iter().chain(backup).map(answers).collect(),
            _ => Vec::new(),
        };
        Self { to, wanted: found.map(|(_, row)| row), hops, kernel: kernel.map_err(|error| refusal(&error)) }
    }

    /// Returns the stages; the first that denies is the cause.
    #[must_use]
    pub fn stages(&self) -> Vec<Stage> {
        let mut stages = vec![self.wanted()];
        stages.extend(self.next_hops());
        stages.push(self.kernel());
        stages
    }

    /// Returns the route to add where the kernel has none, and none is wanted.
    fn remedy(&self) -> Option<Remedy> {
        if self.wanted.is_some() || self.kernel.is_ok() {
            return None;
        }
        let to = ipnet::IpNet::from(self.to);
        let text = "add the network of the pod to `routes`, with the address of its node (docs/routes.md), or follow the cluster";
        let config = format!("routes:\n  static:\n  - {{to: \"{to}\", via: NODE}}\n");
        Some(Remedy { text: text.to_owned(), config: Some(config), policy: None })
    }

    fn wanted(&self) -> Stage {
        let Some(row) = &self.wanted else {
            let seen = format!("bridge wants no route to {}", self.to);
            let why = "no entry of `routes` holds it; `bridge-agent routes list` has all";
            return Stage::new("route", StageOutcome::Unknown, seen, why);
        };
        let origin = if row.origin.is_empty() { String::new() } else { format!(" {}", row.origin) };
        let why = row.reason.clone().unwrap_or_else(|| format!("wanted by {}{origin}", row.source));
        let outcome = match row.state {
            State::Installed | State::Partial => StageOutcome::Ok,
            State::Pending | State::Shadowed => StageOutcome::Unknown,
            State::Refused | State::Down | State::Failed => StageOutcome::Deny,
        };
        Stage::new("route", outcome, format!("{}: {}", row.route, row.state), why)
    }

    fn next_hops(&self) -> Option<Stage> {
        if self.hops.is_empty() {
            return None;
        }
        let shown: Vec<String> = self
            .hops
            .iter()
            .map(|(hop, up)| match up {
                Some(true) => format!("{hop} answers"),
                Some(false) => format!("{hop} does not answer"),
                None => format!("{hop} is not examined"),
            })
            .collect();
        let all_down = self.hops.iter().all(|(_, up)| *up == Some(false));
        let unknown = self.hops.iter().any(|(_, up)| up.is_none());
        let (outcome, why) = match (all_down, unknown) {
            (true, _) => {
                (StageOutcome::Deny, "check that the node runs, and that it is on the same link (`ip neigh`)")
            }
            (false, true) => (StageOutcome::Unknown, "`bridge-agent doctor --only host` asks for it"),
            (false, false) => (StageOutcome::Ok, "routes.health"),
        };
        Some(Stage::new("next hop", outcome, shown.join(", "), why))
    }

    fn kernel(&self) -> Stage {
        const NAME: &str = "kernel route";
        let way = match &self.kernel {
            Ok(way) => way,
            Err(why) => {
                return Stage::new(NAME, StageOutcome::Deny, format!("none to {}", self.to), why.as_str());
            }
        };
        let of_wanted = way.via.is_some_and(|via| self.hops.iter().any(|(hop, _)| *hop == via));
        let (outcome, why) = match (&self.wanted, way.via) {
            _ if way.local => (StageOutcome::Ok, "an address of this host"),
            (_, None) => (StageOutcome::Ok, "the destination is on the link"),
            (Some(_), Some(_)) if of_wanted => (StageOutcome::Ok, "the next hop of the wanted route"),
            (Some(_), Some(_)) => (
                StageOutcome::Deny,
                "not a next hop of the wanted route: another route comes first (`ip route get`)",
            ),
            (None, Some(_)) => {
                (StageOutcome::Unknown, "whether that router knows the way to pods, only it knows")
            }
        };
        Stage::new(NAME, outcome, way.show(), why)
    }
}

/// Returns the meaning of the kernel's refusal.
#[must_use]
pub(crate) fn refusal(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::ENETUNREACH) => "no route in the kernel's tables, and no default route".to_owned(),
        Some(libc::EHOSTUNREACH) => {
            "a route refuses it (unreachable), or forwarding is off (net.ipv4.ip_forward)".to_owned()
        }
        Some(libc::EACCES) => "a route prohibits it".to_owned(),
        Some(libc::EXDEV) => {
            "rp_filter drops it: answers to its source leave by another interface".to_owned()
        }
        Some(libc::EINVAL) => {
            "a blackhole route drops it, or its source cannot come from there (martian, rp_filter)".to_owned()
        }
        _ => error.to_string(),
    }
}

/// Explains a connection on a LAN host: its own routes, to the destination, or back to the source, and its port pool. `local`: its
/// addresses.
#[must_use]
pub fn on_host(
    question: &Question,
    local: &[IpAddr],
    pool: PoolFacts<'_>,
    ways: &dyn Fn(IpAddr) -> RouteFacts,
) -> Explanation {
    let Question { source, destination, .. } = *question;
    let own = |address: &IpAddr| local.contains(address);
    let end = |name: &str, address: IpAddr| {
        let seen = if own(&address) { "this host" } else { "no address of this host" };
        Stage::new(name, StageOutcome::Ok, format!("{address} is {seen}"), "")
    };
    let mut stages = vec![end("source", source), end("destination", destination)];
    if own(&source) {
        let Ports { ranges, origin, stage } = source_ports(pool, Opener::Host, question);
        stages.extend(stage);
        if question.protocol.has_ports() {
            stages.push(Stage::new("source port", StageOutcome::Ok, nearly::ports(&ranges), origin));
        }
    }
    let mut remedy = None;
    let other = match (own(&source), own(&destination)) {
        (true, _) => Some(("", destination)),
        (false, true) => Some(("way back: ", source)),
        (false, false) => None,
    };
    let judged = "NOT JUDGED here: the node of the pod judges it; `bridge-agent explain` there has the rules";
    let summary = match other {
        None => format!("NOT KNOWN here: neither end is an address of this host\n{judged}"),
        Some((back, to)) => {
            let route = ways(to);
            remedy = route.remedy();
            let of_route = route.stages();
            let cause = of_route.iter().find(|stage| stage.outcome == StageOutcome::Deny);
            let summary = match cause {
                None => judged.to_owned(),
                Some(stage) => {
                    let way = if back.is_empty() { "NO WAY" } else { "NO WAY BACK" };
                    format!("{way} to {to}: {} ({})", stage.seen, stage.why)
                }
            };
            stages.extend(
                of_route.into_iter().map(|stage| Stage { name: format!("{back}{}", stage.name), ..stage }),
            );
            summary
        }
    };
    Explanation {
        question: *question,
        verdict: Verdict::Unjudged,
        direction: None,
        reason: None,
        rule: None,
        summary,
        stages,
        nearly: Vec::new(),
        remedy,
        ports: Vec::new(),
    }
}
