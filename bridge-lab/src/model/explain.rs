//! A third opinion: `bridge-agent explain`, about every packet that it can be asked about.

use std::{collections::HashMap, net::IpAddr};

use anyhow::Result;
use aya::maps::{Array, HashMap as BpfMap, MapData};
use bridge_agent::{
    datapath::{Hook, is_usable, now},
    explain::{self, FlowTable, Judge, Kind, KnownFlow, Mark, NodeState, Outcome, Packet},
    model::OnDeny,
};
use bridge_common::filter::{
    control::Settings,
    counters::Reason,
    flow::{Flow, FlowKey},
    policy::RuleHits,
};

use super::{
    flow::Segment,
    header::{self, Content, Header, IcmpKind},
    verdict::Regime,
};
use crate::prog::{Action, Judged, LAN_INTERFACE, NODE_ADDRESSES, Node, Place, TUNNELS};

/// Asks `explain` about packets, with the state of the programs.
pub(super) struct Explainer {
    local: Vec<IpAddr>,
    hosted: HashMap<IpAddr, u32>,
    flows: BpfMap<MapData, FlowKey, Flow>,
    other_flows: BpfMap<MapData, FlowKey, Flow>,
    overflow: BpfMap<MapData, FlowKey, Flow>,
    half_open: BpfMap<MapData, FlowKey, Flow>,
    /// By regime.
    slots: Vec<Slot>,
    active: usize,
}

/// The settings of a policy, and the hits of its rules by CPU.
struct Slot {
    settings: Settings,
    hits: Array<MapData, RuleHits>,
}

/// A packet that was asked about.
pub(super) struct Answer {
    outcome: Outcome,
    /// The hits of its rule before the packet.
    hits: u64,
    packet: Packet,
    /// No option, extension header or VLAN tag keeps it from being answered; nor does a flag.
    plain: bool,
}

impl Explainer {
    /// `slots`: where the policies of the regimes are.
    pub(super) fn new(node: &mut Node, slots: &[u32]) -> Result<Self> {
        let slots = slots.iter().map(|slot| {
            Ok(Slot { settings: node.datapath().maps.settings(*slot)?, hits: node.rule_hits(*slot)? })
        });
        let slots = slots.collect::<Result<_>>()?;
        Ok(Self {
            local: NODE_ADDRESSES.iter().filter_map(|address| address.parse().ok()).collect(),
            hosted: HashMap::new(),
            flows: node.flow_table("flows")?,
            other_flows: node.flow_table("other_flows")?,
            overflow: node.flow_table("overflow")?,
            half_open: node.flow_table("half_open")?,
            slots,
            active: 0,
        })
    }

    pub(super) fn activate(&mut self, index: usize) {
        self.active = index;
    }

    pub(super) fn host(&mut self, pod: IpAddr, interface: u32) {
        if interface == 0 {
            self.hosted.remove(&pod);
        } else {
            self.hosted.insert(pod, interface);
        }
    }

    /// Asks about a packet that is about to come. `None`: it neither opens a flow nor says by itself which it belongs to, or its
    /// sequence numbers or verification tag decide.
    pub(super) fn ask(&self, place: Place, frame: &[u8], regimes: &[Regime]) -> Result<Option<Answer>> {
        let Some(header) = header::frame(frame) else { return Ok(None) };
        let Some(packet) = packet(&header) else { return Ok(None) };
        let judge = Judge { policy: &regimes[self.active].policy, local: &self.local, state: self };
        let ingress = matches!(place.hook, Hook::ExternalIngress | Hook::InternalIngress);
        let input = if ingress { LAN_INTERFACE } else { place.input };
        let outcome = judge.judge(explain::Place { hook: place.hook, input, mark: Mark::None }, &packet);
        let tagged = matches!(&header.content, Content::Sctp(chunk) if !chunk.is_init());
        if matches!(outcome, Outcome::Handshake(_)) || (tagged && matches!(outcome, Outcome::Known(_))) {
            return Ok(None);
        }
        let hits = self.hits(&outcome)?;
        let reset = matches!(&header.content, Content::Tcp(segment) if segment.flags & header::RST != 0);
        Ok(Some(Answer { outcome, hits, packet, plain: header.plain && !reset }))
    }

    /// Returns how the programs differ from an answer, if they do.
    pub(super) fn check(
        &self,
        answer: &Answer,
        place: Place,
        seen: &Judged,
        regimes: &[Regime],
    ) -> Result<Option<(String, String)>> {
        let Answer { outcome, hits, plain, .. } = answer;
        let slot = &self.slots[self.active];
        let ingress = matches!(place.hook, Hook::ExternalIngress | Hook::InternalIngress);
        let (mut counted, mut audited) = (None, None);
        let mut denied = false;
        match *outcome {
            Outcome::Known(flow) if ingress && !flow.unrestricted => {
                let reason = Some((flow.direction, Reason::established));
                if flow.audit { audited = reason } else { counted = reason }
            }
            Outcome::Unjudged(_) | Outcome::Followed(_) | Outcome::Known(_) | Outcome::Handshake(_) => {}
            Outcome::Allowed(direction, _) => counted = Some((direction, Reason::new_flow)),
            Outcome::Denied(direction, reason, _) if slot.settings.audit != 0 => {
                audited = Some((direction, reason));
            }
            Outcome::Denied(direction, reason, _) => {
                counted = Some((direction, reason));
                denied = true;
            }
        }
        let rejects =
            regimes[self.active].policy.on_deny == OnDeny::Reject && slot.settings.answers_per_second != 0;
        let action = if seen.action == Action::Next { "passes" } else { "denied" };
        let expected = (
            if denied { "denied" } else { "passes" },
            counted,
            audited,
            u64::from(self.rule(outcome).is_some()),
        );
        let hits = self.hits(outcome)?.wrapping_sub(*hits);
        let found = (action, seen.counted, seen.audited, hits);
        let text = |(action, counted, audited, hits): (&str, _, _, u64)| {
            format!(
                "{action}, counted: {counted:?}, audited: {audited:?}, {hits} hits of its rule; {outcome:?}"
            )
        };
        if expected != found {
            return Ok(Some((format!("explain: {}", text(expected)), text(found))));
        }
        // Only the answer to a believed sender can be foretold without reading options.
        if let Outcome::Denied(_, reason, _) = outcome
            && denied
            && *plain
            && explain::is_rejected(&answer.packet, place.hook, *reason, rejects)
                != (seen.action == Action::Answer)
        {
            return Ok(Some((format!("explain: {outcome:?}, another answer"), format!("{:?}", seen.action))));
        }
        Ok(None)
    }

    fn rule(&self, outcome: &Outcome) -> Option<u32> {
        match outcome {
            Outcome::Allowed(_, rule) => Some(*rule),
            Outcome::Denied(_, _, rule) => *rule,
            _ => None,
        }
    }

    /// Returns the hits of the rule of an outcome, on all CPUs.
    fn hits(&self, outcome: &Outcome) -> Result<u64> {
        let Some(rule) = self.rule(outcome) else { return Ok(0) };
        let Slot { settings, hits } = &self.slots[self.active];
        let rows = hits.len() / settings.rule_count.max(1);
        (0..rows).try_fold(0, |sum, row| Ok(sum + hits.get(&(row * settings.rule_count + rule), 0)?.packets))
    }
}

impl NodeState for Explainer {
    fn hosted(&self, pod: IpAddr) -> Option<u32> {
        self.hosted.get(&pod).copied()
    }

    // No route leads to the interface of the runs.
    fn leads_to(&self, _: IpAddr, _: u32) -> bool {
        false
    }

    fn is_external(&self, interface: u32) -> bool {
        interface == LAN_INTERFACE
    }

    fn has_tunnel(&self, protocol: u8, port: u16) -> bool {
        TUNNELS.contains(&(protocol, port))
    }

    fn flow(&self, table: FlowTable, packet: &Packet) -> Option<KnownFlow> {
        let table = match table {
            FlowTable::Established if packet.protocol == header::TCP => [&self.flows, &self.overflow],
            FlowTable::Established => [&self.other_flows, &self.overflow],
            FlowTable::HalfOpen => [&self.half_open; 2],
        };
        let (key, source) = packet.flow_key();
        let flow = table.iter().find_map(|table| table.get(&key, 0).ok())?;
        is_usable(&flow, &self.slots[self.active].settings, now()).then(|| KnownFlow::new(&flow, source))
    }
}

/// Returns a packet as a question. `None`: it is an ICMP error, a later fragment, or has a header that cannot be read.
fn packet(header: &Header) -> Option<Packet> {
    let (source_port, destination_port) = header.ports.unwrap_or_default();
    let mut packet = Packet {
        source: header.source,
        destination: header.destination,
        protocol: header.protocol,
        source_port,
        destination_port,
        kind: Kind::Opening,
    };
    match &header.content {
        Content::Tcp(Segment { flags, .. }) if !header::flags_make_sense(*flags) => return None,
        Content::Tcp(segment) if segment.is_syn() => {}
        Content::Udp | Content::Other => {}
        Content::Sctp(chunk) if chunk.is_init() => {}
        Content::Tcp(_) | Content::Sctp(_) => packet.kind = Kind::Following,
        Content::Icmp { kind, identifier, .. } => {
            (packet.source_port, packet.destination_port) = (*identifier, *identifier);
            match kind {
                IcmpKind::Query => {}
                IcmpKind::Reply => packet.kind = Kind::Following,
                IcmpKind::Error | IcmpKind::Redirect | IcmpKind::Unknown => return None,
            }
        }
        _ => return None,
    }
    Some(packet)
}
