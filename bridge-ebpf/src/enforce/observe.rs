//! Follows packets where they leave the node: replies to masqueraded flows, NodePort flows, and the paths of flows.

use aya_ebpf::bindings::__sk_buff;
use bridge_common::filter::{flow::Flow, policy::direction};

use crate::{
    active::Active,
    fast_path,
    maps::{FLOWS, HALF_OPEN, Scratch, scratch},
    mark,
    packet::Packet,
    parse, scope,
    track::{self, TrackVerdict},
};

/// Follows a packet towards a pod: replies that came in addressed to the node (masqueraded flows), and packets that came
/// in on a NodePort.
#[inline(always)]
pub(crate) fn to_pod(skb: *mut __sk_buff) {
    if mark::take_off(skb) {
        return;
    }
    let Some(Scratch { packet, sides, .. }) = scratch() else { return };
    if !parse::parse(skb, packet) || !packet.follows_flow() {
        return;
    }
    let Some(active) = Active::get() else { return };
    if observe(skb, &active, packet, true) {
        return;
    }
    if scope::find(active.slot, active.settings, packet, false, sides)
        && sides.direction == u32::from(direction::INBOUND)
    {
        track::adopt_node_port(packet, active.settings, active.now);
    }
}

/// Follows a packet towards the LAN: replies from NodePorts, and the paths of pods' flows.
#[inline(always)]
pub(crate) fn to_lan(skb: *mut __sk_buff) {
    if mark::take_off(skb) {
        return;
    }
    let Some(Scratch { packet, .. }) = scratch() else { return };
    if !parse::parse(skb, packet) || !packet.follows_flow() {
        return;
    }
    let Some(active) = Active::get() else { return };
    // SAFETY: the context is valid while the program runs.
    let forwarded = unsafe { (*skb).ingress_ifindex } != 0;
    if scope::is_node_port(active.settings, packet, packet.source_port) {
        observe(skb, &active, packet, false);
    } else if forwarded && let Some(flow) = FLOWS.get_ptr_mut(&packet.key) {
        // Only its path matters: the packet was judged, and our answer to a denied packet, which looks like one of the
        // flow, must not end it.
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

/// Updates the flow of a packet that leaves the node. Returns `false` if there is none.
#[inline(always)]
fn observe(skb: *mut __sk_buff, active: &Active, packet: &Packet, to_pod: bool) -> bool {
    if let Some(flow) = FLOWS.get_ptr_mut(&packet.key) {
        // SAFETY: as for established flows in `judge`.
        let flow = unsafe { &mut *flow };
        if track::is_usable(flow, active.settings, active.now) {
            let from_initiator = flow.initiator == packet.end_of_source;
            if track::established(flow, packet, from_initiator, active.now) == TrackVerdict::Pass {
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
