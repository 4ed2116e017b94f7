//! Ports that rest: the kernel would refuse a connection from them.
//!
//! A connection that this end closes first stays in TIME_WAIT for a minute. With TCP timestamps the kernel uses its tuple
//! again at once (`tcp_twsk_unique`, net/ipv4/tcp_ipv4.c); without them `__inet_check_established` refuses it, after the
//! hook has bound the port. So no socket gets such a port until the minute is over.

use aya_ebpf::helpers::generated::{bpf_get_prandom_u32, bpf_ktime_get_ns, bpf_loop};
use bridge_common::pool::{
    Rest, RestingPort, counter,
    slots::{self, Seat},
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
    let rest = Rest { until_ns, owner_slot: seat.owner_slot, padding: 0 };
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
    let ports = words * 64;
    // SAFETY: the helper takes no argument.
    let start = unsafe { bpf_get_prandom_u32() } % ports.max(1);
    let mut wake = Wake { words, slot, start, resting: 0 };
    let turn = wake_turn as *const ();
    // SAFETY: a callback with the arguments that the helper gives it, and memory that outlives the call.
    unsafe { bpf_loop(ports.min(CHECKED), turn.cast_mut().cast(), (&raw mut wake).cast(), 0) };
    // SAFETY: initialised above; volatile, since the callback wrote it.
    unsafe { (&raw const wake.resting).read_volatile() }
}

/// A walk over ports of a destination.
#[repr(C)]
struct Wake {
    words: u32,
    slot: u32,
    start: u32,
    /// 1 if a port rests still.
    resting: u32,
}

#[inline(never)]
extern "C" fn wake_turn(turn: u64, wake: *mut Wake) -> i64 {
    // SAFETY: the memory that `pool_wake` gave to `bpf_loop`.
    let wake = unsafe { &mut *wake };
    let index = (wake.start + turn as u32) % (wake.words * 64).max(1);
    if wake_port(wake.words, wake.slot, index) != 0 {
        wake.resting = 1;
    }
    0
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
