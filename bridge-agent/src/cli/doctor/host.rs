//! Routes of a LAN host.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, UdpSocket},
    time::{Duration, Instant},
};

use super::{Context, Finding};
use crate::routes::{Comparison, DesiredRoute, Setup, Target, Verdict};

/// The port of the discard protocol (RFC 863).
const DISCARD: u16 = 9;
/// Longest wait for answers to ARP.
const ANSWER: Duration = Duration::from_millis(1500);
const PAUSE: Duration = Duration::from_millis(20);

pub(super) fn check(context: &Context<'_>) -> Vec<Finding> {
    const CHECK: &str = "host.routes";
    let Some(config) = context.config.as_ref().filter(|config| config.routes.is_some()) else {
        return vec![Finding::not_run(CHECK, "no routes are configured")];
    };
    let state = context.global.state_directory().boot();
    let compared = Setup::offline(config, &state).and_then(|setup| Comparison::new(&setup));
    let comparison = match compared {
        Ok(comparison) => comparison,
        Err(error) => return vec![Finding::not_run(CHECK, error.to_string())],
    };
    let refusals: Vec<String> =
        comparison.plan.verdicts.iter().filter_map(Verdict::refusal).map(ToString::to_string).collect();
    let mut findings = Vec::new();
    if let Some(missing) = &comparison.missing {
        let remedy = "its routes stay unknown until the file is there";
        findings.push(Finding::warn("host.routes-file", missing.to_string(), remedy));
    }
    findings.push(match (refusals.first(), comparison.plan.operations.len()) {
        (Some(refusal), _) => {
            let (seen, remedy) = refusal.rsplit_once("; ").unwrap_or((refusal, "see `bridge-agent routes plan`"));
            Finding::fail(CHECK, format!("{} routes are refused: {seen}", refusals.len()), remedy)
        }
        (None, 0) => Finding::ok(CHECK, "every wanted route is in the kernel"),
        (None, due) => Finding::warn(
            CHECK,
            format!("{due} changes are due, see `bridge-agent routes plan`"),
            "LAN traffic to these pods takes another way: start the agent, or run `bridge-agent routes apply`",
        ),
    });
    findings.extend(next_hops(&comparison));
    findings
}

/// Asks each next hop on the link for its link layer address.
fn next_hops(comparison: &Comparison) -> Option<Finding> {
    const CHECK: &str = "host.next-hops";
    let of_route = |route: &DesiredRoute| match &route.target {
        Target::Forward { via, backup } => via.iter().chain(backup).map(|hop| hop.via).collect(),
        Target::Blackhole => Vec::new(),
    };
    let all = comparison.merged.routes.iter().flat_map(|route| of_route(route));
    let hops: BTreeSet<Ipv4Addr> = all
        .filter_map(|hop| match hop {
            IpAddr::V4(hop) => Some(hop),
            IpAddr::V6(_) => None,
        })
        .collect();
    if hops.is_empty() {
        return None;
    }
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    for hop in &hops {
        // A hop that is not on-link is a finding of its own.
        drop(socket.send_to(b"", (*hop, DISCARD)));
    }
    let deadline = Instant::now() + ANSWER;
    loop {
        let silent: Vec<String> =
            hops.iter().filter(|hop| !answers(**hop)).map(ToString::to_string).collect();
        if silent.is_empty() {
            return Some(Finding::ok(CHECK, format!("{} next hops answer ARP", hops.len())));
        }
        if Instant::now() > deadline {
            return Some(Finding::fail(
                CHECK,
                format!("no answer to ARP from {}", silent.join(", ")),
                "packets to these pods are lost: check that the node runs, and that it is on the same link",
            ));
        }
        std::thread::sleep(PAUSE);
    }
}

/// Whether the kernel knows the link layer address of a neighbour: bit 1 of the flags (`ATF_COM`).
fn answers(hop: Ipv4Addr) -> bool {
    let table = std::fs::read_to_string("/proc/self/net/arp").unwrap_or_default();
    let mut rows = table.lines().skip(1).map(str::split_whitespace);
    rows.any(|mut words| {
        let address = words.next().and_then(|address| address.parse().ok());
        let flags =
            words.nth(1).and_then(|flags| u8::from_str_radix(flags.trim_start_matches("0x"), 16).ok());
        address == Some(hop) && flags.is_some_and(|flags| flags & 2 != 0)
    })
}
