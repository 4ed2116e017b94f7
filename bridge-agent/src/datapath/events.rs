//! Verdicts on single packets, as the kernel side reports them.

use std::{
    collections::HashMap,
    io,
    net::IpAddr,
    time::{Duration, SystemTime},
};

use aya::maps::{MapData, RingBuf};
use bridge_common::filter::{
    counters::Reason,
    event::{Event, verdict},
    policy::direction,
};
use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;
use zerocopy::FromBytes as _;

use crate::kernel::clock;

use super::{
    error::{Error, Result},
    flows::{InvalidFilter, RuleNames, known, protocol_name},
    maps::{Maps, now},
};

/// The verdict on a packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "VerdictEvent")]
pub struct Verdict {
    /// When; RFC 3339, UTC.
    pub time: String,
    /// `allow`, `drop`, `reject`; `audit`: let through, but would have been denied; `audit-allow`: denied, but a rule in audit
    /// mode would have allowed it.
    pub verdict: String,
    /// Name of a [`Reason`].
    pub reason: String,
    /// `inbound`, `outbound` or `nodeport`.
    pub direction: String,
    /// `tcp`, `udp`, `sctp`, `icmp`, `icmpv6`, or a number.
    pub protocol: String,
    /// Source of the packet.
    pub source: IpAddr,
    /// Its port; for ICMP queries the identifier.
    pub source_port: u16,
    /// Destination of the packet.
    pub destination: IpAddr,
    /// Its port; for ICMP queries the identifier.
    pub destination_port: u16,
    /// The rule that decided, if one did.
    pub rule: Option<String>,
    /// Interface that the packet came in by: its name, or its index if it is gone.
    pub interface: String,
    /// Length from the link layer header on, in bytes.
    pub length: u32,
    /// Flags of a TCP header, type of an ICMP header.
    pub detail: u8,
    /// Number of the policy that judged it.
    pub generation: u32,
    /// Events of the same CPU that were kept back since its last one.
    pub suppressed: u32,
}

/// Selects verdicts; a `None` matches all.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct VerdictFilter {
    /// As shown.
    pub verdict: Option<String>,
    /// One side is in this network.
    #[schemars(with = "Option<String>")]
    pub address: Option<IpNet>,
    /// One side has this port.
    pub port: Option<u16>,
}

impl VerdictFilter {
    /// Refuses values that no verdict has.
    ///
    /// # Errors
    ///
    /// [`InvalidFilter`].
    pub fn checked(self) -> std::result::Result<Self, InvalidFilter> {
        known(self.verdict.as_ref(), &verdict::NAMES)?;
        if self.port == Some(0) { Err(InvalidFilter::Port) } else { Ok(self) }
    }

    /// Whether the verdict is meant.
    #[must_use]
    pub fn matches(&self, verdict: &Verdict) -> bool {
        self.verdict.as_ref().is_none_or(|name| *name == verdict.verdict)
            && self
                .address
                .is_none_or(|net| net.contains(&verdict.source) || net.contains(&verdict.destination))
            && self.port.is_none_or(|port| port == verdict.source_port || port == verdict.destination_port)
    }
}

/// Takes verdicts from the ring buffer.
pub struct EventReader {
    ring: AsyncFd<RingBuf<MapData>>,
    names: RuleNames,
    interfaces: HashMap<u32, String>,
}

impl std::fmt::Debug for EventReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EventReader").finish_non_exhaustive()
    }
}

impl EventReader {
    /// Inside a tokio runtime. Who reads takes: with two readers, each gets a part.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn new(maps: &Maps) -> Result<Self> {
        // SAFETY: the ring buffer owns its descriptor and gives out the same one for as long as it lives.
        let ring = unsafe { AsyncFd::register(maps.events()?) }
            .map_err(|error| Error::map("events")(error.into()))?;
        Ok(Self { ring, names: RuleNames::default(), interfaces: HashMap::new() })
    }

    /// Waits for verdicts and passes each to `visit`. May be cancelled. `maps` supplies the names of rules.
    ///
    /// # Errors
    ///
    /// Of `epoll`.
    pub async fn read(&mut self, maps: &Maps, mut visit: impl FnMut(Verdict)) -> io::Result<()> {
        let Self { ring, names, interfaces } = self;
        loop {
            let mut ready = ring.readable_mut().await?;
            let mut any = false;
            while let Some(item) = ready.get_inner_mut().next() {
                if let Ok((event, _)) = Event::read_from_prefix(&item) {
                    any = true;
                    visit(view(&event, maps, names, interfaces));
                }
            }
            ready.clear_ready();
            if any {
                return Ok(());
            }
        }
    }
}

fn view(event: &Event, maps: &Maps, names: &mut RuleNames, interfaces: &mut HashMap<u32, String>) -> Verdict {
    if event.rule > 0 && !names.knows(event.generation) {
        match maps.rule_names() {
            Ok(new) => {
                *names = new;
                // Not to be looked for again with each event.
                names.know(event.generation);
            }
            Err(error) => tracing::debug!(%error, "no names of rules"),
        }
    }
    let name =
        |names: &[&str], number: u8| names.get(usize::from(number)).map_or("?".into(), ToString::to_string);
    let interface = interfaces.entry(event.ifindex).or_insert_with(|| {
        crate::kernel::netlink::interface_name(event.ifindex).unwrap_or_else(|| event.ifindex.to_string())
    });
    Verdict {
        time: wall_clock(event.time),
        verdict: name(&verdict::NAMES, event.verdict),
        reason: Reason::ALL
            .get(usize::from(event.reason))
            .map_or("?".into(), |reason| reason.name().to_owned()),
        direction: name(&direction::NAMES, event.direction),
        protocol: protocol_name(event.protocol),
        source: event.source.into(),
        source_port: u16::from_be_bytes(event.source_port),
        destination: event.destination.into(),
        destination_port: u16::from_be_bytes(event.destination_port),
        rule: event
            .rule
            .checked_sub(1)
            .and_then(|index| names.get(event.generation, index))
            .map(ToOwned::to_owned),
        interface: interface.clone(),
        length: event.length,
        detail: event.detail,
        generation: event.generation,
        suppressed: event.suppressed,
    }
}

/// A moment of `CLOCK_MONOTONIC`, in nanoseconds, on the wall clock.
fn wall_clock(monotonic: u64) -> String {
    let ago = Duration::from_nanos(now().saturating_sub(monotonic));
    clock::at(SystemTime::now() - ago)
}

#[cfg(test)]
impl Verdict {
    /// A refused SYN of a LAN host.
    pub(crate) fn sample() -> Self {
        Self {
            time: "2026-01-02T03:04:05.000000Z".into(),
            verdict: "reject".into(),
            reason: "no_rule".into(),
            direction: "inbound".into(),
            protocol: "tcp".into(),
            source: [192, 168, 31, 67].into(),
            source_port: 50_000,
            destination: [10, 200, 1, 91].into(),
            destination_port: 22,
            rule: None,
            interface: "eth0".into(),
            length: 74,
            detail: 2,
            generation: 1,
            suppressed: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_means_either_side() {
        let verdict = Verdict::sample();
        for (filter, expected) in [
            (VerdictFilter::default(), true),
            (VerdictFilter { verdict: Some("reject".into()), ..Default::default() }, true),
            (VerdictFilter { verdict: Some("drop".into()), ..Default::default() }, false),
            (VerdictFilter { address: Some("10.200.1.0/24".parse().unwrap()), ..Default::default() }, true),
            (
                VerdictFilter { address: Some("192.168.31.67/32".parse().unwrap()), ..Default::default() },
                true,
            ),
            (VerdictFilter { address: Some("10.0.0.0/24".parse().unwrap()), ..Default::default() }, false),
            (VerdictFilter { port: Some(22), ..Default::default() }, true),
            (VerdictFilter { port: Some(50_000), ..Default::default() }, true),
            (VerdictFilter { port: Some(23), ..Default::default() }, false),
        ] {
            assert_eq!(filter.matches(&verdict), expected, "{filter:?}");
        }
    }
}
