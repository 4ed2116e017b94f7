//! The flow table: which connections are known, as an operator wants to see them.

use crate::kernel::bpf;
use std::{
    collections::HashMap,
    net::IpAddr,
    sync::atomic::{AtomicBool, Ordering},
};

use aya::maps::MapData;
use bridge_common::{
    filter::{
        control::{SLOTS, Settings},
        fast_path::{Control, Lease, Outcome, ticks},
        flow::{Flow, FlowKey, flag, state},
        flow_cache::stamp_of,
        policy::{RuleInfo, direction},
    },
    protocol,
};
use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    ends::ends,
    error::{Error, Result},
    maps::{Maps, now},
};

/// A flow, from the side that opened it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FlowView {
    /// `tcp`, `udp`, `sctp`, `icmp`, `icmpv6`, or a number.
    pub protocol: String,
    /// Who opened the flow.
    pub source: IpAddr,
    /// Its port; for ICMP queries the identifier.
    pub source_port: u16,
    /// To whom.
    pub destination: IpAddr,
    /// Its port; for ICMP queries the identifier.
    pub destination_port: u16,
    /// `inbound`, `outbound` or `nodeport`.
    pub direction: String,
    /// One of [`state::NAMES`].
    pub state: String,
    /// Seconds since the last packet. The kernel side notes packets once a second.
    pub idle_seconds: u64,
    /// Seconds since the first packet.
    pub age_seconds: u64,
    /// Name of the rule that admitted it; `None` if it was taken over from conntrack, or if the policy is forgotten.
    pub rule: Option<String>,
    /// Number of the policy that admitted it; 0: taken over from conntrack.
    pub generation: u32,
    /// Would have been denied, but for audit mode.
    pub audit: bool,
    /// Taken over from conntrack at first start.
    pub seeded: bool,
    /// Whether its packets take the fast path: `yes`, or the name of the [`Outcome`] that says why not. Of single packets
    /// (SYN, FIN, fragments) only the counters show.
    #[serde(default)]
    pub fast_path: String,
}

/// Selects flows; a `None` matches all.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct FlowFilter {
    /// One side is in this network.
    #[schemars(with = "Option<String>")]
    pub address: Option<IpNet>,
    /// One side has this port.
    pub port: Option<u16>,
    /// As shown.
    pub state: Option<String>,
    /// As shown.
    pub protocol: Option<String>,
}

impl FlowFilter {
    /// Whether the flow is meant.
    #[must_use]
    pub fn matches(&self, flow: &FlowView) -> bool {
        self.address.is_none_or(|net| net.contains(&flow.source) || net.contains(&flow.destination))
            && self.port.is_none_or(|port| port == flow.source_port || port == flow.destination_port)
            && self.state.as_ref().is_none_or(|state| *state == flow.state)
            && self.protocol.as_ref().is_none_or(|protocol| *protocol == flow.protocol)
    }
}

/// How full the flow tables are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FlowCounts {
    /// Flows of which both directions were seen, expired ones not counted.
    pub established: u64,
    /// How many there is room for.
    pub established_capacity: u32,
    /// Flows that wait for a reply, expired ones not counted.
    pub half_open: u64,
    /// How many there is room for.
    pub half_open_capacity: u32,
}

/// Names of the rules of the policies that are still held, by number of the policy.
#[derive(Clone, Debug, Default)]
pub struct RuleNames(HashMap<u32, Names>);

/// The names of the rules of one policy, one behind the other: 100,000 of them take 2 MB.
#[derive(Clone, Debug, Default)]
struct Names {
    text: String,
    /// Where each of them ends.
    ends: Vec<usize>,
}

impl Names {
    fn push(&mut self, name: &str) {
        self.text.push_str(name);
        self.ends.push(self.text.len());
    }

    fn get(&self, index: usize) -> Option<&str> {
        let start = index.checked_sub(1).map_or(Some(0), |before| self.ends.get(before).copied())?;
        self.text.get(start..*self.ends.get(index)?)
    }
}

impl RuleNames {
    /// The name of rule `index` of policy `generation`.
    #[must_use]
    pub fn get(&self, generation: u32, index: u32) -> Option<&str> {
        self.0.get(&generation)?.get(index as usize)
    }

    /// Whether the policy was looked for.
    pub(super) fn knows(&self, generation: u32) -> bool {
        self.0.contains_key(&generation)
    }

    /// The policy was looked for, and may not have been found.
    pub(super) fn know(&mut self, generation: u32) {
        self.0.entry(generation).or_default();
    }
}

/// Returns the name of a rule in the maps.
pub(super) fn rule_name(rule: &RuleInfo) -> String {
    let end = rule.name.iter().position(|byte| *byte == 0).unwrap_or(rule.name.len());
    String::from_utf8_lossy(&rule.name[..end]).into_owned()
}

/// A protocol as it is shown.
#[must_use]
pub fn protocol_name(number: u8) -> String {
    match number {
        1 => "icmp".into(),
        6 => "tcp".into(),
        17 => "udp".into(),
        58 => "icmpv6".into(),
        132 => "sctp".into(),
        other => other.to_string(),
    }
}

/// Returns the shown form of a protocol that is given by name or number.
#[must_use]
pub fn protocol_of(text: &str) -> Option<String> {
    const NAMES: [&str; 5] = ["icmp", "tcp", "udp", "icmpv6", "sctp"];
    let text = text.to_ascii_lowercase();
    match text.parse::<u8>() {
        Ok(number) if number.to_string() == text => Some(protocol_name(number)),
        _ => NAMES.contains(&text.as_str()).then_some(text),
    }
}

/// A value of a filter that no flow can have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidFilter {
    #[error("{0:?} is no protocol; write tcp, udp, sctp, icmp, icmpv6, or a number from 0 to 255")]
    Protocol(String),
    #[error("{given:?} is not known here; write one of {}", .known.join(", "))]
    Name { given: String, known: &'static [&'static str] },
    #[error("port 0 is no port; write one from 1 to 65535")]
    Port,
}

impl FlowFilter {
    /// Brings the filter into the form in which flows show these values.
    ///
    /// # Errors
    ///
    /// [`InvalidFilter`].
    pub fn checked(mut self) -> std::result::Result<Self, InvalidFilter> {
        if let Some(text) = self.protocol.take() {
            self.protocol = Some(protocol_of(&text).ok_or(InvalidFilter::Protocol(text))?);
        }
        known(self.state.as_ref(), &state::NAMES[1..])?;
        if self.port == Some(0) { Err(InvalidFilter::Port) } else { Ok(self) }
    }
}

/// Refuses a name that is not one of these.
pub(super) fn known(
    given: Option<&String>,
    known: &'static [&'static str],
) -> std::result::Result<(), InvalidFilter> {
    match given {
        Some(given) if !known.contains(&given.as_str()) => {
            Err(InvalidFilter::Name { given: given.clone(), known })
        }
        _ => Ok(()),
    }
}

impl Maps {
    /// The names of all rules that are still held.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn rule_names(&self) -> Result<RuleNames> {
        let names = |slot| {
            let mut names = Names::default();
            self.each_rule(slot, |_, rule| names.push(&rule_name(&rule)))?;
            Ok(names)
        };
        (0..SLOTS).map(|slot| self.of_one_policy(|| slot, names)).collect::<Result<_>>().map(RuleNames)
    }

    /// Visits the flows that `filter` means and that have not expired.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn for_each_flow(&self, filter: &FlowFilter, mut visit: impl FnMut(FlowView)) -> Result<()> {
        let (names, settings, now) = (self.rule_names()?, self.active_settings()?, now());
        let fast = self.fast_path().control();
        for (name, map) in self.flow_tables() {
            bpf::for_each(bpf::fd(map), |key: FlowKey, flow: Flow| {
                if !is_expired(&flow, &settings, now) {
                    let view = view(&key, &flow, &names, fast, now);
                    if filter.matches(&view) {
                        visit(view);
                    }
                }
            })
            .map_err(Error::map(name))?;
        }
        Ok(())
    }

    /// Forgets the flows that `filter` means: their next packet is judged as if it opened a flow. Returns how many
    /// there were.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn delete_flows(&self, filter: &FlowFilter) -> Result<u64> {
        let (names, fast, now) = (RuleNames::default(), Control::default(), now());
        let mut deleted = 0;
        for (name, map) in self.flow_tables() {
            let mut doomed = Vec::new();
            bpf::for_each(bpf::fd(map), |key: FlowKey, flow: Flow| {
                if filter.matches(&view(&key, &flow, &names, fast, now)) {
                    doomed.push(key);
                }
            })
            .map_err(Error::map(name))?;
            for key in doomed {
                deleted += u64::from(bpf::delete(bpf::fd(map), &key).map_err(Error::map(name))?);
                self.forget_cached(&key);
            }
        }
        Ok(deleted)
    }

    /// Removes flows that have expired, so that a full table evicts none that is alive. Returns how many; `ended` stops it.
    /// None while a policy is on trial: the timeouts of the one before it may be longer.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn remove_expired_flows(&self, ended: &AtomicBool) -> Result<u64> {
        if self.trial()?.is_some() {
            return Ok(0);
        }
        let settings = self.active_settings()?;
        let stamp = self.shares.last_overflow();
        let rebuild = self.flow_filter.rebuild();
        let (mut removed, mut count) = (0, self.shares.count());
        // Flows leave the last table for the others: in this order none is missed.
        let mut tables = self.flow_tables();
        tables.rotate_right(1);
        for (name, map) in tables {
            let (mut expired, mut alive) = (Vec::new(), 0);
            let start = now();
            bpf::for_each(bpf::fd(map), |key: FlowKey, flow: Flow| {
                // Also if it has expired: a later policy may give it more time.
                rebuild.note(&key);
                if is_expired(&flow, &settings, start) {
                    expired.push(key);
                    return;
                }
                alive += 1;
                if matches!(name, "flows" | "other_flows") {
                    count.add(&key, &flow);
                }
            })
            .map_err(Error::map(name))?;
            if name == "overflow" && alive == 0 {
                self.shares.end_overflow(stamp);
            }
            for key in expired {
                if ended.load(Ordering::Relaxed) {
                    return Ok(removed);
                }
                // Its ports may have been used again meanwhile.
                let flow: Option<Flow> = bpf::lookup(bpf::fd(map), &key).map_err(Error::map(name))?;
                if flow.is_some_and(|flow| is_expired(&flow, &settings, now())) {
                    removed += u64::from(bpf::delete(bpf::fd(map), &key).map_err(Error::map(name))?);
                }
            }
        }
        self.shares.replace(&count);
        rebuild.finish();
        Ok(removed)
    }

    /// How many flows are known.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn count_flows(&self) -> Result<FlowCounts> {
        let (settings, now) = (self.active_settings()?, now());
        let count = |name: &'static str, map: &MapData| -> Result<_> {
            let mut count = 0;
            bpf::for_each(bpf::fd(map), |_: FlowKey, flow: Flow| {
                count += u64::from(!is_expired(&flow, &settings, now));
            })
            .map_err(Error::map(name))?;
            let capacity = map.info().map_err(Error::aya_map(name))?.max_entries();
            Ok((count, capacity))
        };
        let mut counts = FlowCounts::default();
        for (name, map) in self.flow_tables() {
            let (alive, capacity) = count(name, map)?;
            let (sum, room) = match name {
                "half_open" => (&mut counts.half_open, &mut counts.half_open_capacity),
                _ => (&mut counts.established, &mut counts.established_capacity),
            };
            *sum += alive;
            *room += capacity;
        }
        Ok(counts)
    }

    /// Inserts flows that the kernel side has not seen begin. Known entries stay unchanged, except flows that it
    /// allowed in audit mode without attribution, which are replaced.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn seed_flows(&self, flows: &[(FlowKey, Flow)]) -> Result<usize> {
        const BPF_NOEXIST: u64 = 1;
        let mut seeded = 0;
        for (key, flow) in flows {
            self.flow_filter.note(key);
            if self.overflowed(key)?.is_some() {
                continue;
            }
            let (name, map) = self.established_table(key);
            match bpf::update(bpf::fd(map), key, flow, BPF_NOEXIST) {
                Ok(()) => seeded += 1,
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                    let known = bpf::lookup(bpf::fd(map), key).map_err(Error::map(name))?;
                    if known.is_some_and(|known: Flow| known.flags & !flow.flags & flag::AUDIT != 0) {
                        bpf::update(bpf::fd(map), key, flow, 0).map_err(Error::map(name))?;
                        self.forget_cached(key);
                        seeded += 1;
                    }
                }
                Err(error) => return Err(Error::map(name)(error)),
            }
        }
        Ok(seeded)
    }

    /// To be called after something was made of a flow in the tables; see [`bridge_common::filter::flow_cache`].
    pub fn forget_cached(&self, key: &FlowKey) {
        if let Some(index) = stamp_of(key) {
            self.flow_stamps.add_one(index);
        }
    }

    /// TCP connections, flows of other protocols, those beyond the share of their initiator, flows that wait for a reply.
    pub(super) fn flow_tables(&self) -> [(&'static str, &MapData); 4] {
        [
            ("flows", &self.flows),
            ("other_flows", &self.other_flows),
            ("overflow", &self.overflow),
            ("half_open", &self.half_open),
        ]
    }

    /// The flow beyond the share of its initiator with this key.
    pub(super) fn overflowed(&self, key: &FlowKey) -> Result<Option<Flow>> {
        if self.shares.last_overflow() == 0 {
            return Ok(None);
        }
        bpf::lookup(bpf::fd(&self.overflow), key).map_err(Error::map("overflow"))
    }

    /// The table of an established flow within the share of its initiator.
    pub(super) fn established_table(&self, key: &FlowKey) -> (&'static str, &MapData) {
        let [connections, others, ..] = self.flow_tables();
        if key.protocol == protocol::TCP { connections } else { others }
    }
}

/// Whether packets may belong to a flow at `now`, in nanoseconds of `CLOCK_MONOTONIC`: it has not expired, and audit mode alone
/// has not let it in.
#[must_use]
pub fn is_usable(flow: &Flow, settings: &Settings, now: u64) -> bool {
    (flow.flags & flag::AUDIT == 0 || settings.audit != 0) && !is_expired(flow, settings, now)
}

/// As the kernel side sees it when it looks the flow up.
fn is_expired(flow: &Flow, settings: &Settings, now: u64) -> bool {
    time_left(flow, settings, now).is_none()
}

/// For how long a flow may go on to be silent, in nanoseconds; `None`: it has expired.
pub(super) fn time_left(flow: &Flow, settings: &Settings, now: u64) -> Option<u64> {
    let timeout = settings.timeouts.get(usize::from(flow.state)).copied().unwrap_or(0);
    timeout.checked_sub(now.saturating_sub(flow.last_seen))
}

fn view(key: &FlowKey, flow: &Flow, names: &RuleNames, fast: Control, now: u64) -> FlowView {
    const SECOND: u64 = 1_000_000_000;
    let (source, destination) = ends(key, flow.initiator);
    let name =
        |names: &[&str], number: u8| names.get(usize::from(number)).map_or("?".into(), ToString::to_string);
    FlowView {
        protocol: protocol_name(key.protocol),
        source: source.0,
        source_port: source.1,
        destination: destination.0,
        destination_port: destination.1,
        direction: name(&direction::NAMES, flow.direction),
        state: name(&state::NAMES, flow.state),
        idle_seconds: now.saturating_sub(flow.last_seen) / SECOND,
        age_seconds: flow.age(now) / SECOND,
        rule: names.get(flow.generation, flow.rule).map(ToOwned::to_owned),
        generation: flow.generation,
        audit: flow.flags & flag::AUDIT != 0,
        seeded: flow.flags & flag::SEEDED != 0,
        fast_path: fast_path(key, flow, fast, now).map_or("yes", Outcome::name).to_owned(),
    }
}

/// Why the packets of a flow do not take the fast path, as far as that is visible without them; `None`: those of one
/// direction do, if not of both.
fn fast_path(key: &FlowKey, flow: &Flow, fast: Control, now: u64) -> Option<Outcome> {
    if !matches!(key.protocol, protocol::TCP | protocol::UDP) {
        Some(Outcome::protocol)
    } else if fast.until <= now || !fast.allows(key.protocol) {
        Some(Outcome::off)
    } else if !flow.is_settled(key.protocol) {
        Some(Outcome::state)
    } else if flow.leases.iter().any(|lease| lease.holds(ticks(now), fast.epoch)) {
        None
    } else if flow.leases.iter().all(Lease::is_known) {
        Some(Outcome::expired)
    } else {
        Some(Outcome::unseen)
    }
}

#[cfg(test)]
mod tests {
    use bridge_common::filter::flow::END_LOW;

    use super::*;
    use bridge_common::filter::{fast_path::protocols, flow::END_HIGH};

    fn tcp(initiator: u8) -> FlowView {
        let mut key = FlowKey::default();
        let low = IpAddr::from([10, 200, 1, 91]).into();
        let high = IpAddr::from([192, 168, 31, 67]).into();
        let end = key.set(&low, 40_002_u16.to_be_bytes(), &high, 50_000_u16.to_be_bytes(), 6);
        assert_eq!(end, END_LOW);
        let flow = Flow { initiator, state: state::ESTABLISHED, last_seen: 1_000_000_000, ..Flow::default() };
        view(
            &key,
            &flow,
            &RuleNames(HashMap::from([(0, Names { text: "r".into(), ends: vec![1] })])),
            Control::default(),
            4_500_000_000,
        )
    }

    #[test]
    fn a_flow_is_shown_from_the_side_that_opened_it() {
        let inbound = tcp(END_HIGH);
        assert_eq!((inbound.source.to_string().as_str(), inbound.source_port), ("192.168.31.67", 50_000));
        assert_eq!((inbound.destination_port, inbound.idle_seconds), (40_002, 3));
        assert_eq!((inbound.state.as_str(), inbound.rule.as_deref()), ("established", Some("r")));
        assert_eq!(tcp(END_LOW).source_port, 40_002);
    }

    #[test]
    fn a_flow_tells_why_it_is_not_in_the_fast_path() {
        const NOW: u64 = 1 << 40;
        let on = Control { until: NOW + 1, epoch: 7, protocols: protocols::TCP };
        let key = |protocol| FlowKey { protocol, ..FlowKey::default() };
        let lease = |epoch, expires| Lease { epoch: Lease::epoch_of(epoch), expires, path: 1 };
        let flow = |state, leases| Flow { state, leases, ..Flow::default() };
        let (later, none) = (ticks(NOW) + 1, Lease::default());
        let established = flow(state::ESTABLISHED, [lease(7, later), lease(7, 0)]);
        for (key, flow, control, expected) in [
            (key(6), established, on, None),
            (key(6), established, Control { until: NOW, ..on }, Some(Outcome::off)),
            (key(17), flow(state::UDP_REPLIED, [lease(7, later); 2]), on, Some(Outcome::off)),
            (key(1), established, on, Some(Outcome::protocol)),
            (key(6), flow(state::FIN_WAIT, [lease(7, later); 2]), on, Some(Outcome::state)),
            (key(6), Flow { flags: flag::AUDIT, ..established }, on, Some(Outcome::state)),
            (key(6), flow(state::ESTABLISHED, [lease(6, later); 2]), on, Some(Outcome::expired)),
            (key(6), flow(state::ESTABLISHED, [lease(7, 0); 2]), on, Some(Outcome::expired)),
            (key(6), flow(state::ESTABLISHED, [lease(7, 0), none]), on, Some(Outcome::unseen)),
        ] {
            assert_eq!(fast_path(&key, &flow, control, NOW), expected, "{flow:?} {control:?}");
        }
    }

    #[test]
    fn a_filter_means_either_side() {
        let flow = tcp(END_LOW);
        for (filter, expected) in [
            (FlowFilter::default(), true),
            (FlowFilter { address: Some("192.168.31.0/24".parse().unwrap()), ..Default::default() }, true),
            (FlowFilter { address: Some("10.200.1.91/32".parse().unwrap()), ..Default::default() }, true),
            (FlowFilter { address: Some("10.200.1.92/32".parse().unwrap()), ..Default::default() }, false),
            (FlowFilter { port: Some(50_000), ..Default::default() }, true),
            (FlowFilter { port: Some(40_002), ..Default::default() }, true),
            (FlowFilter { port: Some(1), ..Default::default() }, false),
            (FlowFilter { state: Some("established".into()), ..Default::default() }, true),
            (FlowFilter { state: Some("reset".into()), ..Default::default() }, false),
            (FlowFilter { protocol: Some("udp".into()), ..Default::default() }, false),
        ] {
            assert_eq!(filter.matches(&flow), expected, "{filter:?}");
        }
    }
}
