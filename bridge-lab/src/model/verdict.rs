//! The verdict, as docs/decisions/0012-complete-mediation.md and docs/data-path.md describe it: rules in a list, flows and
//! the pods of this node in maps.
//!
//! Marks do not outlive a run of a program, so a packet at an egress hook has none here: its origin is its source address.
//! No source of a node or of another node's pod is believed, since no route leads to the interface of the runs.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
};

use bridge_agent::{
    datapath::Hook,
    model::{Mode, OnDeny, Policy},
};
use bridge_common::filter::{
    counters::Reason,
    flow::state,
    policy::direction::{INBOUND, NODE_PORT, OUTBOUND},
};

use super::{
    classify::{
        contains, flow_of, is_for_tunnel, is_link_local, is_mapped, matches, names_flow, no_opening,
        stays_on_link, unreadable,
    },
    flow::{End, Flow, Handshake, Key, Segment},
    header::{self, ACK, Content, Header, IcmpKind, RST, SCTP, SYN, TCP},
};
use crate::prog::{Action, LAN_INTERFACE, NODE_ADDRESSES, Place};

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

impl Expected {
    /// Passes, and no rule restricts it.
    const UNRESTRICTED: Self = Self { action: Action::Next, counted: None, audited: None };
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
    active: usize,
    flows: HashMap<Key, Flow>,
    /// Flows that wait for a reply: also beside one that is ending, whose ports are used again.
    half_open: HashMap<Key, Flow>,
    /// Pods of this node, and the interfaces that lead to them.
    hosted: HashMap<IpAddr, u32>,
    /// Hosts between which a first fragment was let through.
    fragmented: HashSet<(IpAddr, IpAddr)>,
    own: Vec<IpAddr>,
    moved: Option<Key>,
}

/// The policy's view of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Local,
    Node,
    Pod,
    External,
    Foreign,
}

/// The row of the hook's table that a packet is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Row {
    Pass,
    /// Passes, and opens a flow that no rule restricts; the interface of the pod.
    Follow(u32),
    Deny(u8, Reason),
    /// By the rules of this direction; the interface of the pod.
    Judge(u8, u32),
}

impl Model {
    /// A node without flows and pods; the first of `regimes` is active.
    #[must_use]
    pub fn new(regimes: Vec<Regime>) -> Self {
        let own = NODE_ADDRESSES.iter().filter_map(|address| address.parse().ok()).collect();
        Self {
            regimes,
            active: 0,
            flows: HashMap::new(),
            half_open: HashMap::new(),
            hosted: HashMap::new(),
            fragmented: HashSet::new(),
            own,
            moved: None,
        }
    }

    /// Activates another of the regimes.
    pub fn activate(&mut self, index: usize) {
        self.active = index;
    }

    /// A flow has been silent for this number of seconds.
    pub fn age(&mut self, key: &Key, seconds: u64) {
        if let Some(flow) = self.flows.get_mut(key).or_else(|| self.half_open.get_mut(key)) {
            flow.age(seconds);
        }
    }

    /// Pods come and go; interface 0: the pod has gone.
    pub fn host(&mut self, pod: IpAddr, interface: u32) {
        if interface == 0 {
            self.hosted.remove(&pod);
        } else {
            self.hosted.insert(pod, interface);
        }
    }

    /// Whether an address is that of a pod of this node.
    #[must_use]
    pub fn is_hosted(&self, pod: IpAddr) -> bool {
        self.hosted.contains_key(&pod)
    }

    /// The flow whose pod has acknowledged so much, by the last packet, that it is noted. Verdicts that are remembered
    /// elsewhere note nothing.
    #[must_use]
    pub fn moved(&self) -> Option<Key> {
        self.moved
    }

    /// A packet comes by.
    pub fn judge(&mut self, place: Place, frame: &[u8]) -> Expected {
        self.moved = None;
        let Some(header) = header::frame(frame) else { return Expected::UNRESTRICTED };
        let Place { hook, input } = place;
        match hook {
            Hook::ExternalIngress => {
                let row = self.external_ingress(&header);
                self.ingress(&header, row, true)
            }
            Hook::InternalIngress => {
                let row = self.internal_ingress(&header);
                self.ingress(&header, row, false)
            }
            Hook::InternalEgress => self.egress(&header, input, true),
            Hook::ExternalEgress => self.egress(&header, input, false),
        }
    }

    fn regime(&self) -> &Regime {
        &self.regimes[self.active]
    }

    fn is_audit(&self) -> bool {
        self.regime().policy.mode == Mode::Audit
    }

    fn class(&self, address: IpAddr) -> Class {
        let policy = &self.regime().policy;
        if self.own.contains(&address) {
            Class::Local
        } else if contains(&policy.nodes, address) {
            Class::Node
        } else if contains(&policy.pods, address) {
            Class::Pod
        } else if contains(&policy.external, address) {
            Class::External
        } else {
            Class::Foreign
        }
    }

    /// The interface that leads to a pod of this node; 0: none does.
    fn hosts(&self, pod: IpAddr) -> u32 {
        self.hosted.get(&pod).copied().unwrap_or_default()
    }

    /// Whether a packet from the LAN is for the node itself.
    fn is_for_node(&self, header: &Header) -> bool {
        self.class(header.destination) == Class::Local || is_link_local(header.destination)
    }

    /// Whether a packet to any node is for a tunnel, which only nodes may send.
    fn is_for_tunnel(&self, header: &Header) -> bool {
        (self.is_for_node(header) || self.class(header.destination) == Class::Node) && is_for_tunnel(header)
    }

    /// Whether a port is in the range of NodePorts.
    fn is_node_port(&self, port: u16) -> bool {
        self.regime().policy.node_ports.as_ref().is_some_and(|ports| ports.range.contains(port))
    }

    fn external_ingress(&self, header: &Header) -> Row {
        if let Some(reason) = unreadable(header) {
            return Row::Deny(INBOUND, reason);
        }
        let source = self.class(header.source);
        if matches!(source, Class::Local | Class::Pod) || self.is_for_tunnel(header) {
            return Row::Deny(INBOUND, Reason::spoofed);
        }
        if self.class(header.destination) == Class::Pod {
            return match self.hosts(header.destination) {
                0 => Row::Pass,
                interface => Row::Judge(INBOUND, interface),
            };
        }
        let to_node_port = header.ports.is_some_and(|(_, port)| self.is_node_port(port));
        if source == Class::External && self.is_for_node(header) && to_node_port {
            return Row::Judge(NODE_PORT, 0);
        }
        Row::Pass
    }

    fn internal_ingress(&self, header: &Header) -> Row {
        if let Some(reason) = unreadable(header) {
            return Row::Deny(OUTBOUND, reason);
        }
        if self.class(header.source) != Class::Node && self.is_for_tunnel(header) {
            return Row::Deny(OUTBOUND, Reason::spoofed);
        }
        if header.source.is_unspecified() || is_link_local(header.source) {
            return Row::Pass;
        }
        if self.hosts(header.source) != LAN_INTERFACE {
            return Row::Deny(OUTBOUND, Reason::spoofed);
        }
        if self.class(header.source) != Class::Pod {
            return Row::Pass;
        }
        match self.class(header.destination) {
            Class::External => Row::Judge(OUTBOUND, LAN_INTERFACE),
            Class::Pod | Class::Node => Row::Pass,
            _ if stays_on_link(header.destination) => Row::Pass,
            Class::Local | Class::Foreign => Row::Follow(LAN_INTERFACE),
        }
    }

    fn internal_egress(&self, header: &Header, input: u32) -> Row {
        if let Some(reason) = unreadable(header) {
            return Row::Deny(INBOUND, reason);
        }
        if self.class(header.destination) != Class::Pod {
            return Row::Pass;
        }
        match self.class(header.source) {
            Class::Local => Row::Deny(INBOUND, Reason::unattributed),
            Class::Pod | Class::Node if self.hosts(header.source) == input => Row::Pass,
            Class::Pod => Row::Deny(INBOUND, Reason::spoofed),
            _ => Row::Judge(INBOUND, LAN_INTERFACE),
        }
    }

    fn external_egress(&self, header: &Header, input: u32) -> Row {
        if let Some(reason) = unreadable(header) {
            return Row::Deny(INBOUND, reason);
        }
        match (self.class(header.source), self.class(header.destination)) {
            // By an interface towards the LAN no pod of this node comes in.
            (Class::Pod, Class::External) if self.hosts(header.source) == input && input != LAN_INTERFACE => {
                Row::Judge(OUTBOUND, 0)
            }
            // Perhaps translated: its answers come from there.
            (Class::Pod, Class::Foreign) if self.hosts(header.source) == input && input != LAN_INTERFACE => {
                Row::Follow(0)
            }
            (Class::Local, Class::Pod) => Row::Deny(INBOUND, Reason::unattributed),
            _ => Row::Pass,
        }
    }

    fn ingress(&mut self, header: &Header, row: Row, from_lan: bool) -> Expected {
        let (source, key) = flow_of(header);
        // A flow of the interface needs no other proof of the source.
        let of_interface =
            !from_lan && self.flows.get(&key).is_some_and(|flow| flow.interface == LAN_INTERFACE);
        let believed = of_interface || !matches!(row, Row::Deny(..));
        if believed
            && names_flow(header)
            && let Some(flow) = self.usable(&self.flows, &key)
            && flow.is_of_lan(source) == from_lan
            && let Some(mut flow) = self.go_on(header, &key, flow, source)
        {
            if !from_lan {
                flow.interface = LAN_INTERFACE;
            }
            self.remember_fragment(header);
            let expected = self.established(&flow);
            self.flows.insert(key, flow);
            return expected;
        }
        match row {
            Row::Pass => Expected::UNRESTRICTED,
            Row::Follow(interface) => {
                self.follow(header, key, source, interface);
                Expected::UNRESTRICTED
            }
            Row::Deny(direction, reason) => self.deny(header, direction, reason, true),
            Row::Judge(direction, interface) => self.decide(header, direction, interface, true),
        }
    }

    fn egress(&mut self, header: &Header, input: u32, to_pod: bool) -> Expected {
        let (source, key) = flow_of(header);
        let from_node_port = header.ports.is_some_and(|(source, _)| self.is_node_port(source));
        if names_flow(header) && (to_pod || input != 0 || from_node_port) {
            if let Some(flow) = self.usable(&self.flows, &key)
                && flow.is_of_lan(source) == to_pod
                && let Some(flow) = self.go_on(header, &key, flow, source)
            {
                self.flows.insert(key, flow);
                self.remember_fragment(header);
                return Expected::UNRESTRICTED;
            }
            if let Some(flow) = self.usable(&self.half_open, &key)
                && self.answered(header, &key, flow, source).is_some()
            {
                self.remember_fragment(header);
                return Expected::UNRESTRICTED;
            }
        }
        if input == 0 {
            return Expected::UNRESTRICTED;
        }
        let row =
            if to_pod { self.internal_egress(header, input) } else { self.external_egress(header, input) };
        if self.is_related(header) && !matches!(row, Row::Deny(_, Reason::spoofed)) {
            return Expected::UNRESTRICTED;
        }
        match row {
            Row::Pass => Expected::UNRESTRICTED,
            Row::Follow(interface) => {
                self.follow(header, key, source, interface);
                Expected::UNRESTRICTED
            }
            Row::Deny(direction, reason) => self.deny(header, direction, reason, false),
            Row::Judge(direction, interface) => self.decide(header, direction, interface, false),
        }
    }

    /// Returns the result for a packet of a flow.
    fn established(&self, flow: &Flow) -> Expected {
        let counted = Some((flow.direction, Reason::established));
        if flow.unrestricted {
            Expected::UNRESTRICTED
        } else if flow.audit {
            Expected { audited: counted, ..Expected::UNRESTRICTED }
        } else {
            Expected { counted, ..Expected::UNRESTRICTED }
        }
    }

    fn deny(&mut self, header: &Header, direction: u8, reason: Reason, answers: bool) -> Expected {
        let counted = Some((direction, reason));
        if self.is_audit() {
            self.remember_fragment(header);
            return Expected { audited: counted, ..Expected::UNRESTRICTED };
        }
        let action = if answers { self.answer(header, reason) } else { Action::Drop };
        Expected { action, counted, audited: None }
    }

    /// Decides about a packet that belongs to no established flow.
    fn decide(&mut self, header: &Header, direction: u8, interface: u32, ingress: bool) -> Expected {
        let (source, key) = flow_of(header);
        let reason = match &header.content {
            Content::MalformedIp => Reason::malformed_ip,
            Content::MalformedL4 => Reason::malformed_l4,
            Content::ShortFragment => Reason::fragment_short,
            Content::OverlappingFragment => Reason::fragment_overlap,
            Content::Tcp(Segment { flags, .. }) if !header::flags_make_sense(*flags) => Reason::invalid_flags,
            Content::Icmp { kind: IcmpKind::Unknown, .. } => Reason::icmp_type,
            Content::LaterFragment if self.fragmented.contains(&(header.source, header.destination)) => {
                Reason::later_fragment
            }
            Content::LaterFragment => Reason::fragment_unknown,
            Content::Icmp { kind: IcmpKind::Error | IcmpKind::Redirect, .. } if self.is_related(header) => {
                Reason::related
            }
            Content::Icmp { kind: IcmpKind::Error | IcmpKind::Redirect, .. } => Reason::icmp_unrelated,
            _ => {
                if ingress
                    && let Some(flow) = self.usable(&self.half_open, &key)
                    && let Some(Answer { reason, flow }) = self.answered(header, &key, flow, source)
                {
                    if reason.denies() {
                        return self.deny(header, direction, reason, ingress);
                    }
                    self.remember_fragment(header);
                    return self.established(&flow);
                }
                self.open(header, key, source, direction, interface)
            }
        };
        if !reason.denies() {
            self.remember_fragment(header);
            return Expected { counted: Some((direction, reason)), ..Expected::UNRESTRICTED };
        }
        self.deny(header, direction, reason, ingress)
    }

    /// A packet that may open a flow.
    fn open(&mut self, header: &Header, key: Key, source: End, direction: u8, interface: u32) -> Reason {
        if let Some(reason) = no_opening(header) {
            return reason;
        }
        let reason = self.by_rules(header, direction);
        if !reason.denies() || self.is_audit() {
            let mut flow = Flow::new(source, direction, &header.content);
            (flow.audit, flow.interface) = (reason.denies(), interface);
            self.enter(key, flow);
        }
        reason
    }

    /// A packet of a pod that no rule restricts.
    fn follow(&mut self, header: &Header, key: Key, source: End, interface: u32) {
        if !names_flow(header) {
            return;
        }
        if let Some(flow) = self.usable(&self.half_open, &key)
            && self.answered(header, &key, flow, source).is_some()
        {
            self.remember_fragment(header);
            return;
        }
        let mut flow = Flow::new(source, OUTBOUND, &header.content);
        (flow.unrestricted, flow.interface) = (true, interface);
        // A wrong tag changes nothing.
        let stray = matches!(&header.content, Content::Sctp(chunk) if !chunk.is_init());
        if !stray || self.usable(&self.flows, &key).is_none() {
            self.enter(key, flow);
        }
        self.remember_fragment(header);
    }

    fn enter(&mut self, key: Key, flow: Flow) {
        self.half_open.insert(key, flow);
        // For TCP and SCTP, the use of the ports is over when the responder has agreed.
        if !matches!(key.protocol(), TCP | SCTP) || self.usable(&self.flows, &key).is_none() {
            self.flows.remove(&key);
        }
    }

    /// Returns the verdict of the rules on a new flow.
    fn by_rules(&self, header: &Header, direction: u8) -> Reason {
        let policy = &self.regime().policy;
        let ports = header.ports.unwrap_or_default();
        if direction == NODE_PORT {
            let allowed = policy.node_ports.iter().flat_map(|ports| &ports.allow);
            let allowed = allowed.copied().any(|range| range.contains(ports.1));
            return if allowed { Reason::new_flow } else { Reason::no_rule };
        }
        let peer = if direction == INBOUND { header.source } else { header.destination };
        if self.class(peer) != Class::External {
            return Reason::no_rule;
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
    fn go_on(&mut self, header: &Header, key: &Key, mut flow: Flow, source: End) -> Option<Flow> {
        let from_initiator = source == flow.initiator;
        match &header.content {
            Content::Tcp(segment) => {
                if segment.is_syn() {
                    return None;
                }
                if segment.flags & (SYN | ACK) == SYN | ACK
                    && let Some(next) = self.usable(&self.half_open, key)
                    && next.initiator != source
                    && next.is_acknowledged_by(segment)
                {
                    return None;
                }
                if flow.segment(from_initiator, segment) {
                    self.moved = Some(*key);
                }
            }
            Content::Sctp(chunk) if chunk.is_init() || !flow.owns(from_initiator, chunk) => return None,
            Content::Icmp { kind: IcmpKind::Query, .. } if !from_initiator => return None,
            Content::Icmp { kind: IcmpKind::Reply, .. } if from_initiator => return None,
            _ => (),
        }
        flow.silent = 0;
        Some(flow)
    }

    /// A packet of a flow that waits for a reply. `None`: it is judged as if there were none.
    fn answered(&mut self, header: &Header, key: &Key, mut flow: Flow, source: End) -> Option<Answer> {
        let from_initiator = source == flow.initiator;
        let mut agreed = false;
        let reason = match &header.content {
            Content::Tcp(segment) => {
                let step = flow.handshake(from_initiator, segment)?;
                agreed = step == Handshake::Agrees;
                if step == Handshake::Invalid { Reason::invalid_state } else { Reason::established }
            }
            Content::Sctp(chunk) if chunk.is_init() => return None,
            Content::Sctp(chunk) => {
                flow.association(from_initiator, chunk)?;
                Reason::established
            }
            Content::Icmp { kind: IcmpKind::Query, .. } if !from_initiator => return None,
            Content::Icmp { kind: IcmpKind::Reply, .. } if from_initiator => Reason::icmp_unsolicited,
            _ if from_initiator => return None,
            _ => {
                flow.confirm();
                Reason::established
            }
        };
        if agreed {
            // The earlier connection of these ports has ended.
            self.flows.remove(key);
        }
        if flow.is_confirmed() {
            flow.silent = 0;
            self.half_open.remove(key);
            self.flows.insert(*key, flow.clone());
        } else {
            self.half_open.insert(*key, flow.clone());
        }
        Some(Answer { reason, flow })
    }

    fn remember_fragment(&mut self, header: &Header) {
        let ends = (header.source, header.destination);
        let intact = names_flow(header)
            || matches!(header.content, Content::Icmp { kind, .. } if kind != IcmpKind::Unknown);
        if header.first_fragment && intact && unreadable(header).is_none() {
            self.fragmented.insert(ends);
        }
    }

    /// The entry of a flow, unless it has been silent for too long, or was let in by audit mode alone and that is over.
    fn usable(&self, table: &HashMap<Key, Flow>, key: &Key) -> Option<Flow> {
        let alive = |flow: &&Flow| {
            flow.silent < self.regime().timeouts[usize::from(flow.state(key.protocol()))]
                && (!flow.audit || self.is_audit())
        };
        table.get(key).filter(alive).cloned()
    }

    /// Whether a packet is an ICMP error that quotes a packet of its addressee, in a known flow.
    fn is_related(&self, error: &Header) -> bool {
        let Content::Icmp { kind: IcmpKind::Error, quoted, .. } = &error.content else { return false };
        let Some(quoted) = header::quoted(quoted, error.source.is_ipv4()) else { return false };
        if quoted.source != error.destination || is_mapped(quoted.source) || is_mapped(quoted.destination) {
            return false;
        }
        match quoted.content {
            Content::Udp | Content::Other => (),
            Content::Icmp { kind: IcmpKind::Query | IcmpKind::Reply, .. } => (),
            _ => return false,
        }
        let (_, key) = flow_of(&quoted);
        [&self.flows, &self.half_open].iter().any(|table| self.usable(table, &key).is_some())
    }

    /// Returns the action for a denied packet.
    fn answer(&self, header: &Header, reason: Reason) -> Action {
        let believed = reason != Reason::spoofed;
        let answerable = match header.content {
            Content::Tcp(Segment { flags, .. }) => {
                flags & RST == 0 && !matches!(reason, Reason::invalid_state | Reason::invalid_flags)
            }
            Content::Udp => true,
            _ => false,
        };
        let reject = self.regime().policy.on_deny == OnDeny::Reject;
        if reject && believed && answerable && header.plain { Action::Answer } else { Action::Drop }
    }
}

/// The reaction of a half-open flow to a packet.
struct Answer {
    reason: Reason,
    flow: Flow,
}
