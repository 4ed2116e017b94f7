//! The path of a packet: cache, headers, flow table, scope, policy, verdict.

use aya_ebpf::{bindings::__sk_buff, programs::TcContext};
use aya_log_ebpf::debug;
use bridge_common::filter::{
    counters::Reason,
    flow::{Flow, flag},
    interface::role,
    policy::{direction, reference, side},
};
use bridge_ebpf::protocol;

use crate::{
    action::NEXT,
    active::Active,
    cache,
    cache_set::Place,
    fast_path, flow_filter, fragments,
    hook::Hook,
    maps::{HALF_OPEN, INTERFACES, Route, Scratch, established, scratch},
    mark,
    packet::{Kind, Packet},
    parse, policy,
    refusals::{self, NO_FLOW},
    report, scope,
    sides::Sides,
    track::{self, Admission, TrackVerdict},
    verdict::{self, Verdict},
};

/// Judges a packet at an ingress hook.
#[inline(always)]
pub(crate) fn ingress(skb: *mut __sk_buff, hook: u32) -> i32 {
    let Some(scratch) = scratch() else { return NEXT };
    let packet = &mut scratch.packet;
    if mark::read(skb) != mark::NONE {
        if hook == Hook::INTERNAL_INGRESS && was_seen_at_port(skb) {
            return NEXT;
        }
        mark::put(skb, mark::NONE);
    }
    let action = cache::serve(skb, hook);
    if action != cache::MISS {
        return action;
    }
    if !parse::parse(skb, packet) {
        return NEXT;
    }
    let Some(active) = Active::get() else {
        debug!(&TcContext::new(skb), "no active policy: packet passes");
        return NEXT;
    };
    // A SYN is judged by policy, whatever the table says: only one that opens a flow looks there, see `track::open`.
    let opens_tcp = packet.protocol == protocol::TCP && packet.opens_tcp();
    let mut found = if opens_tcp { FLOW_OF_PORTS } else { 0 };
    let follows_flow = packet.follows_flow() && !opens_tcp;
    // Established TCP over IPv6, which has no cache, would pay for each packet.
    if follows_flow
        && (scratch.place.kind == Place::NO_FLOW
            || (packet.version == 4 || packet.protocol == protocol::UDP)
                && !flow_filter::may_know(&packet.source, &packet.destination, packet.protocol))
    {
        found = NO_FLOW;
    } else if follows_flow && let Some(flow) = established(&packet.key) {
        found = FLOW_OF_PORTS;
        // SAFETY: a valid element; the fields that racing CPUs write are single words.
        let flow = unsafe { &mut *flow };
        let from_initiator = flow.initiator == packet.end_of_source;
        let from_lan = from_initiator == (flow.direction != direction::OUTBOUND);
        if from_lan == (hook == Hook::EXTERNAL_INGRESS)
            && (from_lan || is_of_interface(skb, packet, flow))
            // The peer of such a flow may be this node, in whose name no packet comes from the LAN.
            && (!from_lan
                || flow.flags & flag::UNRESTRICTED == 0
                || scope::find(skb, active.slot, hook, mark::NONE) != scope::SPOOFED)
            && track::is_usable(flow, active.settings, active.now)
            && track::established(flow, packet, active.settings, from_initiator, active.now)
                == TrackVerdict::Pass
        {
            // SAFETY: the context is valid while the program runs.
            let ifindex = unsafe { (*skb).ifindex };
            if !from_lan && flow.interface != ifindex {
                flow.interface = ifindex;
            }
            fragments::remember(packet, active.now);
            // SAFETY: the context is valid while the program runs.
            let length = unsafe { (*skb).len };
            if flow.flags & (flag::TRANSLATED | flag::UNRESTRICTED) != 0 {
                return pass_translated(skb, flow, hook, active.slot);
            }
            if flow.flags & flag::AUDIT != 0 {
                report::count_audited(flow.direction, Reason::established, length);
            } else {
                report::count(flow.direction, Reason::established, length);
            }
            let action = match fast_path::control(active.now) {
                Some(_) => fast_path::forward(skb, flow, from_lan.into(), active.now),
                None => {
                    scratch.route.kind = Route::STACK;
                    mark::put(skb, mark::of_judged(flow.direction));
                    NEXT
                }
            };
            cache::remember(flow, active.now);
            return action;
        }
    }
    // A class that the policy is known to deny needs no second judgement, unless the packet may belong to a flow.
    if hook == Hook::EXTERNAL_INGRESS
        && packet.is_intact()
        // A later fragment holds no ports: it is of no class.
        && packet.kind == Kind::Plain
        && (opens_tcp || packet.protocol == protocol::UDP && found != FLOW_OF_PORTS)
    {
        let action = refusals::repeat(skb, active.slot, active.now, found);
        if action != refusals::MISS {
            return action;
        }
    }
    // Called here rather than in `decide`: with that frame, too, the stack would exceed 512 bytes on Linux 6.1, which rounds
    // each frame up to 32 bytes.
    if packet.kind == Kind::Error && packet.is_intact() && quotes_flow(skb, active.slot, active.now) != 0 {
        found = FLOW_OF_QUOTE;
    }
    let scope = scope::find(skb, active.slot, hook, mark::NONE);
    judge_unknown(skb, active.slot, hook, active.now, found | scope << 8)
}

/// Whether a marked packet comes from a port of the bridge that it is at: it got its mark there.
#[inline(always)]
fn was_seen_at_port(skb: *mut __sk_buff) -> bool {
    // SAFETY: the context is valid while the program runs.
    let ifindex = unsafe { (*skb).ifindex };
    // SAFETY: only read.
    unsafe { INTERFACES.get(&ifindex) }.is_some_and(|interface| interface.role == role::BRIDGE)
}

/// Whether a packet from a pod's interface may belong to a flow: it came by the interface of the flow, or its source leads
/// to the interface that it came by.
#[inline(always)]
fn is_of_interface(skb: *mut __sk_buff, packet: &Packet, flow: &Flow) -> bool {
    // SAFETY: the context is valid while the program runs.
    flow.interface == unsafe { (*skb).ifindex } || scope::leads_here(skb, packet)
}

/// Passes a packet of an established flow that the node translates, or that no rule restricts. Returns the TC action.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn pass_translated(skb: *mut __sk_buff, flow: *const Flow, hook: u32, slot: u32) -> i32 {
    // SAFETY: a valid element, or null as far as the verifier knows.
    let Some(flow) = (unsafe { flow.as_ref() }) else { return NEXT };
    // SAFETY: the context is valid while the program runs.
    let length = unsafe { (*skb).len };
    if flow.flags & flag::UNRESTRICTED == 0 {
        if flow.flags & flag::AUDIT != 0 {
            report::count_audited(flow.direction, Reason::established, length);
        } else {
            report::count(flow.direction, Reason::established, length);
        }
    }
    let mark = if hook == Hook::EXTERNAL_INGRESS {
        // The pod's view of the flow is still to be followed.
        if flow.flags & flag::TRANSLATED != 0 { mark::FOREIGN } else { mark::JUDGED }
    } else if flow.flags & flag::UNRESTRICTED != 0 {
        // Translation may yet lead it to a LAN host.
        scope::find(skb, slot, hook, mark::NONE);
        let Some(Scratch { sides, .. }) = scratch() else { return NEXT };
        sides.mark
    } else {
        mark::ADMITTED
    };
    mark::put(skb, mark);
    NEXT
}

/// Judges a packet at an egress hook, where its addresses are final.
#[inline(always)]
pub(crate) fn egress(skb: *mut __sk_buff, hook: u32) -> i32 {
    let mark = mark::read(skb);
    if mark == mark::JUDGED {
        return NEXT;
    }
    // For further egress hooks: those of the interfaces below a VLAN or a bridge.
    mark::put(skb, mark::JUDGED);
    let Some(scratch) = scratch() else { return NEXT };
    let packet = &mut scratch.packet;
    if !parse::parse(skb, packet) {
        return NEXT;
    }
    let Some(active) = Active::get() else { return NEXT };
    let mut found = follow_out(skb, active.slot, hook | mark << 8, active.now);
    // SAFETY: the context is valid while the program runs.
    let is_own = unsafe { (*skb).ingress_ifindex } == 0;
    if found == FOLLOWED || is_own || mark == mark::LEARN {
        return NEXT;
    }
    if packet.kind == Kind::Error && packet.is_intact() && quotes_flow(skb, active.slot, active.now) != 0 {
        found = FLOW_OF_QUOTE;
    }
    let scope = scope::find(skb, active.slot, hook, mark);
    if found == FLOW_OF_QUOTE && scope != scope::SPOOFED {
        return NEXT;
    }
    judge_unknown(skb, active.slot, hook, active.now, found | scope << 8)
}

/// Follows the packet of [`scratch`] at an egress hook. `hook` is a number of [`Hook`], with the packet's mark above its lowest
/// byte. Returns [`FOLLOWED`]: it belongs to a flow; else [`FLOW_OF_PORTS`] or 0.
///
/// A subprogram, as [`judge_unknown`], also for its stack: that of `egress` has room for the answer to a denied packet.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn follow_out(skb: *mut __sk_buff, slot: u32, hook: u32, now: u64) -> u32 {
    let Some(Scratch { packet, .. }) = scratch() else { return 0 };
    let Some(active) = Active::of_slot(slot, now) else { return 0 };
    let (hook, mark) = (hook & 0xff, hook >> 8);
    // SAFETY: the context is valid while the program runs.
    let (input, output) = unsafe { ((*skb).ingress_ifindex, (*skb).ifindex) };
    let to_pod = hook == Hook::INTERNAL_EGRESS;
    let mut found = 0;
    if packet.follows_flow() {
        if let Some(flow) = established(&packet.key) {
            // SAFETY: as for established flows in `ingress`.
            let flow = unsafe { &mut *flow };
            found = FLOW_OF_PORTS;
            let from_initiator = flow.initiator == packet.end_of_source;
            let from_lan = from_initiator == (flow.direction != direction::OUTBOUND);
            if from_lan == to_pod && track::is_usable(flow, active.settings, now) {
                if mark == mark::LEARN {
                    // Only its path matters: the packet was judged, and followed.
                    fast_path::learn(skb, flow, from_lan.into(), now);
                    return FOLLOWED;
                }
                if follows(hook, input, active.settings, packet)
                    && track::established(flow, packet, active.settings, from_initiator, now)
                        == TrackVerdict::Pass
                {
                    fragments::remember(packet, now);
                    fast_path::learn(skb, flow, from_lan.into(), now);
                    return FOLLOWED;
                }
            }
        }
        if let Some(flow) = HALF_OPEN.get_ptr_mut(&packet.key) {
            // SAFETY: as for established flows in `ingress`.
            let flow = unsafe { &mut *flow };
            let from_initiator = flow.initiator == packet.end_of_source;
            if track::is_usable(flow, active.settings, now)
                && follows(hook, input, active.settings, packet)
                && track::half_open(flow, packet, from_initiator, now) != TrackVerdict::Judge
            {
                fragments::remember(packet, now);
                return FOLLOWED;
            }
        }
    }
    if to_pod && mark == mark::ADMITTED && input != 0 {
        track::adopt(packet, active.settings, now, output);
        return FOLLOWED;
    }
    found
}

/// Whether a packet at an egress hook is followed there: all but those that the node itself sends to the LAN, unless from a
/// NodePort.
#[inline(always)]
fn follows(
    hook: u32,
    input: u32,
    settings: &bridge_common::filter::control::Settings,
    packet: &Packet,
) -> bool {
    hook == Hook::INTERNAL_EGRESS || input != 0 || scope::is_node_port(settings, packet, packet.source_port)
}

/// The flow table may have an entry for the packet's ports, but the packet does not belong to it.
const FLOW_OF_PORTS: u32 = 1;
/// Type of ICMP redirects (RFC 792).
const ICMP_REDIRECT: u8 = 5;
/// The packet is an ICMP error about a known flow: see [`quotes_flow`].
const FLOW_OF_QUOTE: u32 = 2;
/// The packet belongs to a flow, and nothing more is to be decided.
const FOLLOWED: u32 = 3;

/// Judges a packet that belongs to no established flow; `found` is [`FLOW_OF_PORTS`], [`FLOW_OF_QUOTE`], [`NO_FLOW`] or 0, with the
/// result of [`scope::find`] above its lowest byte.
///
/// This and the other functions with C linkage are subprograms: the verifier checks each once, for any arguments. Inlined,
/// the paths through one would multiply with the paths through the next.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn judge_unknown(skb: *mut __sk_buff, slot: u32, hook: u32, now: u64, found: u32) -> i32 {
    let Some(Scratch { packet, sides, .. }) = scratch() else { return NEXT };
    let Some(active) = Active::of_slot(slot, now) else { return NEXT };
    let (found, scope) = (found & 0xff, found >> 8);
    // SAFETY: the context is valid while the program runs.
    let length = unsafe { (*skb).len };
    let passed = mark::of_judged(sides.direction as u8);
    let verdict = match scope {
        scope::JUDGE => decide(skb, hook, found, &active, sides, packet, length),
        scope::SPOOFED => Verdict::of(Reason::spoofed),
        scope::UNATTRIBUTED => Verdict::of(Reason::unattributed),
        scope => {
            if scope == scope::FOLLOW {
                follow(found, &active, sides, packet);
                fragments::remember(packet, active.now);
            }
            if hook <= Hook::INTERNAL_INGRESS {
                mark::put(skb, sides.mark);
            }
            return NEXT;
        }
    };
    if verdict.mark == mark::NONE {
        mark::put(skb, passed);
    } else {
        mark::put(skb, verdict.mark);
    }
    let action = verdict::conclude(skb, &active, sides, packet, &verdict, length, hook);
    if action == NEXT {
        fragments::remember(packet, active.now);
    }
    action
}

/// Follows a packet of a pod that no rule restricts, so that the answers pass.
#[inline(always)]
fn follow(found: u32, active: &Active, sides: &mut Sides, packet: &Packet) {
    if found == FLOW_OF_QUOTE {
        sides.mark = mark::ADMITTED;
    }
    if !packet.follows_flow() {
        return;
    }
    if let Some(flow) = HALF_OPEN.get_ptr_mut(&packet.key) {
        // SAFETY: as for established flows in `ingress`.
        let flow = unsafe { &mut *flow };
        if track::is_usable(flow, active.settings, active.now) {
            let from_initiator = flow.initiator == packet.end_of_source;
            let verdict = track::half_open(flow, packet, from_initiator, active.now);
            if verdict != TrackVerdict::Judge {
                if !from_initiator {
                    // An answer of the pod in a flow that was let in.
                    sides.mark = mark::ADMITTED;
                }
                return;
            }
        }
    }
    let admission = Admission {
        direction: direction::OUTBOUND,
        generation: active.settings.generation,
        rule: u32::MAX,
        flags: sides.flags as u8,
        interface: sides.interface,
    };
    let _ = track::open(packet, &admission, active.settings, active.now, found == FLOW_OF_PORTS);
}

#[inline(always)]
fn decide(
    skb: *mut __sk_buff,
    hook: u32,
    found: u32,
    active: &Active,
    sides: &mut Sides,
    packet: &Packet,
    length: u32,
) -> Verdict {
    if !packet.is_intact() {
        return Verdict::of(packet.problem);
    }
    match packet.kind {
        Kind::LaterFragment => {
            let known = fragments::are_known(packet, active.now);
            return Verdict::of(if known { Reason::later_fragment } else { Reason::fragment_unknown });
        }
        Kind::Error => {
            let related = found == FLOW_OF_QUOTE;
            return Verdict::of(if related { Reason::related } else { Reason::icmp_unrelated });
        }
        _ => {}
    }
    // A SYN is judged by policy, whatever came before it.
    if !(packet.protocol == protocol::TCP && packet.opens_tcp())
        && hook <= Hook::INTERNAL_INGRESS
        && found != NO_FLOW
        && let Some(flow) = HALF_OPEN.get_ptr_mut(&packet.key)
    {
        // SAFETY: as for established flows in `ingress`.
        let flow = unsafe { &mut *flow };
        let from_initiator = flow.initiator == packet.end_of_source;
        if track::is_usable(flow, active.settings, active.now) {
            let flags = flow.flags;
            let direction = flow.direction;
            match track::half_open(flow, packet, from_initiator, active.now) {
                TrackVerdict::Pass => {
                    // As of every packet of the flow: a reply is no packet of the other direction.
                    sides.direction = u32::from(direction);
                    let mark = if flags & flag::TRANSLATED == 0 {
                        mark::of_judged(direction)
                    } else if hook == Hook::EXTERNAL_INGRESS {
                        mark::FOREIGN
                    } else {
                        mark::ADMITTED
                    };
                    return Verdict {
                        mark,
                        audited: flags & flag::AUDIT != 0,
                        silent: flags & flag::UNRESTRICTED != 0,
                        ..Verdict::of(Reason::established)
                    };
                }
                TrackVerdict::Deny(reason) => return Verdict::of(reason),
                TrackVerdict::Judge => {}
            }
        }
    }
    if let Err(reason) = track::opening(packet) {
        return Verdict::of(reason);
    }
    // `networks.external` names the LAN hosts that rules can allow.
    let leaf = if sides.external.side == side::EXTERNAL {
        policy::evaluate(active.slot, policy::ENFORCED)
    } else {
        0
    };
    if active.settings.has_audited != 0 && sides.external.side == side::EXTERNAL {
        policy::audit(skb, active.slot, leaf, active.now);
    }
    if leaf == 0 {
        return Verdict::of(Reason::no_rule);
    }
    policy::count_hit(active.slot, active.settings, leaf, length);
    if leaf & reference::DENY != 0 {
        return Verdict { leaf, ..Verdict::of(Reason::deny_rule) };
    }
    let admission = Admission {
        direction: sides.direction as u8,
        generation: active.settings.generation,
        rule: (leaf & reference::RULE) - 1,
        flags: sides.flags as u8,
        interface: sides.interface,
    };
    match track::open(packet, &admission, active.settings, active.now, found == FLOW_OF_PORTS) {
        Ok(()) => Verdict { leaf, ..Verdict::of(Reason::new_flow) },
        Err(reason) => Verdict::of(reason),
    }
}

/// Returns 1 if an ICMP error quotes a packet that its addressee sent in a known flow, else 0.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn quotes_flow(skb: *mut __sk_buff, slot: u32, now: u64) -> u32 {
    let Some(Scratch { packet: error, quoted, .. }) = scratch() else { return 0 };
    let Some(active) = Active::of_slot(slot, now) else { return 0 };
    let settings = active.settings;
    // A redirect changes routes, and is never an answer to a packet.
    let redirects = error.version == 4 && error.detail == ICMP_REDIRECT;
    if redirects || !parse::parse_quoted(skb, error, quoted) || quoted.source != error.destination {
        return 0;
    }
    // SAFETY: valid elements, only read.
    let is_usable = |flow: *const Flow| track::is_usable(unsafe { &*flow }, settings, now);
    let known = established(&quoted.key).is_some_and(|flow| is_usable(flow.cast_const()))
        || HALF_OPEN.get_ptr(&quoted.key).is_some_and(is_usable);
    u32::from(known)
}
