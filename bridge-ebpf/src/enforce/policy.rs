//! Judges the first packet of a flow by the compiled policy; see `bridge_common::filter::policy`.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::bpf_get_smp_processor_id;
use bridge_common::filter::{
    control::Settings,
    counters::Reason,
    event::verdict,
    policy::{INTERVALS, PairKey, PortIntervals, class, direction, reference},
};

use bridge_ebpf::protocol;

use crate::{
    active::Active,
    maps::{NARROWS, PAGES, PAIRS, RULE_HITS, RULE_SETS, SETTINGS, Scratch, scratch},
    packet::Packet,
    report::{self, EventInfo},
    sides::SETTLED,
};

/// The rules that decide.
pub(crate) const ENFORCED: u32 = 0;
/// The rules in audit mode.
const AUDITED: u32 = 1;

/// Returns the leaf that decides about the packet of [`scratch`]: 0 if no rule matches. `rules` is [`ENFORCED`] or
/// [`AUDITED`].
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn evaluate(slot: u32, rules: u32) -> u32 {
    let Some(Scratch { packet, sides, .. }) = scratch() else { return 0 };
    let Some(settings) = SETTINGS.get(slot) else { return 0 };
    let ports = Ports {
        destination: u16::from_be_bytes(packet.destination_port),
        source: u16::from_be_bytes(packet.source_port),
    };
    if sides.direction == u32::from(direction::NODE_PORT) {
        // No rule is about these.
        if rules != ENFORCED {
            return 0;
        }
        return resolve(slot, settings.node_port_root, &ports, &mut sides.flags);
    }
    let class = class_of(packet);
    let audited = rules != ENFORCED;
    let outbound = sides.direction == u32::from(direction::OUTBOUND);
    let of_direction = |sets: &[u32; 2]| if outbound { sets[1] } else { sets[0] };

    let flags = &mut sides.flags;
    let mut of_set = |set: u32| evaluate_set(slot, set, class, audited, &ports, flags);
    let mut best = of_set(of_direction(&settings.global_sets));
    best = stronger(best, of_set(of_direction(&sides.external.sets)));
    best = stronger(best, of_set(of_direction(&sides.internal.sets)));
    let pair = PairKey { external: sides.external.class, pod: sides.internal.class };
    if settings.pair_count != 0
        && let Some(pairs) = PAIRS.get(slot)
    {
        // SAFETY: the tables of a slot are not written to while the slot is active.
        if let Some(sets) = unsafe { pairs.get(&pair) } {
            best = stronger(best, of_set(of_direction(&sets.sets)));
        }
    }
    best
}

struct Ports {
    destination: u16,
    source: u16,
}

/// Index into `RuleSet::roots`. An ICMP of the wrong IP version has been read as a packet without ports.
#[inline(always)]
fn class_of(packet: &Packet) -> usize {
    match (packet.protocol, packet.version) {
        (protocol::TCP, _) => class::TCP,
        (protocol::UDP, _) => class::UDP,
        (protocol::SCTP, _) => class::SCTP,
        (protocol::ICMP, 4) | (protocol::ICMPV6, 6) => class::ICMP,
        _ => class::OTHER,
    }
}

/// The leaf that wins: a deny, else the one of the rule with the smaller index.
#[inline(always)]
fn stronger(a: u32, b: u32) -> u32 {
    // With the bit of a deny inverted the smaller number wins, and "no rule" less one is the greatest.
    let rank = |leaf: u32| if leaf == 0 { u32::MAX } else { leaf ^ reference::DENY };
    if rank(b) < rank(a) { b } else { a }
}

/// Returns the leaf of one set.
#[inline(always)]
fn evaluate_set(slot: u32, set: u32, class: usize, audited: bool, ports: &Ports, flags: &mut u32) -> u32 {
    if set == 0 {
        return 0;
    }
    let Some(rule_set) = RULE_SETS.get_value(slot, &set) else { return 0 };
    let roots = if audited { &rule_set.audited } else { &rule_set.roots };
    let Some(root) = roots.get(class) else { return 0 };
    resolve(slot, *root, ports, flags)
}

/// Follows a reference by destination port, then by source port: then others of its class may be judged otherwise, and
/// nothing is settled.
#[inline(always)]
fn resolve(slot: u32, root: u32, ports: &Ports, flags: &mut u32) -> u32 {
    if reference::tag(root) == reference::LEAF {
        return root;
    }
    let by_destination = by_port(slot, root, u32::from(ports.destination));
    if reference::tag(by_destination) == reference::LEAF {
        return by_destination;
    }
    *flags &= !SETTLED;
    by_port(slot, by_destination, u32::from(ports.source))
}

/// Looks a port up. A reference that cannot be followed is no rule: default deny.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn by_port(slot: u32, from: u32, port: u32) -> u32 {
    let index = from & reference::VALUE;
    match reference::tag(from) {
        reference::INTERVALS => {
            NARROWS.get_value(slot, &index).map_or(0, |intervals| in_intervals(intervals, port))
        }
        reference::DIRECTORY => {
            let Some(directory) = PAGES.get_value(slot, &index) else { return 0 };
            let entry = directory.references[(port >> 8 & 0xff) as usize];
            if reference::tag(entry) != reference::PAGE {
                return entry;
            }
            let Some(page) = PAGES.get_value(slot, &(entry & reference::VALUE)) else { return 0 };
            page.references[(port & 0xff) as usize]
        }
        _ => 0,
    }
}

/// Compares with every interval: their number is fixed and small.
#[inline(always)]
fn in_intervals(intervals: &PortIntervals, port: u32) -> u32 {
    let mut found = intervals.references[0];
    for i in 1..INTERVALS {
        if u32::from(intervals.first[i]) <= port {
            found = intervals.references[i];
        }
    }
    found
}

/// Counts a hit of the rule in audit mode that would decide about the packet of [`scratch`], and reports it if the verdict
/// would be another one: `enforced` is the leaf that decides.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn audit(skb: *mut __sk_buff, slot: u32, enforced: u32, now: u64) -> u32 {
    let leaf = evaluate(slot, AUDITED);
    let Some(settings) = SETTINGS.get(slot) else { return 0 };
    let Some(Scratch { sides, .. }) = scratch() else { return 0 };
    if leaf == 0 {
        return 0;
    }
    // SAFETY: the context is valid while the program runs.
    count_hit(slot, settings, leaf, unsafe { (*skb).len });
    let denies = leaf & reference::DENY != 0;
    let is_allowed = enforced != 0 && enforced & reference::DENY == 0;
    // A deny wins, so that neither opens a flow that another rule denies.
    let (verdict, reason) = match (denies, is_allowed) {
        (true, true) => (verdict::AUDIT, Reason::deny_rule),
        (false, false) if enforced == 0 => (verdict::AUDIT_ALLOW, Reason::new_flow),
        _ => return 0,
    };
    let info = EventInfo {
        now,
        rule: leaf & reference::RULE,
        verdict,
        reason: reason as u8,
        direction: sides.direction as u8,
        settled: 0,
    };
    let Some(active) = Active::of_slot(slot, now) else { return 0 };
    report::emit(skb, &active, &info);
    1
}

/// Counts a hit of the rule in `leaf`.
#[inline(always)]
pub(crate) fn count_hit(slot: u32, settings: &Settings, leaf: u32, length: u32) {
    let rule = (leaf & reference::RULE) - 1;
    // SAFETY: no precondition.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    let index = cpu * settings.rule_count + rule;
    if let Some(hits) = RULE_HITS.get_value_ptr_mut(slot, &index) {
        // SAFETY: a valid element; this CPU alone writes to it while it runs the program.
        unsafe {
            (*hits).packets += 1;
            (*hits).bytes += u64::from(length);
        }
    }
}
