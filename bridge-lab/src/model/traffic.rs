//! Random packets that belong together: conversations, packets of strangers in between, and damage.

use std::net::IpAddr;

use bridge_agent::{
    datapath::Hook,
    model::{Mode, OnDeny, Policy, Protocol},
};
use bridge_common::filter::flow::state;

use super::{
    flow::Key,
    frames::{Carried, Dress, damaged, flip},
    verdict::Regime,
};
use crate::{
    packet::{Icmp, Packet, Tcp},
    parity::{
        Flow, LAN, PODS,
        dice::Dice,
        endpoints::{beyond, flow, node_port_flow},
        policies,
    },
    prog::{LAN_INTERFACE, NODE_ADDRESSES, OTHER_INTERFACE, POD_INTERFACE, Place},
};

/// An event on a node.
#[derive(Clone, Debug)]
pub enum Step {
    /// A frame comes by a hook.
    Packet(Place, Vec<u8>),
    /// A pod of this node comes, or moves to another interface; 0: it goes.
    Host(IpAddr, u32),
    /// A flow has been silent for this number of seconds.
    Age(Key, u64),
    /// The other policy becomes active.
    Switch(usize),
}

/// Timeouts are multiples of this many seconds, and ages lie in the middle between them.
const TICK: u64 = 10;

/// How many conversations there are at a time.
const TALKS: usize = 6;

/// Two policies, one much like the other.
pub(super) fn regimes(dice: &mut Dice) -> Vec<Regime> {
    let first = policies::policy(dice);
    let mut second = first.clone();
    for _ in 0..dice.below(4) {
        if !second.rules.is_empty() {
            let index = dice.below(second.rules.len());
            second.rules.remove(index);
        }
    }
    if dice.percent(30) {
        let other = policies::policy(dice);
        second.node_ports = other.node_ports;
        second.nodes.extend(other.nodes);
    }
    if dice.percent(10) && second.external.len() > 2 {
        second.external.pop();
    }
    [first, second]
        .into_iter()
        .map(|mut policy| {
            policy.mode = if dice.percent(15) { Mode::Audit } else { Mode::Enforce };
            policy.on_deny = if dice.percent(70) { OnDeny::Reject } else { OnDeny::Drop };
            let mut timeouts = [0; state::COUNT];
            timeouts.fill_with(|| TICK * (1 + u64::from(dice.within(0, 9))));
            Regime { policy, timeouts }
        })
        .collect()
}

/// Returns at least `length` steps.
pub(super) fn round(dice: &mut Dice, regimes: &[Regime], length: usize) -> Vec<Step> {
    let policy = &regimes[0].policy;
    let mut talks: Vec<Talk> = (0..TALKS).map(|_| Talk::new(dice, policy)).collect();
    let mut steps = Vec::with_capacity(length + 2);
    for talk in &talks {
        talk.settle(dice, talk.interface, &mut steps);
    }
    while steps.len() < length {
        if dice.percent(1) {
            let index = dice.below(talks.len());
            talks[index] = Talk::new(dice, policy);
            talks[index].settle(dice, talks[index].interface, &mut steps);
        }
        if dice.below(150) == 0 {
            let talk = dice.pick(&talks);
            let interface = interface(dice);
            talk.settle(dice, interface, &mut steps);
        }
        if dice.below(300) == 0 {
            steps.push(Step::Switch(dice.below(regimes.len())));
        }
        let index = dice.below(talks.len());
        let talk = &mut talks[index];
        if dice.percent(3) {
            let age = TICK * u64::from(dice.within(0, 10)) + TICK / 2;
            steps.extend(talk.keys().into_iter().map(|key| Step::Age(key, age)));
        }
        if dice.percent(8) {
            steps.push(talk.error(dice, policy));
        } else {
            talk.speak(dice, policy, &mut steps);
        }
    }
    steps
}

/// Two that talk, or try to.
struct Talk {
    flow: Flow,
    /// The server's end behind a NodePort.
    inner: Option<Flow>,
    /// Replies come in under the node's address.
    masqueraded: bool,
    /// Of the pod; 0: it is of another node.
    interface: u32,
    protocol: Protocol,
    /// Of [`Protocol::Any`].
    number: u8,
    stage: usize,
    /// Next sequence number of the client, and of the server.
    sequence: [u32; 2],
    /// Initial sequence number of the server, when it last said so.
    isn: u32,
    /// Verification tags that the client and the server ask for, and those of the association before.
    tags: [u32; 4],
    /// IP packets of either side.
    recent: Vec<Vec<u8>>,
}

const OTHER: [u8; 14] = [47, 50, 51, 2, 58, 1, 0, 41, 4, 135, 139, 140, 253, 255];

impl Talk {
    fn new(dice: &mut Dice, policy: &Policy) -> Self {
        let (mut flow, protocol) = flow(dice, policy);
        let (mut inner, mut masqueraded) = (None, false);
        let mut protocol = protocol;
        if dice.percent(20)
            && let Some((outer, of)) = node_port_flow(dice, policy)
        {
            let pod = if outer.source.is_ipv4() { &PODS[0] } else { &PODS[1] };
            let around = policy.pods.iter().find(|net| net.addr().is_ipv4() == outer.source.is_ipv4());
            let around = around.copied().unwrap_or_else(|| pod.parse().expect("a prefix"));
            let destination = dice.address(&around);
            inner = Some(Flow { destination, destination_port: dice.port(), ..outer });
            (flow, protocol) = (outer, of);
        } else if dice.percent(15) {
            masqueraded = true;
        } else if dice.percent(25) {
            let odd = odd_address(dice, policy, flow.source.is_ipv4());
            if dice.percent(40) {
                flow.source = odd
            } else {
                flow.destination = odd
            }
            masqueraded = dice.percent(20);
            if dice.percent(20) {
                flow.destination_port = 8472;
            }
        }
        if protocol == Protocol::Icmp {
            flow.destination_port = flow.source_port;
        }
        Self {
            flow,
            inner,
            masqueraded,
            interface: interface(dice),
            protocol,
            number: *dice.pick(&OTHER),
            stage: 0,
            sequence: [number(dice), number(dice)],
            isn: 0,
            tags: [0; 4].map(|_| number(dice)),
            recent: Vec::new(),
        }
    }

    /// Of the tables; for protocols without ports these are 0.
    fn keys(&self) -> Vec<Key> {
        let key = |flow: &Flow| {
            let (ports, number) = match self.protocol {
                Protocol::Tcp => ((flow.source_port, flow.destination_port), 6),
                Protocol::Udp => ((flow.source_port, flow.destination_port), 17),
                Protocol::Sctp => ((flow.source_port, flow.destination_port), 132),
                Protocol::Icmp => {
                    ((flow.source_port, flow.source_port), if flow.source.is_ipv4() { 1 } else { 58 })
                }
                Protocol::Any => ((0, 0), self.number),
            };
            Key::new((flow.source, ports.0), (flow.destination, ports.1), number)
        };
        std::iter::once(&self.flow).chain(&self.inner).map(key).collect()
    }

    /// Its pods are at an interface from now on; mostly, since a node may know little of its pods.
    fn settle(&self, dice: &mut Dice, interface: u32, steps: &mut Vec<Step>) {
        let ends = std::iter::once(&self.flow).chain(&self.inner);
        for pod in ends.flat_map(|flow| [flow.source, flow.destination]).filter(|end| is_pod(*end)) {
            if !dice.percent(3) {
                steps.push(Step::Host(pod, interface));
            }
        }
    }

    /// One of the two sends something; on its way it may come by two hooks.
    fn speak(&mut self, dice: &mut Dice, policy: &Policy, steps: &mut Vec<Step>) {
        let (from_client, content) = match self.protocol {
            Protocol::Tcp => {
                let (from_client, tcp) = self.tcp(dice);
                (from_client, Carried::Tcp(tcp))
            }
            Protocol::Icmp => self.icmp(dice),
            Protocol::Udp => (dice.percent(60), Carried::Udp(dice.below(60))),
            Protocol::Sctp => self.sctp(dice),
            Protocol::Any => (dice.percent(60), Carried::Raw(self.number, dice.below(40))),
        };
        let places: Vec<(Hook, Flow)> = match (self.inner, from_client) {
            (Some(inner), true) => vec![(Hook::ExternalIngress, self.flow), (Hook::InternalEgress, inner)],
            (Some(inner), false) => vec![(Hook::InternalIngress, inner), (Hook::ExternalEgress, self.flow)],
            (None, _) => vec![(self.hook(from_client), self.flow)],
        };
        let dress = Dress::new(dice);
        for (hook, flow) in places {
            if dice.percent(8) {
                continue;
            }
            let hook = if dice.percent(4) { *dice.pick(&Hook::ALL) } else { hook };
            let mut flow = if from_client { flow } else { flow.reversed() };
            if dice.percent(4) {
                let forged = forged_address(dice, policy, flow.source);
                if dice.percent(85) { flow.source = forged } else { flow.destination = forged }
            }
            let place = Place::from(hook, self.input(dice, hook));
            let base = dress.put_on(Packet::new(flow.source, flow.destination), flow.source.is_ipv4());
            let packet = content.put_into(base, &flow);
            self.recent.push(packet.ip());
            if self.recent.len() > 6 {
                self.recent.remove(0);
            }
            for packet in dress.cut(packet, dice) {
                steps.push(Step::Packet(place, damaged(dice, packet.frame())));
            }
        }
    }

    /// The interface that a packet came in by before it reaches a hook.
    fn input(&self, dice: &mut Dice, hook: Hook) -> u32 {
        let anywhere = *dice.pick(&[0, LAN_INTERFACE, POD_INTERFACE, OTHER_INTERFACE]);
        match hook {
            Hook::InternalEgress if dice.percent(70) => LAN_INTERFACE,
            Hook::ExternalEgress if dice.percent(70) => self.interface,
            _ => anywhere,
        }
    }

    fn hook(&self, from_client: bool) -> Hook {
        let source = if from_client { self.flow.source } else { self.flow.destination };
        match (is_pod(source), self.masqueraded && !from_client) {
            // Its addresses are final there.
            (true, _) if matches!(self.interface, POD_INTERFACE | OTHER_INTERFACE) => Hook::ExternalEgress,
            (true, _) => Hook::InternalIngress,
            (false, true) => Hook::InternalEgress,
            (false, false) => Hook::ExternalIngress,
        }
    }

    fn icmp(&self, dice: &mut Dice) -> (bool, Carried) {
        let from_client = dice.percent(55);
        let v4 = self.flow.source.is_ipv4();
        let (queries, replies): (&[u8], &[u8]) =
            if v4 { (&[8, 8, 8, 13, 15, 17], &[0, 0, 0, 14, 16, 18]) } else { (&[128], &[129]) };
        let kind = match dice.below(20) {
            0 => dice.within(0, 255),
            n if (n < 17) == from_client => *dice.pick(queries),
            _ => *dice.pick(replies),
        };
        (from_client, Carried::Icmp(kind))
    }

    /// The next packet of an association, or one that is not; and who sends it.
    fn sctp(&mut self, dice: &mut Dice) -> (bool, Carried) {
        const REFLECTED: u8 = 1;
        let [client, server, old_client, old_server] = self.tags;
        if dice.percent(35) {
            let kind = *dice.pick(&[0, 1, 1, 2, 2, 3, 4, 6, 7, 8, 10, 10, 11, 14, 130]);
            let random = number(dice);
            let tags = [client, server, old_client, old_server, 0, client.wrapping_add(1), random];
            let tag = if kind == 1 && !dice.percent(10) { 0 } else { *dice.pick(&tags) };
            let flags = if dice.percent(40) { REFLECTED } else { 0 };
            return (dice.percent(50), Carried::Sctp { kind, flags, tag, announced: *dice.pick(&tags) });
        }
        let any_side = dice.percent(50);
        let (from_client, kind) = match self.stage {
            0 => (true, 1),
            1 => (false, 2),
            2 => (true, 10),
            3 => (false, 11),
            4..=8 => (any_side, *dice.pick(&[0, 0, 3, 4, 5])),
            9 => (any_side, *dice.pick(&[7, 7, 6])),
            10 => (any_side, 8),
            _ => (any_side, 14),
        };
        let (own, other) = if from_client { (client, server) } else { (server, client) };
        let reflected = matches!(kind, 6 | 14) && dice.percent(40);
        let tag = match kind {
            1 => 0,
            _ if reflected => own,
            _ => other,
        };
        self.stage = match self.stage {
            _ if dice.percent(6) => dice.below(12),
            11.. => 0,
            stage => stage + 1,
        };
        if self.stage == 0 && dice.percent(50) {
            self.tags = [number(dice), number(dice), client, server];
        }
        (from_client, Carried::Sctp { kind, flags: reflected.into(), tag, announced: own })
    }

    /// The next segment of a connection, or one that is not; and who sends it.
    fn tcp(&mut self, dice: &mut Dice) -> (bool, Tcp) {
        let [client, server] = self.sequence;
        if dice.percent(35) {
            return self.wild_tcp(dice);
        }
        let segment = |from_client: bool, flags: u8| {
            let (sequence, acknowledgement) = if from_client { (client, server) } else { (server, client) };
            (from_client, flags, sequence, acknowledgement)
        };
        let (from_client, flags, sequence, acknowledgement) = match self.stage {
            0 => {
                self.sequence[0] = client.wrapping_add(1);
                (true, 0x02, client, 0)
            }
            1 => {
                self.isn = server;
                self.sequence[1] = server.wrapping_add(1);
                (false, 0x12, server, client)
            }
            2 => segment(true, 0x10),
            3..=7 => segment(dice.percent(50), *dice.pick(&[0x10, 0x18, 0x30])),
            8 => segment(dice.percent(50), 0x11),
            9 => segment(dice.percent(50), 0x11),
            10 => segment(dice.percent(50), *dice.pick(&[0x10, 0x14, 0x04])),
            _ => segment(dice.percent(50), 0x10),
        };
        self.stage = match self.stage {
            // Out of turn now and then: data before the end of the handshake, an end in its middle, a second SYN.
            _ if dice.percent(6) => dice.below(12),
            11.. => 0,
            stage => stage + 1,
        };
        if self.stage == 0 && dice.percent(50) {
            self.sequence = [number(dice), number(dice)];
        }
        let payload = if dice.percent(30) { dice.below(40) } else { 0 };
        if flags & 0x01 != 0 {
            // Acknowledged from now on.
            let end = u32::try_from(payload).unwrap_or_default() + 1;
            let own = &mut self.sequence[usize::from(!from_client)];
            *own = own.wrapping_add(end);
        }
        (from_client, tcp_segment(flags, sequence, acknowledgement, payload))
    }

    fn wild_tcp(&mut self, dice: &mut Dice) -> (bool, Tcp) {
        const SENSIBLE: [u8; 12] = [0x02, 0x12, 0x10, 0x10, 0x10, 0x18, 0x11, 0x04, 0x14, 0x22, 0x31, 0xc2];
        let from_client = dice.percent(60);
        let flags = if dice.percent(95) { *dice.pick(&SENSIBLE) } else { dice.within(0, 255) };
        const DISTANCES: [u32; 11] =
            [u32::MAX, 1, 1 << 20, (1 << 20) + 1, 1 << 31, 0xffff, 1 << 16, 0x3fff, 1 << 14, 2, 50_000];
        let near = |dice: &mut Dice, of: u32| match dice.below(16) {
            0 => number(dice),
            1..=9 => of,
            _ => of.wrapping_add(*dice.pick(&DISTANCES)),
        };
        let [client, server] = self.sequence;
        let (sequence, acknowledgement) = if from_client {
            let acknowledged = if dice.percent(70) { self.isn } else { server };
            (near(dice, client), near(dice, acknowledged))
        } else {
            (near(dice, server), near(dice, client))
        };
        if !from_client && flags & 0x12 == 0x12 {
            self.isn = sequence;
        }
        (from_client, tcp_segment(flags, sequence, acknowledgement, dice.below(12)))
    }

    /// An ICMP error about this conversation, or about one that might be it.
    fn error(&self, dice: &mut Dice, policy: &Policy) -> Step {
        let Flow { source, destination, source_port, destination_port } = self.flow;
        let v4 = source.is_ipv4();
        let mut quoted = match dice.below(8) {
            0 => {
                let stranger = odd_address(dice, policy, v4);
                Packet::new(source, stranger).tcp(tcp_segment(2, 1, 0, 0)).ip()
            }
            1 => Packet::new(source, destination)
                .udp(source_port, destination_port.wrapping_add(u16::from(dice.within(0, 2))), &[1; 8])
                .ip(),
            2 => Packet::new(destination, source).tcp(Tcp::ack(destination_port, source_port, 1, 1)).ip(),
            _ if self.recent.is_empty() => Packet::new(source, destination).ip(),
            _ => dice.pick(&self.recent).clone(),
        };
        if dice.percent(20) {
            quoted.truncate(dice.below(quoted.len() + 1));
        }
        if dice.percent(10) {
            flip(dice, &mut quoted);
        }
        let (sender, addressee) = addresses(&quoted).unwrap_or((source, destination));
        let (mut to, mut from) = if dice.percent(85) { (sender, addressee) } else { (addressee, sender) };
        if to.is_ipv4() != v4 || from.is_ipv4() != v4 {
            (to, from) = (source, destination);
        }
        if dice.percent(30) {
            from = beyond(dice, policy, destination);
        }
        if dice.percent(3) {
            to = odd_address(dice, policy, v4);
        }
        let message = match dice.below(5) {
            0 => Icmp::TooBig(1280, quoted),
            1 => Icmp::TimeExceeded(quoted),
            2 => Icmp::Other(*dice.pick(&[4, 5, 5, 137]), 0, [0; 4], quoted),
            code => Icmp::Unreachable(u8::try_from(code).unwrap_or_default(), quoted),
        };
        let natural = match is_pod(from) {
            true => Hook::InternalIngress,
            false if self.masqueraded => Hook::InternalEgress,
            false => Hook::ExternalIngress,
        };
        let hook = if dice.percent(5) { *dice.pick(&Hook::ALL) } else { natural };
        let place = Place::from(hook, self.input(dice, hook));
        if dice.percent(2) {
            from = forged_address(dice, policy, from);
        }
        let dress = Dress::new(dice);
        let packet = dress.put_on(Packet::new(from, to), v4).icmp(&message);
        Step::Packet(place, damaged(dice, packet.frame()))
    }
}

/// Whether an address is in a block of pods.
fn is_pod(address: IpAddr) -> bool {
    PODS.iter().any(|block| block.parse::<ipnet::IpNet>().is_ok_and(|block| block.contains(&address)))
}

/// Of a pod, mostly where BPF_PROG_TEST_RUN lets its packets come in.
fn interface(dice: &mut Dice) -> u32 {
    match dice.below(20) {
        0 | 1 => POD_INTERFACE,
        2 => OTHER_INTERFACE,
        3 | 4 => 0,
        _ => LAN_INTERFACE,
    }
}

/// Returns an address that its bearer cannot have, or that means something on one link only.
fn forged_address(dice: &mut Dice, policy: &Policy, of: IpAddr) -> IpAddr {
    match (of, dice.below(4)) {
        (IpAddr::V6(_), 0) => {
            let IpAddr::V4(inner) = odd_address(dice, policy, true) else { return of };
            inner.to_ipv6_mapped().into()
        }
        (IpAddr::V6(_), 1) => {
            let choices = [0xfe80, 0xff02, 0]
                .map(|first| IpAddr::from([first, 0, 0, 0, 0, 0, 0, u16::from(first > 0)]));
            *dice.pick(&choices)
        }
        (IpAddr::V4(_), 1) => {
            *dice.pick(&[[0, 0, 0, 0], [169, 254, 1, 1], [224, 0, 0, 251], [255; 4]].map(IpAddr::from))
        }
        _ => odd_address(dice, policy, of.is_ipv4()),
    }
}

/// Returns an address outside the rules: far away, of the cluster, or the node itself.
fn odd_address(dice: &mut Dice, policy: &Policy, v4: bool) -> IpAddr {
    let mut choices: Vec<IpAddr> = NODE_ADDRESSES.iter().filter_map(|address| address.parse().ok()).collect();
    choices.extend(policy.nodes.iter().map(|net| net.addr()));
    choices
        .extend(["203.0.113.5", "2001:db8::5"].iter().filter_map(|address| address.parse::<IpAddr>().ok()));
    for block in LAN.iter().chain(&PODS) {
        choices.push(dice.address(&block.parse().expect("a prefix")));
    }
    choices.retain(|address| address.is_ipv4() == v4);
    *dice.pick(&choices)
}

/// Source and destination of an IP packet.
fn addresses(packet: &[u8]) -> Option<(IpAddr, IpAddr)> {
    let v4 = |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?));
    let v6 = |at: usize| Some(IpAddr::from(<[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?));
    match packet.first()? >> 4 {
        4 => Some((v4(12)?, v4(16)?)),
        6 => Some((v6(8)?, v6(24)?)),
        _ => None,
    }
}

fn tcp_segment(flags: u8, sequence: u32, acknowledgement: u32, payload: usize) -> Tcp {
    let mut tcp = Tcp::ack(0, 0, sequence, acknowledgement).payload(&vec![0; payload]);
    let header = &mut tcp.header;
    (header.fin, header.syn, header.rst) = (flags & 1 != 0, flags & 2 != 0, flags & 4 != 0);
    (header.psh, header.ack, header.urg) = (flags & 8 != 0, flags & 16 != 0, flags & 32 != 0);
    (header.ece, header.cwr) = (flags & 64 != 0, flags & 128 != 0);
    tcp
}

fn number(dice: &mut Dice) -> u32 {
    u32::try_from(dice.bits() >> 32).unwrap_or_default()
}
