//! Claiming a port for a socket and binding it.

use core::ptr;

use aya_ebpf::{
    EbpfContext as _,
    bindings::{bpf_sock, bpf_sock_addr, sockaddr},
    helpers::generated::{
        bpf_bind, bpf_get_current_cgroup_id, bpf_get_current_comm, bpf_get_prandom_u32, bpf_ktime_get_ns,
        bpf_loop,
    },
    programs::SockAddrContext,
};
use bridge_common::pool::{
    Config, Destination, Grant, LEASE_HELD, Lease, MAX_SLOTS, MAX_WORDS, Refusal, bitmap, counter,
    slots::{self, Claim, Seat, Tables as _},
    uses,
};
use bridge_common::protocol::UDP;
use bridge_ebpf::atomic::fetch_or;

use crate::{
    maps::{POOL_GRANTS, count},
    rest::{Woken, wake},
    sock::{AF_INET, AF_INET6, Family, netns_cookie, reuse_address, socket},
    tables::{Maps, pool_unclaim},
    uses::{add_connection, expected, load, process},
};

/// Turns of [`search_turn`] that claim a random port, and pass over one that another socket has, towards another destination: the
/// same socket may connect to one destination after the other, and its port stays the same. It should be free where one was
/// refused lately.
const UNUSED_TURNS: u32 = 8;
/// Turns that pass over a port whose last connection is just about to end.
const SETTLE_TURNS: u32 = 4;
/// Turns after them for UDP, one for each of this many ports at most, that look for a port that no other socket has. A pod leaves a
/// sixteenth of the ports of a destination to others: one of them is nearly always among this many. A TCP socket is seldom
/// connected again.
const SCAN_TURNS: u32 = 128;
/// Turns after them that claim any free port; the turns after those try each port of the pool once.
const ANY_TURNS: u32 = 8;
const EADDRINUSE: i64 = 98;

/// `struct sockaddr_in`.
#[repr(C)]
struct SockaddrIn {
    family: u16,
    port: [u8; 2],
    address: u32,
    zero: [u8; 8],
}

/// `struct sockaddr_in6`.
#[repr(C)]
struct SockaddrIn6 {
    family: u16,
    port: [u8; 2],
    flow_info: u32,
    address: [u32; 4],
    scope_id: u32,
}

// Numbers of ports and slots are kept in 16 bits.
const _: () = assert!(MAX_WORDS * 64 <= 1 << 16 && MAX_SLOTS <= 1 << 16);

/// The search for a port of a socket.
#[repr(C)]
struct Search {
    context: *mut bpf_sock_addr,
    base: u32,
    words: u32,
    quota: u32,
    protocol: u32,
    /// Of UDP: [`expected`].
    expected: u64,
    seat: Seat,
    /// The port where a search in order begins.
    start: u32,
    /// Turns that look for a port that no other socket has, after the random ones.
    scan: u32,
    /// The result: a port, counted from the base, or [`NOT_FOUND`].
    index: u32,
    /// The slot that it was taken from.
    from: u32,
    refusal: u32,
}

const NOT_FOUND: u32 = u32::MAX;
/// Answers of a callback of `bpf_loop`.
const NEXT: i64 = 0;
const STOP: i64 = 1;

/// Claims some port and binds the socket to it.
///
/// Other programs may have bound ports of the pool exclusively, so this goes on until a port can be bound or each was
/// tried. `bpf_loop` (Linux 5.17) lets the verifier follow one turn instead of all.
#[inline(always)]
pub(crate) fn claim_and_bind(
    ctx: &SockAddrContext,
    family: Family,
    config: &Config,
    protocol: u8,
    seat: Seat,
) -> Result<Claim, Refusal> {
    reuse_address(ctx);
    let ports = config.words * 64;
    let expected = if protocol == UDP {
        let netns = netns_cookie(ctx);
        expected(netns, process(netns, ctx.tgid(), UDP), process(netns, 0, UDP))
    } else {
        0
    };
    let mut search = Search {
        context: ctx.sock_addr,
        base: config.base,
        words: config.words,
        quota: config.quota,
        protocol: u32::from(protocol),
        expected,
        seat,
        // SAFETY: the helper takes no argument.
        start: unsafe { bpf_get_prandom_u32() } % ports.max(1),
        scan: if protocol == UDP { SCAN_TURNS.min(ports) } else { 0 },
        index: NOT_FOUND,
        from: 0,
        refusal: Refusal::BIND.0,
    };
    let result = run(family, &mut search);
    if !matches!(result, Err(Refusal::EXHAUSTED | Refusal::QUOTA | Refusal::SHARE)) {
        return result;
    }
    match wake(ctx.sock_addr, config.base, config.words, seat) {
        Woken::NoneRests => result,
        Woken::None if matches!(result, Err(Refusal::EXHAUSTED)) => Err(Refusal::RESTING),
        Woken::None => result,
        Woken::Some => run(family, &mut search),
    }
}

/// Searches until a port is bound, or none is left.
#[inline(always)]
fn run(family: Family, search: &mut Search) -> Result<Claim, Refusal> {
    let turns = UNUSED_TURNS + search.scan + ANY_TURNS + search.words * 64;
    let turn = match family {
        Family::V4 => search_turn_v4 as *const (),
        Family::V6 => search_turn_v6 as *const (),
    };
    // SAFETY: a callback with the arguments that the helper gives it, and memory that outlives the call.
    unsafe { bpf_loop(turns, turn.cast_mut().cast(), ptr::from_mut(search).cast(), 0) };
    // SAFETY: initialised by the caller; volatile, since the callback wrote it.
    unsafe {
        match (&raw const search.index).read_volatile() {
            NOT_FOUND => Err(Refusal((&raw const search.refusal).read_volatile())),
            index => Ok(Claim { index, from: (&raw const search.from).read_volatile() }),
        }
    }
}

#[inline(never)]
extern "C" fn search_turn_v4(turn: u64, search: *mut Search) -> i64 {
    // SAFETY: the memory that `claim_and_bind` gave to `bpf_loop`.
    search_turn(Family::V4, turn as u32, unsafe { &mut *search })
}

#[inline(never)]
extern "C" fn search_turn_v6(turn: u64, search: *mut Search) -> i64 {
    // SAFETY: as in `search_turn_v4`.
    search_turn(Family::V6, turn as u32, unsafe { &mut *search })
}

/// Claims one port and tries to bind it.
#[inline(always)]
fn search_turn(family: Family, turn: u32, search: &mut Search) -> i64 {
    let Search { words, seat, quota, .. } = *search;
    let tables = Maps { words };
    let any = turn >= UNUSED_TURNS + search.scan;
    let claim = if turn < UNUSED_TURNS || any && turn < UNUSED_TURNS + search.scan + ANY_TURNS {
        // A warm port that another program has bound would be found warm again at once.
        match slots::claim(&tables, seat, quota, turn > 0) {
            Ok(claim) => claim,
            Err(refusal) => {
                search.refusal = refusal.0;
                return STOP;
            }
        }
    } else {
        let ports = (words * 64).max(1);
        let index = search.start.wrapping_add(turn) % ports;
        // Before the claim: a port that is passed over is not disturbed.
        if !any && is_unwanted(search, index) {
            return NEXT;
        }
        match tables.claim_exact(seat, quota, index) {
            Ok(claim) => claim,
            Err(_) => return NEXT,
        }
    };
    // If all others are taken it has to be this one.
    let unwanted = !any && is_unwanted(search, claim.index);
    let pass_over = unwanted || turn < SETTLE_TURNS && slots::settling(&tables, seat, claim);
    if pass_over {
        unclaim(search, claim);
        return NEXT;
    }
    let error = bind(search.context, family, (search.base + claim.index) as u16);
    if error == 0 {
        search.index = claim.index;
        search.from = claim.from;
        return STOP;
    }
    unclaim(search, claim);
    count(counter::BIND_RETRIES);
    if error == -EADDRINUSE { NEXT } else { STOP }
}

/// Whether another socket has a port, towards another destination, or the expected destination refuses it.
#[inline(always)]
fn is_unwanted(search: &Search, index: u32) -> bool {
    let Search { words, protocol, expected, .. } = *search;
    let tables = Maps { words };
    let is_free = |slot| bitmap::is_free(&tables, tables.geometry().free(slot), index);
    uses::sockets(load(index, protocol as u8)) > 0
        || protocol == u32::from(UDP) && !is_free(expected as u32) && !is_free((expected >> 32) as u32)
}

#[inline(always)]
fn unclaim(search: &Search, claim: Claim) {
    let seat = pack(Ok(search.seat)).cast_unsigned();
    pool_unclaim(search.words, seat, search.quota, claim.index, claim.from);
}

/// Takes over the port that the agent has granted to this namespace, together with the seat that the grant has.
#[inline(always)]
pub(crate) fn take_grant(ctx: &SockAddrContext, destination: &Destination, index: u32) -> Option<Seat> {
    unpack(granted(netns_cookie(ctx), destination, index)).ok()
}

/// [`take_grant`], as a function: its frame of the stack ends before others begin.
#[inline(never)]
extern "C" fn granted(netns_cookie: u64, destination: &Destination, index: u32) -> i64 {
    let grant = Grant::new(*destination, index);
    // SAFETY: the value is written once, at insertion, and copied before anything is removed.
    let Some(granted) = unsafe { POOL_GRANTS.get(grant) }.copied() else { return pack(Err(Refusal::TAKEN)) };
    // The removal decides: the agent may be ending the grant at this moment.
    if granted.netns_cookie != netns_cookie || POOL_GRANTS.remove(grant).is_err() {
        return pack(Err(Refusal::TAKEN));
    }
    pack(Ok(Seat { slot: granted.slot, owner_slot: granted.owner_slot }))
}

/// Finds or makes the seat of a socket's namespace at a destination.
#[inline(always)]
pub(crate) fn enter(
    ctx: &SockAddrContext,
    config: &Config,
    destination: &Destination,
) -> Result<Seat, Refusal> {
    // SAFETY: the helper takes no argument.
    let group = unsafe { bpf_get_current_cgroup_id() };
    unpack(seat(config.words, destination, netns_cookie(ctx), group))
}

/// [`slots::enter`], as a function for the same reason as [`granted`].
#[inline(never)]
extern "C" fn seat(words: u32, destination: &Destination, netns_cookie: u64, group: u64) -> i64 {
    pack(slots::enter(&Maps { words }, destination, netns_cookie, group))
}

#[inline(always)]
fn pack(result: Result<Seat, Refusal>) -> i64 {
    match result {
        Ok(seat) => i64::from(seat.owner_slot) << 32 | i64::from(seat.slot),
        Err(refusal) => -i64::from(refusal.0),
    }
}

#[inline(always)]
fn unpack(packed: i64) -> Result<Seat, Refusal> {
    if packed < 0 {
        return Err(Refusal(packed.unsigned_abs() as u32));
    }
    let packed = packed.cast_unsigned();
    Ok(Seat { slot: packed as u32, owner_slot: (packed >> 32) as u32 })
}

/// Records the port in the socket's storage, with the flags `extra`. The last step of a claim.
#[inline(always)]
pub(crate) fn note(
    ctx: &SockAddrContext,
    lease: *mut Lease,
    seat: Seat,
    index: u32,
    destination: &Destination,
    extra: u64,
) {
    record(ctx.sock_addr, lease, pack(Ok(seat)), u64::from(index) << 32 | extra, destination);
}

/// [`note`], as a function for the same reason as [`granted`]. The upper half of `port` has the index, the lower the flags.
#[inline(never)]
extern "C" fn record(
    context: *mut bpf_sock_addr,
    lease: *mut Lease,
    seat: i64,
    port: u64,
    destination: &Destination,
) {
    let ctx = SockAddrContext::new(context);
    let seat = seat.cast_unsigned();
    let (slot, owner_slot) = (seat as u32, (seat >> 32) as u32);
    // SAFETY: `lease` is the storage of a socket that is locked by the system call that runs this hook; `state` alone is
    // touched from elsewhere, and as long as LEASE_HELD is not set no one acts on the rest.
    unsafe {
        (*lease).netns_cookie = netns_cookie(&ctx);
        (*lease).cgroup_id = bpf_get_current_cgroup_id();
        (*lease).since_ns = bpf_ktime_get_ns();
        (*lease).slot = slot;
        (*lease).owner_slot = owner_slot;
        (*lease).index = (port >> 32) as u32;
        (*lease).pid = ctx.tgid();
        (*lease).uid = ctx.uid();
        (*lease).destination = *destination;
        // Written in place: the stack is short. The helper fails for no task of the hooks.
        bpf_get_current_comm((&raw mut (*lease).comm).cast(), 16);
        fetch_or(&raw mut (*lease).state, LEASE_HELD | port & u64::from(u32::MAX));
    }
    add_connection((port >> 32) as u32, destination.protocol());
    count(counter::CLAIMS);
}

/// Binds the socket to its source address, if it has one, and `port` (host byte order).
#[inline(always)]
fn bind(context: *mut bpf_sock_addr, family: Family, port: u16) -> i64 {
    match family {
        Family::V4 => bind_v4(context, port),
        Family::V6 => bind_v6(context, port),
    }
}

#[inline(never)]
extern "C" fn bind_v4(context: *mut bpf_sock_addr, port: u16) -> i64 {
    let mut address = SockaddrIn {
        family: AF_INET as u16,
        port: port.to_be_bytes(),
        // SAFETY: the socket of the context; the verifier checks the access.
        address: unsafe { (*socket(context)).src_ip4 },
        zero: [0; 8],
    };
    // SAFETY: an initialised address of the size said.
    unsafe { bpf_bind(context, (&raw mut address).cast::<sockaddr>(), size_of::<SockaddrIn>() as i32) }
}

#[inline(never)]
extern "C" fn bind_v6(context: *mut bpf_sock_addr, port: u16) -> i64 {
    let socket: *const bpf_sock = socket(context);
    let mut address = SockaddrIn6 {
        family: AF_INET6 as u16,
        port: port.to_be_bytes(),
        flow_info: 0,
        // SAFETY: the socket of the context; volatile, since a socket allows single 32-bit reads but no wider ones.
        address: unsafe {
            [
                (&raw const (*socket).src_ip6[0]).read_volatile(),
                (&raw const (*socket).src_ip6[1]).read_volatile(),
                (&raw const (*socket).src_ip6[2]).read_volatile(),
                (&raw const (*socket).src_ip6[3]).read_volatile(),
            ]
        },
        scope_id: 0,
    };
    // SAFETY: an initialised address of the size said.
    unsafe { bpf_bind(context, (&raw mut address).cast::<sockaddr>(), size_of::<SockaddrIn6>() as i32) }
}
