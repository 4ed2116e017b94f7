//! Ports that rest: the kernel would refuse a connection from them.
//!
//! A connection that this end closes first stays in TIME_WAIT for a minute, and up to a minute before that in FIN_WAIT2 if
//! the peer closes late. With TCP timestamps the kernel uses its tuple again at once (`tcp_twsk_unique`,
//! net/ipv4/tcp_ipv4.c); without them `__inet_check_established` refuses it, after the hook has bound the port. So no socket
//! gets such a port until the longest possible time is over; but before a connect is refused for want of a port, the kernel is
//! asked which of the namespace's ports it has released: an RST, a full table or a short `tcp_fin_timeout` ends this early.

use aya_ebpf::{
    bindings::{bpf_sock, bpf_sock_addr},
    helpers::generated::{
        bpf_get_prandom_u32, bpf_ktime_get_ns, bpf_loop, bpf_sk_release, bpf_skc_lookup_tcp,
    },
};
use bridge_common::pool::{
    Geometry, Lease, MAX_RESTS, Rest, RestingPort, bitmap::Memory as _, counter, shares, slots::Seat,
};

use crate::{
    maps::{POOL_RESTING, count},
    sock::{CURRENT_NETNS, TUPLE_V4, TUPLE_V6, Tuple},
    tables::{Maps, pool_extend_share, pool_put_back, pool_reduce_share, pool_share},
};

const BPF_NOEXIST: u64 = 1;
const TCP_LISTEN: u32 = 10;
/// Ports that one search releases at most.
const RELEASED: u32 = 32;
/// Pause, in nanoseconds, after a search that released no port: it may look at all ports of the pool.
const PAUSE_NS: u64 = 10_000_000;
/// How long, in nanoseconds, a port is avoided that the kernel refused before there was a connection.
const AVOIDED_NS: u64 = 60_000_000_000;
/// How many such ports a namespace avoids at a destination: where no route leads, the kernel refuses all.
const AVOIDED: u64 = 16;
/// A peer that has not got the last ACK repeats its FIN, and TIME_WAIT begins again: added to its longest time.
const REPEATED_FIN_NS: u64 = 10_000_000_000;

/// Has the port of a connection in TIME_WAIT rest; its claim goes on meanwhile. `time_wait` is how long, in nanoseconds, the
/// kernel may keep a tuple in one of the two states. `false`: there is no room for it.
#[inline(always)]
pub(crate) fn rest(words: u32, lease: *const Lease, seat: Seat, index: u32, time_wait: u64) -> bool {
    // SAFETY: the helper takes no argument.
    let now = unsafe { bpf_ktime_get_ns() };
    // SAFETY: the storage of a socket that holds no port any more; only `state` is touched from elsewhere.
    let (group, device, source) = unsafe { ((*lease).cgroup_id, (*lease).device, (*lease).source) };
    let (usable_ns, until_ns) = (now + time_wait, now + 2 * time_wait + REPEATED_FIN_NS);
    begin(
        words,
        seat,
        index,
        &Rest { usable_ns, until_ns, group, owner_slot: seat.owner_slot, device, source },
    )
}

/// Has a port rest that the kernel refused before a SYN was sent: warm ports are taken first, and the next connect would get
/// the same one. It serves again as soon as there is no other.
#[inline(always)]
pub(crate) fn avoid(words: u32, lease: *const Lease, seat: Seat, index: u32) -> bool {
    if (Maps { words }).load(Geometry { words }.resting(seat.owner_slot)) >= AVOIDED {
        return false;
    }
    // SAFETY: the helper takes no argument.
    let now = unsafe { bpf_ktime_get_ns() };
    // SAFETY: as in `rest`.
    let group = unsafe { (*lease).cgroup_id };
    let (owner_slot, device, source) = (seat.owner_slot, 0, [0; 16]);
    begin(
        words,
        seat,
        index,
        &Rest { usable_ns: now, until_ns: now + AVOIDED_NS, group, owner_slot, device, source },
    )
}

/// Enters a port, if its group leaves room to others.
#[inline(always)]
fn begin(words: u32, seat: Seat, index: u32, rest: &Rest) -> bool {
    let key = shares::resting(rest.group);
    let free = u64::from(MAX_RESTS).saturating_sub(pool_share(shares::ALL_RESTING));
    let port = RestingPort { slot: seat.slot, index };
    if !shares::leaves_a_quarter(pool_share(key), free)
        || POOL_RESTING.insert(port, rest, BPF_NOEXIST).is_err()
    {
        count(counter::RESTS_DENIED);
        return false;
    }
    pool_extend_share(key);
    pool_extend_share(shares::ALL_RESTING);
    (Maps { words }).fetch_add(Geometry { words }.resting(seat.owner_slot), 1);
    count(counter::RESTS);
    true
}

/// The result of [`wake`].
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Woken {
    /// No port of the namespace rests at this destination.
    NoneRests,
    /// The kernel would refuse each of them.
    None,
    /// At least one was released.
    Some,
}

/// Releases ports of a namespace at a destination whose tuple the kernel has released.
#[inline(always)]
pub(crate) fn wake(context: *mut bpf_sock_addr, base: u32, words: u32, seat: Seat) -> Woken {
    // SAFETY: the helper takes no argument.
    let start = unsafe { bpf_get_prandom_u32() };
    let ports = words * 64;
    match search(context, base, words, pack(seat), u64::from(ports) << 32 | u64::from(start % ports.max(1))) {
        0 => Woken::NoneRests,
        1 => Woken::None,
        _ => Woken::Some,
    }
}

/// [`wake`] for one port.
#[inline(always)]
pub(crate) fn wake_port(context: *mut bpf_sock_addr, base: u32, words: u32, seat: Seat, index: u32) -> bool {
    search(context, base, words, pack(seat), 1 << 32 | u64::from(index)) > 1
}

#[inline(always)]
fn pack(seat: Seat) -> u64 {
    u64::from(seat.owner_slot) << 32 | u64::from(seat.slot)
}

/// [`wake`], as a function: its frame of the stack ends before others begin. The upper half of `seat` has the namespace's
/// slot; that of `range` the number of ports, the lower the first port. (The number must not be the lower half: the verifier
/// compares all 64 bits of the argument of `bpf_loop`, and the compiler does not clear the others.)
#[inline(never)]
extern "C" fn search(context: *mut bpf_sock_addr, base: u32, words: u32, seat: u64, range: u64) -> u32 {
    let (slot, owner_slot) = (seat as u32, (seat >> 32) as u32);
    let (start, ports) = (range as u32, (range >> 32) as u32);
    let (tables, geometry) = (Maps { words }, Geometry { words });
    if tables.load(geometry.resting(owner_slot)) == 0 {
        return 0;
    }
    // SAFETY: the helper takes no argument.
    let now = unsafe { bpf_ktime_get_ns() };
    if ports > 1 && now.wrapping_sub(tables.load(geometry.searched(owner_slot))) < PAUSE_NS {
        return 1;
    }
    let mut wake = Wake { context, now, base, words, slot, owner_slot, start, released: 0 };
    let turn = wake_turn as *const ();
    // SAFETY: a callback with the arguments that the helper gives it, and memory that outlives the call.
    unsafe { bpf_loop(ports, turn.cast_mut().cast(), (&raw mut wake).cast(), 0) };
    // SAFETY: initialised above; volatile, since the callback wrote it.
    let released = unsafe { (&raw const wake.released).read_volatile() };
    if ports > 1 {
        tables.store(geometry.searched(owner_slot), if released == 0 { now } else { 0 });
    }
    if released == 0 { 1 } else { 2 }
}

/// A walk over ports of a destination.
#[repr(C)]
struct Wake {
    context: *mut bpf_sock_addr,
    now: u64,
    base: u32,
    words: u32,
    slot: u32,
    owner_slot: u32,
    start: u32,
    released: u32,
}

#[inline(never)]
extern "C" fn wake_turn(turn: u64, wake: *mut Wake) -> i64 {
    // SAFETY: the memory that `search` gave to `bpf_loop`.
    let wake = unsafe { &mut *wake };
    let index = (wake.start + turn as u32) % (wake.words * 64).max(1);
    let port = RestingPort { slot: wake.slot, index };
    let Some(rest) = POOL_RESTING.get_ptr(port) else { return 0 };
    // SAFETY: a pointer to a map's value, which is written once, at insertion; copied before anything is removed.
    let (until_ns, group, owner_slot) = unsafe { ((*rest).until_ns, (*rest).group, (*rest).owner_slot) };
    // In another namespace the kernel cannot be asked, and the port would be warm there.
    if owner_slot != wake.owner_slot || until_ns > wake.now && is_kept(wake, index, rest) != 0 {
        return 0;
    }
    if POOL_RESTING.remove(port).is_ok() {
        pool_end_rest(wake.words, wake.slot, owner_slot, index, group);
        wake.released += 1;
    }
    i64::from(wake.released >= RELEASED)
}

/// Releases a port that was removed from the map; global, so that the verifier follows it once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn pool_end_rest(words: u32, slot: u32, owner_slot: u32, index: u32, group: u64) -> u32 {
    pool_reduce_share(shares::resting(group), 1);
    pool_reduce_share(shares::ALL_RESTING, 1);
    let tables = Maps { words };
    tables.fetch_add(Geometry { words }.resting(owner_slot), u64::MAX);
    pool_put_back(words, slot, owner_slot, index);
    0
}

/// Whether the kernel still has the tuple of a port that rests. A function: its frame of the stack ends before others begin.
#[inline(never)]
extern "C" fn is_kept(wake: *const Wake, index: u32, rest: *const Rest) -> u32 {
    // SAFETY: the memory that `search` gave to `bpf_loop`, and the value of a map.
    let (wake, rest) = unsafe { (&*wake, &*rest) };
    let tables = Maps { words: wake.words };
    let key = Geometry { words: wake.words }.key(wake.slot);
    // As `Destination::words`.
    let (first, second) = (tables.load(key), tables.load(key + 1));
    let remote_port = tables.load(key + 2).to_le_bytes();
    let local_port = ((wake.base + index) as u16).to_be_bytes();
    let ports = u32::from_ne_bytes([remote_port[0], remote_port[1], local_port[0], local_port[1]]);
    let source = (&raw const rest.source).cast::<u32>();
    // SAFETY: aligned parts of a field.
    let part = |n: usize| unsafe { source.add(n).read() };
    if part(0) | part(1) | part(2) | part(3) == 0 {
        return 0;
    }
    // Of a socket that is bound to an interface only that interface's look-up finds the tuple.
    if rest.device != 0 {
        return 1;
    }
    let mut tuple = Tuple::default();
    let is_v4 = first == 0 && second as u32 == u32::from_ne_bytes([0, 0, 0xff, 0xff]);
    let size = if is_v4 {
        tuple.words[0] = (second >> 32) as u32;
        tuple.words[1] = part(3);
        tuple.words[2] = ports;
        TUPLE_V4
    } else {
        tuple.words[0] = first as u32;
        tuple.words[1] = (first >> 32) as u32;
        tuple.words[2] = second as u32;
        tuple.words[3] = (second >> 32) as u32;
        tuple.words[4] = part(0);
        tuple.words[5] = part(1);
        tuple.words[6] = part(2);
        tuple.words[7] = part(3);
        tuple.words[8] = ports;
        TUPLE_V6
    };
    // SAFETY: an initialised tuple of the size given; the reference to the socket is released at once.
    unsafe {
        let found: *mut bpf_sock =
            bpf_skc_lookup_tcp(wake.context.cast(), (&raw mut tuple).cast(), size, CURRENT_NETNS, 0).cast();
        if found.is_null() {
            return 0;
        }
        let state = (&raw const (*found).state).read_volatile();
        bpf_sk_release(found.cast());
        u32::from(state != TCP_LISTEN)
    }
}
