//! `bind` of a TCP socket to port 0: its port is chosen before its destination is known, and `connect` cannot bind it again.
//!
//! So the best port is one that the last destination of the process keeps for its namespace, or that no destination keeps, and
//! that no other socket has ([`uses::rank`]). Among the rest, the one that fewest sockets have, and that this last destination
//! would accept: most programs that bind first (proxies) connect to the same destinations again, and try again after a refusal.

use aya_ebpf::{
    EbpfContext as _,
    bindings::bpf_sock_addr,
    helpers::generated::{bpf_loop, bpf_sk_lookup_tcp, bpf_sk_release},
    programs::SockAddrContext,
};
use bridge_common::{
    pool::{
        Config, FLAG_STRICT, Geometry, LEASE_HELD, TEMPLATE_EMPTY, TEMPLATE_TCP,
        bitmap::{self, Memory as _},
        shares,
        uses::{self, SOCKET},
    },
    protocol::TCP,
};
use bridge_ebpf::atomic::fetch_add;

use crate::{
    maps::POOL_BIND_CURSOR,
    release::is_subflow,
    sock::{
        CURRENT_NETNS, Family, TUPLE_V4, TUPLE_V6, Tuple, lease_or_new, netns_cookie, reuse_address,
        set_port, socket,
    },
    tables::{Maps, pool_reduce_share},
    uses::{add, begin_bound, end_bound, expected, load, note_bound, process},
};

/// After this many ports one that no socket has is good enough.
const NEAR: u32 = 256;
/// After this many ports the best one is taken.
const FAR: u32 = 4096;
/// [`Search::port`]: none.
const NONE: u32 = u32::MAX;

/// The search for a port of a TCP socket that binds port 0.
#[repr(C)]
struct Search {
    context: *mut bpf_sock_addr,
    base: u32,
    words: u32,
    start: u32,
    /// Slot of the expected destination.
    slot: u32,
    /// Slot of the namespace's warm ports there.
    owner_slot: u32,
    /// 1: there is one.
    expected: u32,
    /// The result, counted from the base, or [`NONE`].
    index: u32,
    /// Its [`uses::rank`].
    rank: u64,
}

/// Gives the socket a port of the pool, without a claim: `connect` claims it for its destination. If there is none, the kernel
/// chooses. Without `strict` there is no need for it.
#[inline(always)]
pub(crate) fn bind_tcp(ctx: &SockAddrContext, family: Family, config: &Config) {
    let socket = socket(ctx.sock_addr);
    // SAFETY: the socket of the context. One that has a port already cannot be bound again.
    if config.flags & FLAG_STRICT == 0 || unsafe { (*socket).src_port } != 0 {
        return;
    }
    let lease = lease_or_new(socket);
    // SAFETY: the storage of a socket that is locked by this very `bind`.
    if lease.is_null() || unsafe { (&raw const (*lease).state).read_volatile() } & LEASE_HELD != 0 {
        return;
    }
    // Of an earlier `bind` that failed.
    end_bound(lease);
    let netns = netns_cookie(ctx);
    let (tables, geometry) = (Maps { words: config.words }, Geometry { words: config.words });
    let ports = tables.load(geometry.ports());
    if !begin_bound(netns, ports) {
        return;
    }
    let expected = expected(netns, process(netns, ctx.tgid(), TCP), process(netns, 0, TCP));
    let owner_slot = (expected >> 32) as u32;
    let mut search = Search {
        context: ctx.sock_addr,
        base: config.base,
        words: config.words,
        start: POOL_BIND_CURSOR.get_ptr_mut(0).map_or(0, |cursor| {
            // SAFETY: a pointer to a map's value.
            unsafe { fetch_add(cursor, 1) as u32 }
        }),
        slot: expected as u32,
        owner_slot,
        expected: u32::from(owner_slot != TEMPLATE_EMPTY),
        index: NONE,
        rank: u64::MAX,
    };
    let turn = match family {
        Family::V4 => bind_turn_v4 as *const (),
        Family::V6 => bind_turn_v6 as *const (),
    };
    // SAFETY: a callback with the arguments that the helper gives it, and memory that outlives the call; read as volatile, since the
    // callback wrote it.
    let index = unsafe {
        bpf_loop(config.words * 64, turn.cast_mut().cast(), (&raw mut search).cast(), 0);
        (&raw const search.index).read_volatile()
    };
    if index == NONE {
        pool_reduce_share(shares::bound(netns), 1);
        return;
    }
    // SAFETY: as above.
    if unsafe { (&raw const search.rank).read_volatile() } != uses::BEST {
        add(index, TCP, SOCKET);
    }
    // Other sockets may have the port, towards other destinations.
    reuse_address(ctx);
    set_port(ctx, (config.base + index) as u16);
    if is_subflow(socket) {
        // No hook would see its end.
        add(index, TCP, SOCKET.wrapping_neg());
        pool_reduce_share(shares::bound(netns), 1);
    } else {
        // SAFETY: as above.
        unsafe { note_bound(ctx, lease, index) };
    }
}

#[inline(never)]
extern "C" fn bind_turn_v4(turn: u64, search: *mut Search) -> i64 {
    // SAFETY: the memory that `bind_tcp` gave to `bpf_loop`.
    bind_turn(Family::V4, turn as u32, unsafe { &mut *search })
}

#[inline(never)]
extern "C" fn bind_turn_v6(turn: u64, search: *mut Search) -> i64 {
    // SAFETY: as in `bind_turn_v4`.
    bind_turn(Family::V6, turn as u32, unsafe { &mut *search })
}

/// Ranks one port. 1 ends the search.
#[inline(always)]
fn bind_turn(family: Family, turn: u32, search: &mut Search) -> i64 {
    let (tables, geometry) = (Maps { words: search.words }, Geometry { words: search.words });
    let index = search.start.wrapping_add(turn) % (search.words * 64).max(1);
    if !bitmap::is_free(&tables, geometry.free(TEMPLATE_TCP), index) {
        // A gap in the pool.
        return 0;
    }
    let warm = bitmap::is_free(&tables, geometry.free(search.owner_slot), index);
    let usable = warm || bitmap::is_free(&tables, geometry.free(search.slot), index);
    let rank = uses::rank(load(index, TCP), usable, warm, search.expected != 0);
    if rank < search.rank && !has_listener(search.context, family, (search.base + index) as u16) {
        // Another processor may be faster.
        if rank == uses::BEST && uses::sockets(add(index, TCP, SOCKET)) > 0 {
            add(index, TCP, SOCKET.wrapping_neg());
            return 0;
        }
        search.rank = rank;
        search.index = index;
    }
    let found = search.rank == uses::BEST
        || turn >= NEAR && search.rank <= uses::UNUSED
        || turn >= FAR && search.index != NONE;
    i64::from(found)
}

/// Whether a socket of this namespace listens on a port; its `bind` would then fail, as one to port 0 never does.
#[inline(always)]
fn has_listener(context: *mut bpf_sock_addr, family: Family, port: u16) -> bool {
    let mut tuple = Tuple::default();
    let size = if family == Family::V4 {
        // SAFETY: a context pointer; the verifier checks the access.
        tuple.words[1] = unsafe { (*context).user_ip4 };
        tuple.words[2] = u32::from_ne_bytes([0, 0, port.to_be_bytes()[0], port.to_be_bytes()[1]]);
        TUPLE_V4
    } else {
        // SAFETY: as above; volatile, since the context allows single 32-bit reads but no wider ones.
        unsafe {
            tuple.words[4] = (&raw const (*context).user_ip6[0]).read_volatile();
            tuple.words[5] = (&raw const (*context).user_ip6[1]).read_volatile();
            tuple.words[6] = (&raw const (*context).user_ip6[2]).read_volatile();
            tuple.words[7] = (&raw const (*context).user_ip6[3]).read_volatile();
        }
        tuple.words[8] = u32::from_ne_bytes([0, 0, port.to_be_bytes()[0], port.to_be_bytes()[1]]);
        TUPLE_V6
    };
    // SAFETY: an initialised tuple of the size given; the reference to the socket is released at once.
    unsafe {
        let found = bpf_sk_lookup_tcp(context.cast(), (&raw mut tuple).cast(), size, CURRENT_NETNS, 0);
        if found.is_null() {
            return false;
        }
        bpf_sk_release(found.cast());
        true
    }
}
