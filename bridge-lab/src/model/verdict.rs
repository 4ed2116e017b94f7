//! The verdict, as docs/data-path.md and the documentation of `bridge-common` describe it: rules in a list, flows in a map.

use std::{collections::HashMap, net::IpAddr};

use bridge_agent::{
    datapath::Hook,
    model::{Direction, Mode, OnDeny, Policy, Protocol, Rule},
};
use bridge_common::filter::{
    counters::Reason,
    flow::state,
    policy::direction::{INBOUND, NODE_PORT, OUTBOUND},
};
use ipnet::IpNet;

use super::header::{self, ACK, Content, FIN, Header, ICMP, ICMPV6, IcmpKind, RST, SCTP, SYN, TCP, UDP};
use crate::prog::{Action, NODE_ADDRESSES};

/// How far beyond the responder's initial sequence number the initiator's first acknowledgement may be.
const HANDSHAKE_WINDOW: u32 = 1 << 20;

/// One end of a flow.
type End = (IpAddr, u16);

/// A flow, whichever way its packets go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    low: End,
    high: End,
    protocol: u8,
}

impl Key {
    pub(super) fn new(a: End, b: End, protocol: u8) -> Self {
        Self { low: a.min(b), high: a.max(b), protocol }
    }

    /// As the programs have it.
    #[must_use]
    pub fn of_table(&self) -> bridge_common::filter::flow::FlowKey {
        let port = |end: End| end.1.to_be_bytes();
        let (low, high) = (self.low, self.high);
        bridge_common::filter::flow::FlowKey::new(
            &low.0.into(),
            port(low),
            &high.0.into(),
            port(high),
            self.protocol,
        )
        .0
    }
}

/// State of a flow.
#[derive(Clone, Debug)]
struct Flow {
    initiator: End,
    direction: u8,
    /// Both sides have shown that they want it; of TCP, the handshake is complete.
    confirmed: bool,
    /// Of TCP, from the responder's SYN on.
    responder_isn: Option<u32>,
    /// FIN seen, of the initiator and of the responder.
    finished: [bool; 2],
    reset: bool,
    /// Would have been denied.
    audit: bool,
    /// How long it has been silent, in seconds.
    silent: u64,
}

/// Expected result of a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected {
    /// The action.
    pub action: Action,
    /// Direction and reason it is counted under.
    pub counted: Option<(u8, Reason)>,
    /// The same, if it is counted as denied but passes.
    pub audited: Option<(u8, Reason)>,
}

/// A policy, and the settings that come with it.
#[derive(Clone, Debug)]
pub struct Regime {
    /// The rules, and audit mode and reject mode.
    pub policy: Policy,
    /// How long a flow may be silent, in seconds, by [`state`].
    pub timeouts: [u64; state::COUNT],
}

/// A node.
pub struct Model {
    regimes: Vec<Regime>,
    in_force: usize,
    flows: HashMap<Key, Flow>,
    /// Flows that wait for a reply: also beside one that is ending, whose ports are used again.
    half_open: HashMap<Key, Flow>,
    /// LAN hosts that were let in to a NodePort, by protocol; whether by audit mode alone.
    let_in: HashMap<(End, u8), bool>,
    own: Vec<IpAddr>,
}

impl Model {
    /// A node without flows; the first of `regimes` is active.
    #[must_use]
    pub fn new(regimes: Vec<Regime>) -> Self {
        let own = NODE_ADDRESSES.iter().filter_map(|address| address.parse().ok()).collect();
        Self {
            regimes,
            in_force: 0,
            flows: HashMap::new(),
            half_open: HashMap::new(),
            let_in: HashMap::new(),
            own,
        }
    }

    /// Activates another of the regimes.
    pub fn put_in_force(&mut self, index: usize) {
        self.in_force = index;
    }

    /// A flow has been silent for this number of seconds.
    pub fn age(&mut self, key: &Key, seconds: u64) {
        if let Some(flow) = self.flows.get_mut(key).or_else(|| self.half_open.get_mut(key)) {
            flow.silent = seconds;
        }
    }

    /// A packet comes by.
    pub fn judge(&mut self, hook: Hook, frame: &[u8]) -> Expected {
        let next = Expected { action: Action::Next, counted: None, audited: None };
        let Some(header) = header::frame(frame) else { return next };
        let internal = matches!(hook, Hook::InternalIngress | Hook::InternalEgress);
        if matches!(hook, Hook::InternalEgress | Hook::ExternalEgress) {
            self.observe(&header, internal);
            return next;
        }
        let Some(Judgement { direction, reason, audited }) = self.ingress(&header, internal) else {
            return next;
        };
        let counted = Some((direction, reason));
        if audited || reason.denies() && self.is_audit() {
            Expected { audited: counted, ..next }
        } else if reason.denies() {
            Expected { action: self.answer(&header, reason), counted, audited: None }
        } else {
            Expected { counted, ..next }
        }
    }

    fn regime(&self) -> &Regime {
        &self.regimes[self.in_force]
    }

    fn is_audit(&self) -> bool {
        self.regime().policy.mode == Mode::Audit
    }

    /// `None`: not our business.
    fn ingress(&mut self, header: &Header, internal: bool) -> Option<Judgement> {
        let direction = self.scope(header).filter(|direction| !(internal && *direction == NODE_PORT));
        let verdict = |reason| direction.map(|direction| Judgement { direction, reason, audited: false });
        let fault = match &header.content {
            Content::MalformedIp => Some(Reason::malformed_ip),
            Content::MalformedL4 => Some(Reason::malformed_l4),
            Content::ShortFragment => Some(Reason::fragment_short),
            Content::OverlappingFragment => Some(Reason::fragment_overlap),
            Content::Tcp { flags, .. } if !header::flags_make_sense(*flags) => Some(Reason::invalid_flags),
            Content::Icmp { kind: IcmpKind::Unknown, .. } => Some(Reason::icmp_type),
            _ if internal && direction == Some(INBOUND) => Some(Reason::spoofed),
            Content::LaterFragment => Some(Reason::later_fragment),
            Content::Icmp { kind: IcmpKind::Error, quoted, .. } if self.is_related(header, quoted) => {
                Some(Reason::related)
            }
            Content::Icmp { kind: IcmpKind::Error, .. } => Some(Reason::icmp_unrelated),
            _ => None,
        };
        if let Some(reason) = fault {
            return verdict(reason);
        }
        let (source, key) = flow_of(header);
        if let Some(flow) = self.usable(&self.flows, &key)
            && !(internal && flow.is_of_lan(source))
            && let Some(flow) = self.go_on(header, &key, flow, source)
        {
            let judgement =
                Judgement { direction: flow.direction, reason: Reason::established, audited: flow.audit };
            self.flows.insert(key, flow);
            return Some(judgement);
        }
        let direction = direction?;
        if let Some(flow) = self.usable(&self.half_open, &key)
            && let Some(judgement) = self.answered(header, &key, flow, source)
        {
            return Some(judgement);
        }
        Some(Judgement { direction, reason: self.open(header, key, source, direction), audited: false })
    }

    /// A packet that may open a flow.
    fn open(&mut self, header: &Header, key: Key, source: End, direction: u8) -> Reason {
        if let Some(reason) = no_opening(header) {
            return reason;
        }
        let reason = self.decide(header, direction);
        if !reason.denies() || self.is_audit() {
            if direction == NODE_PORT {
                self.let_in.insert((source, header.protocol), reason.denies());
            }
            self.enter(key, Flow::new(source, direction, reason.denies()));
        }
        reason
    }

    fn enter(&mut self, key: Key, flow: Flow) {
        self.half_open.insert(key, flow);
        // For TCP, the use of the ports is over when the responder has agreed.
        if key.protocol != TCP || self.usable(&self.flows, &key).is_none() {
            self.flows.remove(&key);
        }
    }

    /// Returns the verdict of the rules on a new flow.
    fn decide(&self, header: &Header, direction: u8) -> Reason {
        let policy = &self.regime().policy;
        let ports = header.ports.unwrap_or_default();
        if direction == NODE_PORT {
            let allowed = policy.node_ports.iter().flat_map(|ports| &ports.allow);
            let allowed = allowed.copied().any(|range| range.contains(ports.1));
            return if allowed { Reason::new_flow } else { Reason::no_rule };
        }
        let mut reason = Reason::no_rule;
        for rule in &policy.rules {
            if matches(rule, header, direction) {
                match rule.action {
                    bridge_agent::model::Action::Deny => return Reason::deny_rule,
                    bridge_agent::model::Action::Allow => reason = Reason::new_flow,
                }
            }
        }
        reason
    }

    /// A packet of an established flow, and the flow after it. `None`: it is judged as if there were none.
    fn go_on(&self, header: &Header, key: &Key, mut flow: Flow, source: End) -> Option<Flow> {
        let from_initiator = source == flow.initiator;
        match &header.content {
            Content::Tcp { flags, .. } => {
                let agrees = !from_initiator && flags & (SYN | ACK) == SYN | ACK;
                let open = flow.state(TCP) == state::ESTABLISHED;
                if agrees && !open && self.half_open.contains_key(key) {
                    return None;
                }
                flow.segment(from_initiator, *flags)?;
            }
            Content::Icmp { kind: IcmpKind::Query, .. } if !from_initiator => return None,
            Content::Icmp { kind: IcmpKind::Reply, .. } if from_initiator => return None,
            _ => (),
        }
        flow.silent = 0;
        Some(flow)
    }

    /// A packet of a flow that waits for a reply. `None`: it is judged as if there were none.
    fn answered(&mut self, header: &Header, key: &Key, mut flow: Flow, source: End) -> Option<Judgement> {
        let from_initiator = source == flow.initiator;
        let (direction, audited) = (flow.direction, flow.audit);
        let reason = match &header.content {
            Content::Tcp { flags, sequence, acknowledgement } => {
                if !flow.handshake(from_initiator, *flags, *sequence, *acknowledgement)? {
                    return Some(Judgement { direction, reason: Reason::invalid_state, audited: false });
                }
                if !from_initiator && flags & SYN != 0 {
                    self.flows.remove(key);
                }
                Reason::established
            }
            Content::Icmp { kind: IcmpKind::Query, .. } if !from_initiator => return None,
            _ if from_initiator => return None,
            _ => {
                flow.confirmed = true;
                Reason::established
            }
        };
        if flow.confirmed {
            flow.silent = 0;
            self.half_open.remove(key);
            self.flows.insert(*key, flow);
        } else {
            self.half_open.insert(*key, flow);
        }
        Some(Judgement { direction, reason, audited })
    }

    /// An egress hook: a packet was judged elsewhere, or had another address there.
    fn observe(&mut self, header: &Header, internal: bool) {
        match &header.content {
            Content::Tcp { flags, .. } if header::flags_make_sense(*flags) => (),
            Content::Udp | Content::Sctp { .. } | Content::Other => (),
            Content::Icmp { kind: IcmpKind::Query | IcmpKind::Reply, .. } => (),
            _ => return,
        }
        let node_ports = self.regime().policy.node_ports.as_ref().map(|ports| ports.range);
        let from_node_port =
            header.ports.zip(node_ports).is_some_and(|((source, _), range)| range.contains(source));
        if !internal && !from_node_port {
            return;
        }
        let (source, key) = flow_of(header);
        if let Some(flow) = self.usable(&self.flows, &key)
            && let Some(flow) = self.go_on(header, &key, flow, source)
        {
            self.flows.insert(key, flow);
            return;
        }
        if let Some(flow) = self.usable(&self.half_open, &key) {
            self.answered(header, &key, flow, source);
            return;
        }
        let inbound = self.scope(header) == Some(INBOUND);
        if let Some(audit) = self.let_in.get(&(source, header.protocol)).copied()
            && internal
            && inbound
            && no_opening(header).is_none()
        {
            self.enter(key, Flow::new(source, INBOUND, audit));
        }
    }

    /// The entry of a flow, unless it has been silent for too long, or was let in by audit mode alone and that is over.
    fn usable(&self, table: &HashMap<Key, Flow>, key: &Key) -> Option<Flow> {
        let alive = |flow: &&Flow| {
            flow.silent < self.regime().timeouts[usize::from(flow.state(key.protocol))]
                && (!flow.audit || self.is_audit())
        };
        table.get(key).filter(alive).cloned()
    }

    /// Whether an ICMP error quotes a packet that its addressee has sent, in a known flow or out of scope.
    fn is_related(&self, error: &Header, quoted: &[u8]) -> bool {
        let Some(quoted) = header::quoted(quoted, error.source.is_ipv4()) else { return false };
        if quoted.source != error.destination {
            return false;
        }
        match quoted.content {
            Content::Udp | Content::Other => (),
            Content::Icmp { kind: IcmpKind::Query | IcmpKind::Reply, .. } => (),
            _ => return false,
        }
        let (_, key) = flow_of(&quoted);
        let known = [&self.flows, &self.half_open].iter().any(|table| self.usable(table, &key).is_some());
        known || self.scope(&quoted).is_none()
    }

    fn is_node(&self, address: IpAddr) -> bool {
        self.own.contains(&address) || contains(&self.regime().policy.nodes, address)
    }

    fn is_pod(&self, address: IpAddr) -> bool {
        contains(&self.regime().policy.pods, address) && !self.is_node(address)
    }

    fn is_external(&self, address: IpAddr) -> bool {
        contains(&self.regime().policy.external, address) && !self.is_node(address)
    }

    /// The direction whose rules judge a packet.
    fn scope(&self, header: &Header) -> Option<u8> {
        let (source, destination) = (header.source, header.destination);
        if self.is_external(source) && self.is_pod(destination) {
            return Some(INBOUND);
        }
        if self.is_pod(source) && self.is_external(destination) {
            return Some(OUTBOUND);
        }
        let range = self.regime().policy.node_ports.as_ref()?.range;
        let (_, port) = header.ports?;
        (self.is_external(source) && self.own.contains(&destination) && range.contains(port))
            .then_some(NODE_PORT)
    }

    /// Returns the action for a denied packet.
    fn answer(&self, header: &Header, reason: Reason) -> Action {
        let answerable = match header.content {
            Content::Tcp { flags, .. } => {
                flags & RST == 0 && !matches!(reason, Reason::invalid_state | Reason::invalid_flags)
            }
            Content::Udp => true,
            _ => false,
        };
        let reject = self.regime().policy.on_deny == OnDeny::Reject;
        if reject && answerable && header.plain { Action::Answer } else { Action::Drop }
    }
}

impl Flow {
    fn new(initiator: End, direction: u8, audit: bool) -> Self {
        Self {
            initiator,
            direction,
            confirmed: false,
            responder_isn: None,
            finished: [false; 2],
            reset: false,
            audit,
            silent: 0,
        }
    }

    /// Whether this end of it is the LAN host.
    fn is_of_lan(&self, end: End) -> bool {
        (end == self.initiator) == (self.direction != OUTBOUND)
    }

    fn state(&self, protocol: u8) -> u8 {
        match (protocol, self.confirmed) {
            (TCP, _) if self.reset => state::RESET,
            (TCP, false) if self.responder_isn.is_none() => state::SYN_SENT,
            (TCP, false) => state::SYN_RECEIVED,
            (TCP, true) => match self.finished {
                [false, false] => state::ESTABLISHED,
                [true, true] => state::CLOSING,
                _ => state::FIN_WAIT,
            },
            (UDP, false) => state::UDP_UNREPLIED,
            (UDP, true) => state::UDP_REPLIED,
            (ICMP | ICMPV6, false) => state::ICMP_UNREPLIED,
            (ICMP | ICMPV6, true) => state::ICMP_REPLIED,
            (_, false) => state::OTHER_UNREPLIED,
            (_, true) => state::OTHER_REPLIED,
        }
    }

    /// A segment of an established connection. `None`: a SYN that is to open another one.
    fn segment(&mut self, from_initiator: bool, flags: u8) -> Option<()> {
        if flags & (SYN | ACK) == SYN && (!from_initiator || self.state(TCP) != state::ESTABLISHED) {
            return None;
        }
        self.reset = flags & RST != 0;
        if flags & FIN != 0 {
            self.finished[usize::from(!from_initiator)] = true;
        }
        Some(())
    }

    /// Handles a segment of a handshake; returns whether it is one. `None`: a SYN, to be judged again.
    fn handshake(
        &mut self,
        from_initiator: bool,
        flags: u8,
        sequence: u32,
        acknowledgement: u32,
    ) -> Option<bool> {
        if flags & (SYN | ACK) == SYN {
            return None;
        }
        if flags & RST != 0 {
            (self.reset, self.responder_isn, self.silent) = (true, None, 0);
        } else if !from_initiator {
            if flags & SYN != 0 {
                (self.reset, self.responder_isn, self.silent) = (false, Some(sequence), 0);
            }
            // Else the responder's answer about an older connection (RFC 5961, 4.2).
        } else {
            let isn = self.responder_isn.filter(|_| flags & SYN == 0);
            let seen = |isn: u32| (1..=HANDSHAKE_WINDOW).contains(&acknowledgement.wrapping_sub(isn));
            if !isn.is_some_and(seen) {
                return Some(false);
            }
            self.confirmed = true;
            self.finished[0] = flags & FIN != 0;
        }
        Some(true)
    }
}

/// A packet that is our business.
struct Judgement {
    direction: u8,
    reason: Reason,
    /// Of a flow that passes in audit mode only.
    audited: bool,
}

/// Why a packet cannot open a flow.
fn no_opening(header: &Header) -> Option<Reason> {
    match header.content {
        Content::Tcp { flags, .. } if flags & (SYN | ACK) != SYN => Some(Reason::not_syn),
        Content::Sctp { init: false } => Some(Reason::not_init),
        Content::Icmp { kind: IcmpKind::Reply, .. } => Some(Reason::icmp_unsolicited),
        _ => None,
    }
}

/// Where a packet comes from, and its flow: ICMP queries have their identifier for both ports.
fn flow_of(header: &Header) -> (End, Key) {
    let ports = match &header.content {
        Content::Icmp { identifier, .. } => (*identifier, *identifier),
        _ => header.ports.unwrap_or_default(),
    };
    let (source, destination) = ((header.source, ports.0), (header.destination, ports.1));
    (source, Key::new(source, destination, header.protocol))
}

fn matches(rule: &Rule, header: &Header, direction: u8) -> bool {
    let (asked, external, pod) = match rule.direction {
        Direction::Inbound => (INBOUND, header.source, header.destination),
        Direction::Outbound => (OUTBOUND, header.destination, header.source),
    };
    let side =
        |named: &Option<Vec<IpNet>>, address| named.as_ref().is_none_or(|nets| contains(nets, address));
    let with_ports = matches!(header.protocol, TCP | UDP | SCTP);
    let names_ports = !rule.ports.is_empty() || !rule.source_ports.is_empty();
    let protocol = match rule.protocol {
        Protocol::Tcp => header.protocol == TCP,
        Protocol::Udp => header.protocol == UDP,
        Protocol::Sctp => header.protocol == SCTP,
        Protocol::Icmp => matches!(header.content, Content::Icmp { .. }),
        Protocol::Any => with_ports || !names_ports,
    };
    let (source_port, destination_port) = header.ports.unwrap_or_default();
    let port = |ranges: &[bridge_agent::model::PortRange], port| {
        ranges.is_empty() || ranges.iter().any(|range| range.first <= port && port <= range.last)
    };
    asked == direction
        && protocol
        && side(&rule.external, external)
        && side(&rule.pods, pod)
        && port(&rule.ports, destination_port)
        && port(&rule.source_ports, source_port)
}

fn contains(networks: &[IpNet], address: IpAddr) -> bool {
    networks.iter().any(|network| network.contains(&address))
}
