//! Judges the first packet of a flow by the compiled policy; see `bridge_common::filter::policy`.

use aya_ebpf::helpers::bpf_get_smp_processor_id;
use bridge_common::filter::{
    control::Settings,
    policy::{NARROW_WIDTH, Narrow, PairKey, direction, protocol, reference},
};

use crate::{
    maps::{NARROWS, PAGES, PAIRS, RULE_HITS, RULE_SETS, SETTINGS, Scratch, scratch},
    packet::{self, Packet},
};

/// The leaf that decides about the packet and scope of [`scratch`]: 0 where no rule matches.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn evaluate(slot: u32) -> u32 {
    let Some(Scratch { packet, scope, .. }) = scratch() else { return 0 };
    let Some(settings) = SETTINGS.get(slot) else { return 0 };
    let ports = Ports {
        destination: u16::from_be_bytes(packet.destination_port),
        source: u16::from_be_bytes(packet.source_port),
    };
    if scope.direction == u32::from(direction::NODE_PORT) {
        return resolve(slot, settings.node_port_root, &ports);
    }
    let by_protocol = protocol_index(packet);
    let outbound = scope.direction == u32::from(direction::OUTBOUND);
    let of_direction = |sets: &[u32; 2]| if outbound { sets[1] } else { sets[0] };

    let mut best = evaluate_set(slot, of_direction(&settings.global_sets), by_protocol, &ports);
    best = stronger(best, evaluate_set(slot, of_direction(&scope.external.sets), by_protocol, &ports));
    best = stronger(best, evaluate_set(slot, of_direction(&scope.internal.sets), by_protocol, &ports));
    let pair = PairKey { external: scope.external.class, pod: scope.internal.class };
    if let Some(pairs) = PAIRS.get(slot) {
        // SAFETY: the tables of a slot are not written to while the slot is in force.
        if let Some(sets) = unsafe { pairs.get(&pair) } {
            best = stronger(best, evaluate_set(slot, of_direction(&sets.sets), by_protocol, &ports));
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
fn protocol_index(packet: &Packet) -> usize {
    match (packet.protocol, packet.version) {
        (packet::protocol::TCP, _) => protocol::TCP,
        (packet::protocol::UDP, _) => protocol::UDP,
        (packet::protocol::SCTP, _) => protocol::SCTP,
        (packet::protocol::ICMP, 4) | (packet::protocol::ICMPV6, 6) => protocol::ICMP,
        _ => protocol::OTHER,
    }
}

/// The leaf that wins: a deny, else the one of the rule with the smaller index.
#[inline(always)]
fn stronger(a: u32, b: u32) -> u32 {
    // With the bit of a deny inverted the smaller number wins, and "no rule" less one is the greatest.
    let rank = |leaf: u32| if leaf == 0 { u32::MAX } else { leaf ^ reference::DENY };
    if rank(b) < rank(a) { b } else { a }
}

/// The leaf of one set.
#[inline(always)]
fn evaluate_set(slot: u32, set: u32, by_protocol: usize, ports: &Ports) -> u32 {
    if set == 0 {
        return 0;
    }
    let Some(rule_set) = RULE_SETS.get_value(slot, &set) else { return 0 };
    let Some(root) = rule_set.roots.get(by_protocol) else { return 0 };
    resolve(slot, *root, ports)
}

/// Follows a reference by destination port, then by source port.
#[inline(always)]
fn resolve(slot: u32, root: u32, ports: &Ports) -> u32 {
    if reference::tag(root) == reference::LEAF {
        return root;
    }
    let by_destination = by_port(slot, root, u32::from(ports.destination));
    if reference::tag(by_destination) == reference::LEAF {
        return by_destination;
    }
    by_port(slot, by_destination, u32::from(ports.source))
}

/// One port lookup. What cannot be followed is no rule: default deny.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn by_port(slot: u32, from: u32, port: u32) -> u32 {
    let index = from & reference::VALUE;
    match reference::tag(from) {
        reference::NARROW => NARROWS.get_value(slot, &index).map_or(0, |narrow| in_narrow(narrow, port)),
        reference::WIDE => {
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

/// Goes over all intervals, whatever the port: the number is fixed and small.
#[inline(always)]
fn in_narrow(narrow: &Narrow, port: u32) -> u32 {
    let mut found = narrow.references[0];
    for i in 1..NARROW_WIDTH {
        if u32::from(narrow.first[i]) <= port {
            found = narrow.references[i];
        }
    }
    found
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
