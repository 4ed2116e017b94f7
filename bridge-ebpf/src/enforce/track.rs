//! Follows flows: what a packet means to an entry of the flow tables.

use bridge_common::filter::{
    control::Settings,
    counters::Reason,
    fast_path::ticks,
    flow::{ClientKey, Flow, FlowKey, flag, state},
    policy::direction,
};

use bridge_ebpf::protocol;

use crate::{
    cache,
    maps::{FLOWS, HALF_OPEN, NODE_PORT_PEERS, Scratch, scratch},
    packet::{Kind, Packet, tcp},
};

/// `last_seen` is updated at most this often, to limit writes to a shared cache line.
const TOUCH_INTERVAL: u64 = 1_000_000_000;

/// Largest distance of the initiator's first acknowledgement from the responder's SYN: more than the responder can have
/// sent by then. A host that cannot see the SYN-ACK cannot complete the handshake.
const ISN_WINDOW: u32 = 1 << 20;

/// The relation of a packet to an entry of the flow tables.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum TrackVerdict {
    /// Belongs to the flow.
    Pass,
    /// Cannot be a packet of the flow.
    Deny(Reason),
    /// Would open a flow, and is to be judged by policy.
    Judge,
}

#[inline(always)]
pub(crate) fn is_expired(flow: &Flow, settings: &Settings, now: u64) -> bool {
    match timeout(settings, flow.state) {
        Some(timeout) => now.saturating_sub(flow.last_seen) > timeout,
        None => true,
    }
}

/// Whether packets may still belong to this flow: not expired, and not one that audit mode alone has let in.
#[inline(always)]
pub(crate) fn is_usable(flow: &Flow, settings: &Settings, now: u64) -> bool {
    (flow.flags & flag::AUDIT == 0 || settings.audit != 0) && !is_expired(flow, settings, now)
}

/// Returns how long a flow of this state may be silent, in nanoseconds.
///
/// The mask changes no state. Linux 6.1 forgets the bounds from a comparison once it uses the value's copy on the stack, and
/// keeps those from a mask.
#[inline(always)]
fn timeout(settings: &Settings, state: u8) -> Option<u64> {
    const { assert!(state::COUNT <= 16) }
    settings.timeouts.get(usize::from(state & 15)).copied()
}

/// A packet of a flow in the established table.
#[inline(always)]
pub(crate) fn established(flow: &mut Flow, packet: &Packet, from_initiator: bool, now: u64) -> TrackVerdict {
    match packet.kind {
        // A query in the direction of the replies asks for a flow of its own.
        Kind::Query if !from_initiator => return TrackVerdict::Judge,
        Kind::Reply if from_initiator => return TrackVerdict::Deny(Reason::icmp_unsolicited),
        _ => {}
    }
    if packet.protocol == protocol::TCP {
        if packet.opens_tcp() && (!from_initiator || flow.state != state::ESTABLISHED) {
            // The ports are reused, or a SYN was repeated after its connection was established: only the latter passes.
            return TrackVerdict::Judge;
        }
        if packet.detail & (tcp::SYN | tcp::ACK) == tcp::SYN | tcp::ACK
            && !from_initiator
            && flow.state != state::ESTABLISHED
            && HALF_OPEN.get_ptr(&packet.key).is_some()
        {
            // The responder agrees to the ports being used again.
            return TrackVerdict::Judge;
        }
        tcp_established(flow, packet, from_initiator);
    }
    if now.saturating_sub(flow.last_seen) > TOUCH_INTERVAL {
        flow.last_seen = now;
    }
    TrackVerdict::Pass
}

#[inline(always)]
fn tcp_established(flow: &mut Flow, packet: &Packet, from_initiator: bool) {
    let was_settled = flow.state == state::ESTABLISHED;
    if packet.detail & tcp::RST != 0 {
        if flow.state != state::RESET {
            flow.state = state::RESET;
        }
    } else if packet.detail & tcp::FIN != 0 {
        let fin = if from_initiator { flag::FIN_INITIATOR } else { flag::FIN_RESPONDER };
        if flow.flags & fin == 0 || flow.state == state::RESET {
            flow.flags |= fin;
            flow.state = by_fins(flow.flags);
        }
    } else if flow.state == state::RESET {
        // The receiver ignored the RST: it was forged or out of window (RFC 5961, 3.2).
        flow.state = by_fins(flow.flags);
    }
    if was_settled && flow.state != state::ESTABLISHED {
        cache::forget(&packet.key);
    }
}

/// Returns the state of a connection by its FINs.
#[inline(always)]
fn by_fins(flags: u8) -> u8 {
    const BOTH: u8 = flag::FIN_INITIATOR | flag::FIN_RESPONDER;
    match flags & BOTH {
        0 => state::ESTABLISHED,
        BOTH => state::CLOSING,
        _ => state::FIN_WAIT,
    }
}

/// A packet of a flow in the half-open table.
#[inline(always)]
pub(crate) fn half_open(flow: &mut Flow, packet: &Packet, from_initiator: bool, now: u64) -> TrackVerdict {
    if packet.protocol == protocol::TCP {
        return tcp_half_open(flow, packet, from_initiator, now);
    }
    match packet.kind {
        Kind::Query if !from_initiator => return TrackVerdict::Judge,
        Kind::Reply if from_initiator => return TrackVerdict::Deny(Reason::icmp_unsolicited),
        _ => {}
    }
    if from_initiator {
        // No answer yet: the active policy decides, not that of the first packet.
        return TrackVerdict::Judge;
    }
    promote(flow, &packet.key, replied(packet), now)
}

#[inline(always)]
fn tcp_half_open(flow: &mut Flow, packet: &Packet, from_initiator: bool, now: u64) -> TrackVerdict {
    let flags = packet.detail;
    if packet.opens_tcp() {
        return TrackVerdict::Judge;
    }
    if flags & tcp::RST != 0 {
        flow.state = state::RESET;
        flow.last_seen = now;
        return TrackVerdict::Pass;
    }
    if !from_initiator {
        if flags & tcp::SYN != 0 {
            flow.state = state::SYN_RECEIVED;
            flow.set_responder_isn(packet.sequence);
            flow.last_seen = now;
            // The earlier connection of these ports has ended.
            remove(&packet.key);
        }
        // Any other segment belongs to an older connection of these ports; the initiator will reset it.
        return TrackVerdict::Pass;
    }
    let beyond = packet.acknowledgement.wrapping_sub(flow.responder_isn().wrapping_add(1));
    if flow.state == state::SYN_RECEIVED && flags & tcp::SYN == 0 && beyond < ISN_WINDOW {
        let verdict = promote(flow, &packet.key, state::ESTABLISHED, now);
        if flags & tcp::FIN != 0
            && let Some(promoted) = FLOWS.get_ptr_mut(&packet.key)
        {
            // SAFETY: a valid element; racing writers set the same bits.
            tcp_established(unsafe { &mut *promoted }, packet, true);
        }
        return verdict;
    }
    TrackVerdict::Deny(Reason::invalid_state)
}

/// Moves a flow to the established table.
#[inline(always)]
fn promote(flow: &mut Flow, key: &FlowKey, state: u8, now: u64) -> TrackVerdict {
    let Some(Scratch { flow: promoted, .. }) = scratch() else {
        return TrackVerdict::Deny(Reason::table_full);
    };
    *promoted = Flow { last_seen: now, state, leases: Default::default(), ..*flow };
    if FLOWS.insert(key, promoted, 0).is_err() {
        return TrackVerdict::Deny(Reason::table_full);
    }
    let _ = HALF_OPEN.remove(key);
    TrackVerdict::Pass
}

/// Removes a flow from the established table.
#[inline(always)]
fn remove(key: &FlowKey) {
    let _ = FLOWS.remove(key);
    cache::forget(key);
}

#[inline(always)]
fn replied(packet: &Packet) -> u8 {
    match packet.protocol {
        protocol::UDP => state::UDP_REPLIED,
        protocol::ICMP | protocol::ICMPV6 => state::ICMP_REPLIED,
        _ => state::OTHER_REPLIED,
    }
}

#[inline(always)]
fn unreplied(packet: &Packet) -> u8 {
    match packet.protocol {
        protocol::TCP => state::SYN_SENT,
        protocol::UDP => state::UDP_UNREPLIED,
        protocol::ICMP | protocol::ICMPV6 => state::ICMP_UNREPLIED,
        _ => state::OTHER_UNREPLIED,
    }
}

/// Returns why a packet cannot open a flow.
#[inline(always)]
pub(crate) fn opening(packet: &Packet) -> Result<(), Reason> {
    match packet.protocol {
        protocol::TCP if !packet.opens_tcp() => Err(Reason::not_syn),
        protocol::SCTP if !packet.opens_sctp() => Err(Reason::not_init),
        _ if packet.kind == Kind::Reply => Err(Reason::icmp_unsolicited),
        _ => Ok(()),
    }
}

/// How a flow was admitted.
pub(crate) struct Admission {
    pub(crate) direction: u8,
    pub(crate) generation: u32,
    pub(crate) rule: u32,
    /// Bits of [`flag`].
    pub(crate) flags: u8,
}

/// Enters the flow that a packet opens, or reopens; `again`: the established table may have an entry for its ports.
#[inline(always)]
pub(crate) fn open(
    packet: &Packet,
    admission: &Admission,
    settings: &Settings,
    now: u64,
    again: bool,
) -> Result<(), Reason> {
    let Some(Scratch { flow, .. }) = scratch() else { return Err(Reason::table_full) };
    *flow = Flow {
        last_seen: now,
        opened: ticks(now),
        state: unreplied(packet),
        initiator: packet.end_of_source,
        direction: admission.direction,
        flags: admission.flags,
        leases: Default::default(),
        generation: admission.generation,
        rule: admission.rule,
    };
    if HALF_OPEN.insert(&packet.key, flow, 0).is_err() {
        return Err(Reason::table_full);
    }
    if again {
        // A SYN ends the earlier connection of its ports only once the responder has answered: the SYN, and the end of the
        // connection before it, may be forged.
        let goes_on = packet.protocol == protocol::TCP
            // SAFETY: a valid element, only read.
            && FLOWS.get_ptr(&packet.key).is_some_and(|flow| is_usable(unsafe { &*flow }, settings, now));
        if !goes_on {
            remove(&packet.key);
        }
    }
    if admission.direction == direction::NODE_PORT {
        let seen = if admission.flags & flag::AUDIT == 0 { now & !1 } else { now | 1 };
        let _ = NODE_PORT_PEERS.insert(&client(packet), &seen, 0);
    }
    Ok(())
}

#[inline(always)]
fn client(packet: &Packet) -> ClientKey {
    ClientKey { address: packet.source, port: packet.source_port, protocol: packet.protocol, padding: [0; 5] }
}

/// Enters the flow of a packet that was let in on a NodePort and then translated to a pod's address, so that the pod may
/// reply.
#[inline(always)]
pub(crate) fn adopt_node_port(packet: &Packet, settings: &Settings, now: u64) {
    let client = client(packet);
    // SAFETY: only copied.
    let Some(seen) = (unsafe { NODE_PORT_PEERS.get(&client) }) else { return };
    let age = now.saturating_sub(*seen);
    let flags = if *seen & 1 == 0 { 0 } else { flag::AUDIT };
    if timeout(settings, unreplied(packet)).is_none_or(|timeout| age > timeout) || opening(packet).is_err() {
        return;
    }
    let admission =
        Admission { direction: direction::INBOUND, generation: settings.generation, rule: u32::MAX, flags };
    let _ = open(packet, &admission, settings, now, true);
}
