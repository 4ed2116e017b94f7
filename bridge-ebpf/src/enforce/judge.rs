//! The path of a packet: parse, flow table, scope, policy, verdict.

use aya_ebpf::{
    bindings::{__sk_buff, TC_ACT_SHOT},
    helpers::generated::bpf_ktime_get_coarse_ns,
    programs::TcContext,
};
use aya_log_ebpf::debug;
use bridge_common::filter::{
    control::Settings,
    counters::Reason,
    event::verdict,
    flow::{Flow, flag},
    policy::{direction, reference},
};

use crate::{
    NEXT, cache, fast_path,
    maps::{CONTROL, FLOWS, HALF_OPEN, SETTINGS, Scratch, scratch},
    mark,
    packet::{self, Kind, Packet, protocol},
    policy, reject,
    report::{self, Told},
    scope::{self, Scope},
    track::{self, Admission, Seen},
};

/// Which way packets go at the hook.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Hook {
    /// From the LAN into the node.
    External,
    /// From a pod into the node.
    Internal,
}

/// The policy in force.
pub(crate) struct Active {
    slot: u32,
    pub(crate) settings: &'static Settings,
    pub(crate) now: u64,
}

impl Active {
    #[inline(always)]
    pub(crate) fn get() -> Option<Self> {
        // SAFETY: no precondition.
        let now = unsafe { bpf_ktime_get_coarse_ns() };
        let slot = CONTROL.get(0)?.slot_at(now);
        let settings = SETTINGS.get(slot)?;
        if settings.generation == 0 { None } else { Some(Self { slot, settings, now }) }
    }
}

/// Judges a packet that came in by an interface.
#[inline(always)]
pub(crate) fn judge(skb: *mut __sk_buff, hook: Hook) -> i32 {
    let Some(scratch) = scratch() else { return NEXT };
    let packet = &mut scratch.packet;
    mark::take_off(skb);
    let action = cache::serve(skb, hook as u32);
    if action != cache::MISS {
        return action;
    }
    if !packet::parse(skb, packet) {
        return NEXT;
    }
    let Some(active) = Active::get() else {
        debug!(&TcContext::new(skb), "no policy in force: packet passes");
        return NEXT;
    };
    let mut found = 0;
    if follows_flow(packet)
        && let Some(flow) = FLOWS.get_ptr_mut(&packet.key)
    {
        found = FLOW_OF_PORTS;
        // SAFETY: a valid element; the fields that racing CPUs write are single bytes and a time stamp.
        let flow = unsafe { &mut *flow };
        let from_initiator = flow.initiator == packet.end_of_source;
        let from_lan = from_initiator == (flow.direction != direction::OUTBOUND);
        let spoofed = from_lan && hook == Hook::Internal;
        if !spoofed
            && track::is_usable(flow, active.settings, active.now)
            && track::established(flow, packet, from_initiator, active.now) == Seen::Pass
        {
            // SAFETY: the context is valid while the program runs.
            let length = unsafe { (*skb).len };
            if flow.flags & flag::AUDIT != 0 {
                report::count_audited(flow.direction, Reason::established, length);
            } else {
                report::count(flow.direction, Reason::established, length);
            }
            return match fast_path::control(active.now) {
                Some(_) => fast_path::forward(skb, flow, from_lan.into(), active.now),
                None => {
                    cache::remember(flow, None, active.now);
                    mark::put_on(skb, flow.direction);
                    NEXT
                }
            };
        }
    }
    // From here, and not from where it matters: with that one's frame, too, it would not fit on the stack of Linux 6.1,
    // which counts a frame in steps of 32 bytes.
    if packet.kind == Kind::Error && packet.is_intact() && quotes_flow(skb, active.slot, active.now) != 0 {
        found = FLOW_OF_QUOTE;
    }
    judge_unknown(skb, active.slot, hook as u32, active.now, found)
}

/// The flow table has an entry for the packet's ports, but the packet does not belong to it.
const FLOW_OF_PORTS: u32 = 1;
/// It is an ICMP error, and there is a flow that it quotes: see [`quotes_flow`].
const FLOW_OF_QUOTE: u32 = 2;

/// Judges a packet that belongs to no established flow; `found` is [`FLOW_OF_PORTS`], [`FLOW_OF_QUOTE`] or 0.
///
/// This and the other functions with C linkage are subprograms that the verifier looks at once, whatever their callers
/// know of the arguments: inlined, the paths through one multiply with the paths through the next.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn judge_unknown(skb: *mut __sk_buff, slot: u32, hook: u32, now: u64, found: u32) -> i32 {
    let Some(Scratch { packet, scope, .. }) = scratch() else { return NEXT };
    let Some(settings) = SETTINGS.get(slot) else { return NEXT };
    let active = Active { slot, settings, now };
    let from_lan = hook == Hook::External as u32;
    if !scope::find(slot, settings, packet, from_lan, scope) {
        return NEXT;
    }
    // SAFETY: the context is valid while the program runs.
    let length = unsafe { (*skb).len };
    let outcome = decide(from_lan, found, &active, scope, packet, length);
    conclude(skb, &active, scope, packet, &outcome, length)
}

/// Whether a packet can be found in the flow tables by its own ports.
#[inline(always)]
fn follows_flow(packet: &Packet) -> bool {
    packet.is_intact() && matches!(packet.kind, Kind::Plain | Kind::Query | Kind::Reply)
}

/// What becomes of a packet, and by which leaf of the policy; 0 where none decided.
struct Outcome {
    reason: Reason,
    leaf: u32,
    /// Belongs to a flow that passes in audit mode only.
    audited: bool,
}

impl Outcome {
    #[inline(always)]
    fn of(reason: Reason) -> Self {
        Self { reason, leaf: 0, audited: false }
    }
}

#[inline(always)]
fn decide(
    from_lan: bool,
    found: u32,
    active: &Active,
    scope: &mut Scope,
    packet: &Packet,
    length: u32,
) -> Outcome {
    if !packet.is_intact() {
        return Outcome::of(packet.problem);
    }
    if scope.direction == u32::from(direction::INBOUND) && !from_lan {
        return Outcome::of(Reason::spoofed);
    }
    match packet.kind {
        Kind::LaterFragment => return Outcome::of(Reason::later_fragment),
        Kind::Error => {
            let related = found == FLOW_OF_QUOTE;
            return Outcome::of(if related { Reason::related } else { Reason::icmp_unrelated });
        }
        _ => {}
    }
    // A SYN is judged by policy, whatever came before it.
    if !(packet.protocol == protocol::TCP && packet.opens_tcp())
        && let Some(flow) = HALF_OPEN.get_ptr_mut(&packet.key)
    {
        // SAFETY: as for established flows in `judge`.
        let flow = unsafe { &mut *flow };
        let from_initiator = flow.initiator == packet.end_of_source;
        if track::is_usable(flow, active.settings, active.now) {
            let (direction, audited) = (flow.direction, flow.flags & flag::AUDIT != 0);
            match track::half_open(flow, packet, from_initiator, active.now) {
                Seen::Pass => {
                    // As of every packet of the flow: a reply is no packet of the other direction.
                    scope.direction = u32::from(direction);
                    return Outcome { audited, ..Outcome::of(Reason::established) };
                }
                Seen::Deny(reason) => return Outcome::of(reason),
                Seen::Judge => {}
            }
        }
    }
    if let Err(reason) = track::opening(packet) {
        return Outcome::of(reason);
    }
    let leaf = policy::evaluate(active.slot);
    if leaf == 0 {
        return Outcome::of(Reason::no_rule);
    }
    policy::count_hit(active.slot, active.settings, leaf, length);
    if leaf & reference::DENY != 0 {
        return Outcome { leaf, ..Outcome::of(Reason::deny_rule) };
    }
    let admission = Admission {
        direction: scope.direction as u8,
        generation: active.settings.generation,
        rule: (leaf & reference::RULE) - 1,
        flags: 0,
    };
    match track::open(packet, &admission, active.settings, active.now, found == FLOW_OF_PORTS) {
        Ok(()) => Outcome { leaf, ..Outcome::of(Reason::new_flow) },
        Err(reason) => Outcome::of(reason),
    }
}

/// Whether an ICMP error quotes a packet that its addressee has sent in a known flow, or in one that is not followed:
/// 1 or 0.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn quotes_flow(skb: *mut __sk_buff, slot: u32, now: u64) -> u32 {
    let Some(Scratch { packet: error, quoted, .. }) = scratch() else { return 0 };
    let Some(settings) = SETTINGS.get(slot) else { return 0 };
    if !packet::parse_quoted(skb, error, quoted) || quoted.source != error.destination {
        return 0;
    }
    if !scope::is_judged(slot, settings, quoted) {
        // A router of the LAN tells about a flow beyond it, which is none of our business.
        return 1;
    }
    // SAFETY: valid elements, only read.
    let is_usable = |flow: *const Flow| track::is_usable(unsafe { &*flow }, settings, now);
    let known = FLOWS.get_ptr(&quoted.key).is_some_and(is_usable)
        || HALF_OPEN.get_ptr(&quoted.key).is_some_and(is_usable);
    u32::from(known)
}

/// Counts, tells, and carries out.
#[inline(always)]
fn conclude(
    skb: *mut __sk_buff,
    active: &Active,
    scope: &Scope,
    packet: &Packet,
    outcome: &Outcome,
    length: u32,
) -> i32 {
    let settings = active.settings;
    let direction = scope.direction as u8;
    let mut told = Told {
        now: active.now,
        rule: outcome.leaf & reference::RULE,
        verdict: verdict::ALLOW,
        reason: outcome.reason as u8,
        direction,
        padding: 0,
    };
    if !outcome.reason.denies() {
        if outcome.audited {
            report::count_audited(direction, outcome.reason, length);
            return NEXT;
        }
        report::count(direction, outcome.reason, length);
        if outcome.reason == Reason::new_flow {
            mark::put_on(skb, direction);
        }
        if settings.report_allowed != 0 && outcome.reason == Reason::new_flow {
            report::tell(skb, active.slot, &told);
        }
        return NEXT;
    }
    debug!(
        &TcContext::new(skb),
        "deny: reason {} direction {} protocol {} bytes {}",
        outcome.reason as u8,
        direction,
        packet.protocol,
        length
    );
    if settings.audit != 0 {
        // The rest of the flow is not reported again: it follows from its first packet.
        if matches!(outcome.reason, Reason::no_rule | Reason::deny_rule) {
            let admission = Admission {
                direction: scope.direction as u8,
                generation: settings.generation,
                rule: told.rule.wrapping_sub(1),
                flags: flag::AUDIT,
            };
            let _ = track::open(packet, &admission, active.settings, active.now, true);
        }
        report::count_audited(direction, outcome.reason, length);
        told.verdict = verdict::AUDIT;
        report::tell(skb, active.slot, &told);
        return NEXT;
    }
    report::count(direction, outcome.reason, length);
    let answerable = settings.reject != 0 && reject::is_answerable(packet, outcome.reason);
    told.verdict = if answerable { verdict::REJECT } else { verdict::DROP };
    report::tell(skb, active.slot, &told);
    if !answerable {
        return TC_ACT_SHOT;
    }
    let action = reject::answer(skb);
    if action == TC_ACT_SHOT {
        debug!(&TcContext::new(skb), "no room for an answer to protocol {}: dropped", packet.protocol);
    }
    action
}

/// Takes note of a packet on its way out to a pod: of replies that came in addressed to the node (masqueraded
/// flows), and of packets that came in on a NodePort.
#[inline(always)]
pub(crate) fn observe_to_pod(skb: *mut __sk_buff) {
    if mark::take_off(skb) {
        return;
    }
    let Some(Scratch { packet, scope, .. }) = scratch() else { return };
    if !packet::parse(skb, packet) || !follows_flow(packet) {
        return;
    }
    let Some(active) = Active::get() else { return };
    if observe(skb, &active, packet, true) {
        return;
    }
    if scope::find(active.slot, active.settings, packet, false, scope)
        && scope.direction == u32::from(direction::INBOUND)
    {
        track::adopt_node_port(packet, active.settings, active.now);
    }
}

/// Takes note of a packet on its way out to the LAN: of replies from NodePorts, and of the way that packets of flows of
/// pods take.
#[inline(always)]
pub(crate) fn observe_to_lan(skb: *mut __sk_buff) {
    if mark::take_off(skb) {
        return;
    }
    let Some(Scratch { packet, .. }) = scratch() else { return };
    if !packet::parse(skb, packet) || !follows_flow(packet) {
        return;
    }
    let Some(active) = Active::get() else { return };
    // SAFETY: the context is valid while the program runs.
    let forwarded = unsafe { (*skb).ingress_ifindex } != 0;
    if scope::is_node_port(active.settings, packet, packet.source_port) {
        observe(skb, &active, packet, false);
    } else if forwarded && let Some(flow) = FLOWS.get_ptr_mut(&packet.key) {
        // Only its way matters: it was judged already, and a denied packet's answer, which looks like one of the flow,
        // must not end it.
        // SAFETY: as for established flows in `judge`.
        learn(skb, &active, packet, unsafe { &mut *flow }, false);
    }
}

/// See [`fast_path::learn`].
#[inline(always)]
fn learn(skb: *mut __sk_buff, active: &Active, packet: &Packet, flow: &mut Flow, to_pod: bool) {
    let from_initiator = flow.initiator == packet.end_of_source;
    let from_lan = from_initiator == (flow.direction != direction::OUTBOUND);
    if from_lan == to_pod && !track::is_expired(flow, active.settings, active.now) {
        fast_path::learn(skb, flow, from_lan.into(), active.now);
    }
}

/// Brings the flow of a packet that leaves the node up to date. `false`: there is none.
#[inline(always)]
fn observe(skb: *mut __sk_buff, active: &Active, packet: &Packet, to_pod: bool) -> bool {
    if let Some(flow) = FLOWS.get_ptr_mut(&packet.key) {
        // SAFETY: as for established flows in `judge`.
        let flow = unsafe { &mut *flow };
        if track::is_usable(flow, active.settings, active.now) {
            let from_initiator = flow.initiator == packet.end_of_source;
            if track::established(flow, packet, from_initiator, active.now) == Seen::Pass {
                learn(skb, active, packet, flow, to_pod);
                return true;
            }
        }
    }
    if let Some(flow) = HALF_OPEN.get_ptr_mut(&packet.key) {
        // SAFETY: as for established flows in `judge`.
        let flow = unsafe { &mut *flow };
        if track::is_usable(flow, active.settings, active.now) {
            let from_initiator = flow.initiator == packet.end_of_source;
            track::half_open(flow, packet, from_initiator, active.now);
            return true;
        }
    }
    false
}
