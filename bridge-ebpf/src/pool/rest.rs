//! Ports that rest: the kernel would refuse a connection from them.
//!
//! A connection that this end closes first stays in TIME_WAIT for a minute. With TCP timestamps the kernel uses its tuple
//! again at once (`tcp_twsk_unique`, net/ipv4/tcp_ipv4.c); without them `__inet_check_established` refuses it, after the
//! hook has bound the port. So such a port is given to nobody until the minute is over.

use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use bridge_common::pool::{
    Rest, RestingPort, counter,
    slots::{self, Seat, Tables as _},
};

use crate::{
    maps::{POOL_RESTING, count},
    tables::Maps,
};

const BPF_NOEXIST: u64 = 1;
/// Ports that [`pool_wake`] checks.
const CHECKED: u32 = 128;

/// Has a claimed port rest for `duration` nanoseconds; its claim goes on meanwhile. `false`: there is no memory for it.
#[inline(always)]
pub(crate) fn rest(seat: Seat, index: u32, duration: u64) -> bool {
    let port = RestingPort { slot: seat.slot, index };
    // SAFETY: the helper takes no argument.
    let until_ns = unsafe { bpf_ktime_get_ns() } + duration;
    let rest = Rest { until_ns, owner_slot: seat.owner_slot, reserved: 0 };
    if POOL_RESTING.insert(port, rest, BPF_NOEXIST).is_err() {
        return false;
    }
    count(counter::RESTS);
    true
}

/// Releases ports of a destination whose rest is over: those among [`CHECKED`] ports from a random one on. The agent does
/// that four times a second; this is for a pool without an agent, and for the last port. Returns whether any port rests still.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn pool_wake(words: u32, slot: u32) -> u32 {
    let tables = Maps { words };
    let ports = words * 64;
    if ports == 0 {
        return 0;
    }
    let mut index = tables.random() % ports;
    let mut resting = 0;
    let mut checked = 0;
    while checked < CHECKED {
        if checked >= ports {
            break;
        }
        resting |= wake_port(words, slot, index);
        index += 1;
        if index >= ports {
            index = 0;
        }
        checked += 1;
    }
    resting
}

/// Releases one port if its rest is over. Returns 1 if it still rests.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn wake_port(words: u32, slot: u32, index: u32) -> u32 {
    let port = RestingPort { slot, index };
    // SAFETY: the value is written once, at insertion, and copied before anything is removed.
    let Some(rest) = unsafe { POOL_RESTING.get(port) }.copied() else { return 0 };
    // SAFETY: the helper takes no argument.
    if rest.until_ns > unsafe { bpf_ktime_get_ns() } {
        return 1;
    }
    if POOL_RESTING.remove(port).is_ok() {
        slots::release(&Maps { words }, Seat { slot, owner_slot: rest.owner_slot }, index);
    }
    0
}
