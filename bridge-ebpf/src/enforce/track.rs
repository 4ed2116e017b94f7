//! Follows flows: what a packet means to an entry of the flow tables.

use bridge_common::filter::{
    control::Settings,
    counters::Reason,
    fast_path::ticks,
    flow::{Flow, FlowKey, flag, state},
    policy::direction,
};

use bridge_ebpf::protocol;

use crate::{
    cache, flow_filter,
    maps::{self, ENDS, HALF_OPEN, Scratch, scratch},
    packet::{Kind, Packet, sctp, tcp},
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
pub(crate) fn established(
    flow: &mut Flow,
    packet: &Packet,
    settings: &Settings,
    from_initiator: bool,
    now: u64,
) -> TrackVerdict {
    match packet.kind {
        // A query in the direction of the replies asks for a flow of its own.
        Kind::Query if !from_initiator => return TrackVerdict::Judge,
        Kind::Reply if from_initiator => return TrackVerdict::Deny(Reason::icmp_unsolicited),
        _ => {}
    }
    if packet.protocol == protocol::TCP {
        // A SYN of either end is judged by the active policy. If it passes, the flow continues until the responder agrees.
        if packet.opens_tcp() {
            return TrackVerdict::Judge;
        }
        if packet.detail & (tcp::SYN | tcp::ACK) == tcp::SYN | tcp::ACK
            // SAFETY: a valid element, only read.
            && let Some(next) = HALF_OPEN.get_ptr(&packet.key).map(|next| unsafe { &*next })
            && next.initiator != packet.end_of_source
            && acknowledges_syn(next, packet)
            && is_usable(next, settings, now)
        {
            // The responder agrees to the ports being reused.
            return TrackVerdict::Judge;
        }
        tcp_established(flow, packet, from_initiator, now);
    }
    if packet.protocol == protocol::SCTP && !is_of_association(flow, packet, from_initiator) {
        return TrackVerdict::Judge;
    }
    if now.saturating_sub(flow.last_seen) > TOUCH_INTERVAL {
        flow.last_seen = now;
    }
    TrackVerdict::Pass
}

/// Whether an SCTP packet belongs to an established association: it has the tag that its receiver has announced (RFC 9260,
/// 8.5). Where the tags are unknown, every packet does that opens none.
#[inline(always)]
fn is_of_association(flow: &Flow, packet: &Packet, from_initiator: bool) -> bool {
    let known = flow.tag(true) != 0;
    !packet.opens_sctp()
        && (!known || has_tag(flow, packet, from_initiator))
        // A delayed answer to the INIT of another association announces another tag.
        && (!known || packet.detail != sctp::INIT_ACK || packet.acknowledgement == flow.tag(from_initiator))
}

/// Whether an SCTP packet has the verification tag of its receiver, or reflects that of its sender.
#[inline(always)]
fn has_tag(flow: &Flow, packet: &Packet, from_initiator: bool) -> bool {
    let tag = flow.tag(from_initiator == packet.reflects_tag());
    tag != 0 && packet.sequence == tag
}

/// How far a number of the LAN host's RST may be ahead of the last one that the pod is known to expect: as much as the pod
/// may have received since its last acknowledgement that was read here. The cache and the fast path read none.
const RST_WINDOW: u32 = 1 << 16;
/// The pod's acknowledgements are noted at this distance, to limit writes to a shared cache line.
const NUMBER_STEP: u32 = 1 << 14;
/// How long a FIN of the LAN host may wait for the pod's acknowledgement.
const FIN_TICKS: u32 = ticks(10_000_000_000);

/// Follows the end of a connection. A packet of the pod is what it seems, since it came by the pod's interface. A packet in
/// the name of the LAN host may be forged: its RST counts with a number that the pod expects, its FIN once the pod has
/// acknowledged it.
#[inline(always)]
fn tcp_established(flow: &mut Flow, packet: &Packet, from_initiator: bool, now: u64) {
    let was_settled = flow.is_settled(protocol::TCP);
    let from_lan = from_initiator == (flow.direction != direction::OUTBOUND);
    if flow.flags & flag::FIN_PENDING != 0 && ticks(now).wrapping_sub(flow.pending_fin().1) > FIN_TICKS {
        withdraw_fin(flow);
    }
    if packet.detail & tcp::RST != 0 {
        let beyond = packet.sequence.wrapping_sub(flow.expected);
        let counts = !from_lan || (flow.flags & flag::NUMBERED != 0 && beyond < RST_WINDOW);
        if counts && flow.state != state::RESET {
            flow.state = state::RESET;
        }
    } else {
        if flow.state == state::RESET {
            // The receiver ignored the RST (RFC 5961, 3.2).
            flow.state = by_fins(flow.flags);
        }
        if from_lan {
            if packet.detail & tcp::FIN != 0 {
                let payload = packet.end.wrapping_sub(packet.l4).wrapping_sub(packet.tcp_header);
                let end = packet.sequence.wrapping_add(payload).wrapping_add(1);
                if flow.flags & fin_of(from_initiator) == 0 {
                    flow.flags |= flag::FIN_PENDING;
                    flow.set_pending_fin(end, ticks(now));
                    note_end(&packet.key);
                }
            }
        } else {
            note_expected(flow, packet);
            if packet.detail & tcp::FIN != 0 {
                end(flow, fin_of(from_initiator));
            }
            if flow.flags & flag::FIN_PENDING != 0 && packet.acknowledgement == flow.pending_fin().0 {
                withdraw_fin(flow);
                end(flow, fin_of(!from_initiator));
            }
        }
    }
    if was_settled && !flow.is_settled(protocol::TCP) {
        cache::forget(&packet.key);
    }
}

/// Notes a FIN for the agent.
#[inline(always)]
fn note_end(key: &FlowKey) {
    if let Some(mut entry) = ENDS.reserve(0) {
        entry.write(*key);
        entry.submit(0);
    }
}

/// Notes the number that the pod expects next from the LAN host.
#[inline(always)]
fn note_expected(flow: &mut Flow, packet: &Packet) {
    if packet.detail & tcp::ACK == 0 {
        return;
    }
    let step = packet.acknowledgement.wrapping_sub(flow.expected);
    if flow.flags & flag::NUMBERED == 0 {
        flow.expected = packet.acknowledgement;
        flow.flags |= flag::NUMBERED;
    } else if (NUMBER_STEP..1 << 31).contains(&step) {
        flow.expected = packet.acknowledgement;
    }
}

#[inline(always)]
fn withdraw_fin(flow: &mut Flow) {
    flow.flags &= !flag::FIN_PENDING;
    flow.leases = Default::default();
}

#[inline(always)]
fn end(flow: &mut Flow, fin: u8) {
    if flow.flags & fin == 0 {
        flow.flags |= fin;
        flow.state = by_fins(flow.flags);
    }
}

#[inline(always)]
fn fin_of(initiator: bool) -> u8 {
    if initiator { flag::FIN_INITIATOR } else { flag::FIN_RESPONDER }
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

/// Whether a segment acknowledges the SYN of a half-open flow, and no more than the data that it may have carried (RFC 7413).
#[inline(always)]
fn acknowledges_syn(flow: &Flow, packet: &Packet) -> bool {
    is_behind_syn(flow, packet.acknowledgement)
}

/// Whether a number is one that follows the initiator's SYN, or the data in it.
#[inline(always)]
fn is_behind_syn(flow: &Flow, number: u32) -> bool {
    number.wrapping_sub(flow.initiator_isn().wrapping_add(1)) <= flow.expected
}

/// A packet of a flow in the half-open table.
#[inline(always)]
pub(crate) fn half_open(flow: &mut Flow, packet: &Packet, from_initiator: bool, now: u64) -> TrackVerdict {
    if packet.protocol == protocol::TCP {
        return tcp_half_open(flow, packet, from_initiator, now);
    }
    if packet.protocol == protocol::SCTP && (packet.opens_sctp() || flow.tag(true) != 0) {
        return sctp_half_open(flow, packet, from_initiator, now);
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

/// An association is established once its initiator has returned the responder's cookie: a host that cannot see the INIT ACK
/// knows no tag.
#[inline(always)]
fn sctp_half_open(flow: &mut Flow, packet: &Packet, from_initiator: bool, now: u64) -> TrackVerdict {
    if packet.opens_sctp() || !has_tag(flow, packet, from_initiator) {
        return TrackVerdict::Judge;
    }
    if !from_initiator && packet.detail == sctp::INIT_ACK {
        flow.set_tag(false, packet.acknowledgement);
        flow.last_seen = now;
    }
    if from_initiator && packet.detail == sctp::COOKIE_ECHO {
        return promote(flow, &packet.key, state::OTHER_REPLIED, now);
    }
    TrackVerdict::Pass
}

#[inline(always)]
fn tcp_half_open(flow: &mut Flow, packet: &Packet, from_initiator: bool, now: u64) -> TrackVerdict {
    let flags = packet.detail;
    if packet.opens_tcp() {
        return TrackVerdict::Judge;
    }
    if flow.state == state::OTHER_UNREPLIED {
        // Opened before it was seen, by a pod, towards where no rule restricts it.
        return if from_initiator {
            TrackVerdict::Judge
        } else {
            promote(flow, &packet.key, state::ESTABLISHED, now)
        };
    }
    if !from_initiator {
        // Anything that does not answer the SYN is forged, or of an older connection of these ports: it passes, and its
        // receiver answers it.
        if flags & tcp::ACK == 0 || !acknowledges_syn(flow, packet) {
            return TrackVerdict::Pass;
        }
        if flags & tcp::RST != 0 {
            flow.state = state::RESET;
            flow.last_seen = now;
        } else if flags & tcp::SYN != 0 {
            flow.state = state::SYN_RECEIVED;
            flow.set_responder_isn(packet.sequence);
            flow.last_seen = now;
            // The earlier connection of these ports has ended.
            remove(&packet.key);
        }
        return TrackVerdict::Pass;
    }
    if flags & tcp::RST != 0 {
        if is_behind_syn(flow, packet.sequence) {
            flow.state = state::RESET;
            flow.last_seen = now;
        }
        return TrackVerdict::Pass;
    }
    let beyond = packet.acknowledgement.wrapping_sub(flow.responder_isn().wrapping_add(1));
    if flow.state == state::SYN_RECEIVED && flags & tcp::SYN == 0 && beyond < ISN_WINDOW {
        let verdict = promote(flow, &packet.key, state::ESTABLISHED, now);
        if let Some(promoted) = maps::established(&packet.key) {
            // SAFETY: a valid element; racing writers set the same bits.
            tcp_established(unsafe { &mut *promoted }, packet, true, now);
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
    let (initiator_isn, responder_isn) = (flow.initiator_isn(), flow.responder_isn());
    let leases = if key.protocol == protocol::SCTP { flow.leases } else { Default::default() };
    *promoted = Flow { last_seen: now, state, leases, ..*flow };
    if flow.state == state::SYN_RECEIVED {
        let isn = if flow.direction == direction::OUTBOUND { responder_isn } else { initiator_isn };
        promoted.expected = isn.wrapping_add(1);
        promoted.flags |= flag::NUMBERED;
    }
    if !maps::insert_established(key, promoted) {
        return TrackVerdict::Deny(Reason::table_full);
    }
    let _ = HALF_OPEN.remove(key);
    TrackVerdict::Pass
}

/// Removes a flow from the established table.
#[inline(always)]
fn remove(key: &FlowKey) {
    maps::remove_established(key);
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
    /// Index of the pod's interface; 0: unknown.
    pub(crate) interface: u32,
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
    // A SYN or an INIT ends what came before it on its ports only once the responder has answered: it, and the end of the
    // connection before it, may be forged.
    let earlier = if again { maps::established(&packet.key) } else { None };
    let goes_on = matches!(packet.protocol, protocol::TCP | protocol::SCTP)
        // SAFETY: a valid element, only read.
        && earlier.is_some_and(|flow| is_usable(unsafe { &*flow }, settings, now));
    if goes_on && packet.protocol == protocol::SCTP && !packet.opens_sctp() {
        // A pod sends a wrong tag.
        return Ok(());
    }
    // Field by field: of the leases alone the compiler would make a call of a loop over bytes.
    flow.last_seen = now;
    flow.opened = ticks(now);
    flow.state = if packet.protocol == protocol::TCP && !packet.opens_tcp() {
        state::OTHER_UNREPLIED
    } else {
        unreplied(packet)
    };
    (flow.initiator, flow.direction, flow.flags) =
        (packet.end_of_source, admission.direction, admission.flags);
    let leases = (&raw mut flow.leases).cast::<u64>();
    // SAFETY: two leases of 8 bytes each, behind a word.
    unsafe {
        leases.write_volatile(0);
        leases.add(1).write_volatile(0);
    }
    (flow.generation, flow.rule) = (admission.generation, admission.rule);
    (flow.interface, flow.expected) = (admission.interface, 0);
    if packet.protocol == protocol::TCP {
        flow.set_initiator_isn(packet.sequence);
        flow.expected = packet.tcp_payload();
    }
    if packet.protocol == protocol::SCTP && packet.opens_sctp() {
        flow.set_tag(true, packet.acknowledgement);
    }
    // An established flow has been a half-open one.
    flow_filter::note(&packet.key);
    if HALF_OPEN.insert(&packet.key, flow, 0).is_err() {
        return Err(Reason::table_full);
    }
    if earlier.is_some() && !goes_on {
        remove(&packet.key);
    }
    Ok(())
}

/// Enters the flow of a packet that was let in on a NodePort and then translated to a pod's address, so that the pod may
/// reply.
#[inline(always)]
pub(crate) fn adopt(packet: &Packet, settings: &Settings, now: u64, interface: u32) {
    if !packet.follows_flow() || opening(packet).is_err() {
        return;
    }
    let admission = Admission {
        direction: direction::INBOUND,
        generation: settings.generation,
        rule: u32::MAX,
        flags: flag::TRANSLATED | if settings.audit != 0 { flag::AUDIT } else { 0 },
        interface,
    };
    let _ = open(packet, &admission, settings, now, true);
}
