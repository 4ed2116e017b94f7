//! Later fragments: they hold no ports, so they pass where a first fragment was let through.

use bridge_common::filter::flow::FragmentKey;

use crate::{
    maps::{FRAGMENTS, Scratch, scratch},
    packet::Packet,
};

/// As long as a host waits for the rest of a datagram (RFC 1122, 3.3.2: at least 60 seconds; Linux: 30).
const LIFETIME: u64 = 60_000_000_000;

#[inline(always)]
fn fill(key: &mut FragmentKey, packet: &Packet) {
    key.source.set(&packet.source);
    key.destination.set(&packet.destination);
}

/// Notes that a packet was let through, if it is a first fragment.
#[inline(always)]
pub(crate) fn remember(packet: &Packet, now: u64) {
    if packet.first_fragment == 0 || !packet.is_intact() {
        return;
    }
    let Some(Scratch { fragment, .. }) = scratch() else { return };
    fill(fragment, packet);
    let _ = FRAGMENTS.insert(fragment, &now, 0);
}

/// Whether a first fragment between these hosts was let through lately.
#[inline(always)]
pub(crate) fn are_known(packet: &Packet, now: u64) -> bool {
    let Some(Scratch { fragment, .. }) = scratch() else { return false };
    fill(fragment, packet);
    // SAFETY: only copied.
    unsafe { FRAGMENTS.get(fragment) }.is_some_and(|seen| now.saturating_sub(*seen) < LIFETIME)
}
