//! The packets after the first: the answer, and the one that follows it, at the programs of a node.
//!
//! Where the node translates addresses, the answer comes from another address than the one that the client asked. The programs see
//! it ahead of the reverse translation, and look for its flow under the addresses that it has there.

use std::{cell::RefCell, net::IpAddr};

use bridge_common::filter::{counters::Reason, flow::FlowKey, policy::direction};

use super::{
    Class, Explanation, Facts, FlowTable, Judge, Kind, KnownFlow, Mark, NodeState, Outcome, Packet, Place,
    Question, Remedy, Stage, StageOutcome, Verdict, judge::ip,
};
use crate::model::{Hook, Mode};

/// A packet of an allowed connection that a program denies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lost {
    /// Which packet it is, for people.
    pub name: &'static str,
    /// The packet, with the addresses that it has there.
    pub packet: Packet,
    /// The program.
    pub hook: Hook,
    /// Why it is denied.
    pub reason: Reason,
}

/// A flow that an earlier packet of the connection has entered.
#[derive(Clone, Copy)]
struct Entry {
    key: FlowKey,
    initiator: u8,
    direction: u8,
    /// Whether the node may translate its packets: they are followed at egress hooks, too.
    translated: bool,
    unrestricted: bool,
    answered: bool,
}

/// A node without flows but those of this connection.
struct Followed<'a> {
    state: &'a dyn NodeState,
    entries: RefCell<Vec<Entry>>,
}

impl NodeState for Followed<'_> {
    fn hosted(&self, pod: IpAddr) -> Option<u32> {
        self.state.hosted(pod)
    }

    fn leads_to(&self, source: IpAddr, interface: u32) -> bool {
        self.state.leads_to(source, interface)
    }

    fn is_external(&self, interface: u32) -> bool {
        self.state.is_external(interface)
    }

    fn has_tunnel(&self, protocol: u8, port: u16) -> bool {
        self.state.has_tunnel(protocol, port)
    }

    fn flow(&self, table: FlowTable, packet: &Packet) -> Option<KnownFlow> {
        let entry = self.entry(packet).filter(|_| table == FlowTable::HalfOpen)?;
        Some(KnownFlow {
            by_source: entry.initiator == packet.flow_key().1,
            direction: entry.direction,
            audit: false,
            unrestricted: entry.unrestricted,
            interface: 0,
        })
    }
}

impl Followed<'_> {
    fn entry(&self, packet: &Packet) -> Option<Entry> {
        let (key, _) = packet.flow_key();
        self.entries.borrow().iter().find(|entry| entry.key == key).copied()
    }

    fn enter(&self, packet: &Packet, direction: u8, translated: bool, unrestricted: bool) {
        let (key, initiator) = packet.flow_key();
        let entry = Entry { key, initiator, direction, translated, unrestricted, answered: false };
        self.entries.borrow_mut().push(entry);
    }

    fn answered(&self, packet: &Packet) {
        let (key, source) = packet.flow_key();
        let mut entries = self.entries.borrow_mut();
        for entry in entries.iter_mut().filter(|entry| entry.key == key && entry.initiator != source) {
            entry.answered = true;
        }
    }

    /// Follows a packet through a hook; returns the mark that it leaves with, or why it is denied.
    fn pass(&self, judge: &Judge<'_>, place: Place, packet: &Packet) -> Result<Mark, Reason> {
        let ingress = matches!(place.hook, Hook::ExternalIngress | Hook::InternalIngress);
        let from_lan = place.hook == Hook::ExternalIngress;
        match judge.judge(place, packet) {
            Outcome::Denied(_, reason, _) => Err(reason),
            Outcome::Unjudged(mark) => {
                // A pod's view of a NodePort flow.
                if place.hook == Hook::InternalEgress && place.mark == Mark::Admitted && place.input != 0 {
                    self.enter(packet, direction::INBOUND, true, false);
                }
                Ok(mark)
            }
            // Rules do not restrict it, but a flow may know it: an answer of a pod in a flow that was let in.
            Outcome::Followed(mark) if let Some(entry) = self.entry(packet) => {
                let is_answer = entry.initiator != packet.flow_key().1;
                self.answered(packet);
                Ok(if is_answer { Mark::Admitted } else { mark })
            }
            Outcome::Followed(mark) => {
                self.enter(packet, direction::OUTBOUND, true, true);
                Ok(mark)
            }
            Outcome::Allowed(direction, _) => {
                self.enter(packet, direction, !ingress, false);
                Ok(if direction == direction::NODE_PORT { Mark::Admitted } else { Mark::Judged })
            }
            Outcome::Known(flow) | Outcome::Handshake(flow) => {
                self.answered(packet);
                let translated = self.entry(packet).is_some_and(|entry| entry.translated);
                Ok(match (translated, from_lan) {
                    (true, true) => Mark::Origin(packet.source),
                    (true, false) => Mark::Admitted,
                    (false, _) if flow.direction == direction::NODE_PORT => Mark::Admitted,
                    (false, _) => Mark::Judged,
                })
            }
        }
    }

    /// Returns the hook and the interface that packets of an address come in by; `None`: of the node itself.
    fn enters(&self, judge: &Judge<'_>, source: IpAddr, lan: u32) -> Option<(Hook, u32)> {
        match (judge.class(source), self.hosted(source)) {
            (Class::Local, _) => None,
            (Class::Pod, Some(interface)) => Some((Hook::InternalIngress, interface)),
            _ => Some((Hook::ExternalIngress, lan)),
        }
    }

    /// Returns the hook that packets to an address leave by; `None`: they are for the node itself.
    fn leaves(&self, judge: &Judge<'_>, destination: IpAddr) -> Option<Hook> {
        match (judge.class(destination), self.hosted(destination)) {
            (Class::Local, _) => None,
            (Class::Pod, Some(_)) => Some(Hook::InternalEgress),
            _ => Some(Hook::ExternalEgress),
        }
    }
}

/// Follows an allowed connection there and back. `source`: address and port that a rule of the node gives to its packets behind the
/// hooks of ingress.
#[must_use]
pub fn lost(
    facts: &Facts<'_>,
    question: &Question,
    source_port: u16,
    source: Option<(IpAddr, u16)>,
) -> Option<Lost> {
    if facts.policy.mode == Mode::Audit {
        return None;
    }
    let state = Followed { state: facts.state, entries: RefCell::default() };
    let judge = Judge { policy: facts.policy, local: facts.local, state: &state };
    let asked = (question.destination, question.destination_port);
    let packet = |from: (IpAddr, u16), to: (IpAddr, u16), kind| Packet {
        source: from.0,
        destination: to.0,
        protocol: question.protocol.0,
        source_port: from.1,
        destination_port: to.1,
        kind,
    };
    let answers = match question.protocol.0 {
        ip::TCP | ip::SCTP | ip::ICMP | ip::ICMPV6 => Kind::Following,
        _ => Kind::Opening,
    };
    let client = (question.source, source_port);
    let (seen, server) = (source.unwrap_or(client), question.backend.unwrap_or(asked));
    let step = |name, place: Place, packet: Packet| {
        let passed = state.pass(&judge, place, &packet);
        passed.map_err(|reason| Lost { name, packet, hook: place.hook, reason })
    };
    // Packets that the node itself sends are not judged.
    let (hook, input) = state.enters(&judge, client.0, facts.lan_interface)?;
    let there = Place { hook, input, mark: Mark::None };
    let first = packet(client, asked, Kind::Opening);
    // The first verdict has a stage of its own.
    let mark = state.pass(&judge, there, &first).ok()?;
    let follow = || -> Result<(), Lost> {
        if let Some(hook) = state.leaves(&judge, server.0) {
            step("its first packet", Place { hook, input, mark }, packet(seen, server, Kind::Opening))?;
        }
        let back = state.enters(&judge, server.0, facts.lan_interface);
        let mut place = Place { hook: Hook::ExternalEgress, input: 0, mark: Mark::None };
        if let Some((hook, input)) = back {
            let mark =
                step("the answer", Place { hook, input, mark: Mark::None }, packet(server, seen, answers))?;
            place = Place { input, mark, ..place };
        }
        if let Some(hook) = state.leaves(&judge, client.0) {
            step("the answer", Place { hook, ..place }, packet(asked, client, answers))?;
        }
        // Only the answer makes a flow of TCP or SCTP one that its opener may go on with.
        let unanswered = state.entry(&first).filter(|entry| !entry.answered && !entry.unrestricted);
        let reason = match question.protocol.0 {
            ip::TCP => Reason::not_syn,
            ip::SCTP => Reason::not_init,
            _ => return Ok(()),
        };
        let packet = Packet { kind: Kind::Following, ..first };
        unanswered.map_or(Ok(()), |_| Err(Lost { name: "the packet after the answer", packet, hook, reason }))
    };
    follow().err()
}

impl Explanation {
    /// Notes that a program denies a packet after the first. `rule`: of netfilter, that translates the connection.
    pub(crate) fn lost(&mut self, lost: &Lost, rule: Option<&str>) {
        let Lost { name, packet, hook, reason } = lost;
        let text = |address: IpAddr, port: u16| {
            if port == 0 { address.to_string() } else { std::net::SocketAddr::new(address, port).to_string() }
        };
        let seen = format!(
            "{name} is denied at {}: {} -> {}",
            hook.name(),
            text(packet.source, packet.source_port),
            text(packet.destination, packet.destination_port)
        );
        let by = rule.map(|rule| format!(" ({rule})")).unwrap_or_default();
        let why = "the node translates the connection, so that it has other addresses than the flow that was allowed";
        let first = std::mem::take(&mut self.summary);
        let mut lines = first.lines();
        let allowed = lines.next().unwrap_or_default();
        let rest: String = lines.map(|line| format!("\n{line}")).collect();
        self.summary = format!(
            "DENIED: {seen} ({}: {})\nIts first packet: {allowed}{rest}",
            reason.name(),
            reason.text()
        );
        self.verdict = Verdict::Deny;
        self.reason = Some(reason.name().to_owned());
        self.add(Stage::new("answers", StageOutcome::Deny, seen, format!("{why}{by}")));
        self.remedy = Some(Remedy {
            text: format!(
                "exclude traffic between networks.external and networks.pods from the rule that translates it{by}"
            ),
            config: None,
            policy: None,
        });
    }
}
