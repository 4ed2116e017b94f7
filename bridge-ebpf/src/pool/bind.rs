//! `bind` to port 0, before the destination is known.
//!
//! Unconnected UDP: by the time of `sendmsg` it is too late to choose a port. TCP: a socket that has a port cannot be bound
//! again by `connect`, which therefore would have to refuse one from outside the pool.

use aya_ebpf::{
    bindings::bpf_sock_addr,
    helpers::generated::{bpf_loop, bpf_sk_lookup_tcp, bpf_sk_release},
    macros::cgroup_sock_addr,
    programs::SockAddrContext,
};
use bridge_common::pool::{
    Config, Destination, FLAG_BIND_UDP, FLAG_STRICT, Geometry, LEASE_ANY, LEASE_HELD, Refusal, TEMPLATE_TCP,
    TEMPLATE_UDP, TEMPLATE_UDP_ANY, bitmap,
    slots::{self, Tables as _},
};
use bridge_common::protocol::{TCP, UDP};
use bridge_ebpf::atomic::fetch_add;

use crate::{
    claim::{enter, note},
    maps::{POOL_BIND_CURSOR, POOL_CONFIG},
    refuse::{PASS, note_refusal, refuse},
    sock::{
        CURRENT_NETNS, Family, TUPLE_V4, TUPLE_V6, Tuple, destination, is_in_networks, lease, lease_or_new,
        protocol, reuse_address, socket,
    },
    tables::{Maps, pool_put_back},
};

/// `bind` of an IPv4 socket.
#[cgroup_sock_addr(bind4)]
pub(crate) fn pool_bind4(ctx: SockAddrContext) -> i32 {
    bind(&ctx, Family::V4);
    PASS
}

/// `bind` of an IPv6 socket.
#[cgroup_sock_addr(bind6)]
pub(crate) fn pool_bind6(ctx: SockAddrContext) -> i32 {
    bind(&ctx, Family::V6);
    PASS
}

/// `sendto` and `sendmsg` with an address, of an IPv4 socket.
#[cgroup_sock_addr(sendmsg4)]
pub(crate) fn pool_sendmsg4(ctx: SockAddrContext) -> i32 {
    send(&ctx, Family::V4)
}

/// `sendto` and `sendmsg` with an address, of an IPv6 socket.
#[cgroup_sock_addr(sendmsg6)]
pub(crate) fn pool_sendmsg6(ctx: SockAddrContext) -> i32 {
    send(&ctx, Family::V6)
}

/// Replaces port 0 by a port of the pool. If there is none, the kernel chooses: the socket may be for destinations outside
/// the pool, and `connect` and `sendmsg` refuse the others.
#[inline(always)]
fn bind(ctx: &SockAddrContext, family: Family) {
    // SAFETY: a context pointer; the verifier checks the access.
    if unsafe { (*ctx.sock_addr).user_port } as u16 != 0 {
        return;
    }
    let Some(config) = POOL_CONFIG.get(0) else { return };
    match protocol(ctx.sock_addr) {
        Some(UDP) => bind_udp(ctx, config),
        Some(TCP) => bind_tcp(ctx, family, config),
        _ => {}
    }
}

/// The search for a port of a TCP socket that binds port 0.
#[repr(C)]
struct Search {
    context: *mut bpf_sock_addr,
    base: u32,
    words: u32,
    /// The result in host byte order, or 0.
    port: u32,
}

/// Takes the next port of the pool in turn, without a claim: `connect` claims it for its destination. Two sockets have the
/// same port only after all others had their turn. Without `strict` there is no need for it.
#[inline(always)]
fn bind_tcp(ctx: &SockAddrContext, family: Family, config: &Config) {
    if config.flags & FLAG_STRICT == 0 {
        return;
    }
    let mut search = Search { context: ctx.sock_addr, base: config.base, words: config.words, port: 0 };
    let turn = match family {
        Family::V4 => bind_turn_v4 as *const (),
        Family::V6 => bind_turn_v6 as *const (),
    };
    // SAFETY: a callback with the arguments that the helper gives it, and memory that outlives the call.
    unsafe { bpf_loop(config.words * 64, turn.cast_mut().cast(), (&raw mut search).cast(), 0) };
    // SAFETY: initialised above; volatile, since the callback wrote it.
    let port = unsafe { (&raw const search.port).read_volatile() };
    if port != 0 {
        // Other sockets may have the port, towards other destinations.
        reuse_address(ctx);
        set_port(ctx, port as u16);
    }
}

#[inline(never)]
extern "C" fn bind_turn_v4(_turn: u64, search: *mut Search) -> i64 {
    // SAFETY: the memory that `bind_tcp` gave to `bpf_loop`.
    bind_turn(Family::V4, unsafe { &mut *search })
}

#[inline(never)]
extern "C" fn bind_turn_v6(_turn: u64, search: *mut Search) -> i64 {
    // SAFETY: as in `bind_turn_v4`.
    bind_turn(Family::V6, unsafe { &mut *search })
}

/// Looks at the port whose turn it is. 1 ends the search.
#[inline(always)]
fn bind_turn(family: Family, search: &mut Search) -> i64 {
    let Some(cursor) = POOL_BIND_CURSOR.get_ptr_mut(0) else { return 1 };
    // SAFETY: a pointer to a map's value.
    let index = unsafe { fetch_add(cursor, 1) } as u32 % (search.words * 64).max(1);
    let geometry = Geometry { words: search.words };
    if !bitmap::is_free(&Maps { words: search.words }, geometry.free(TEMPLATE_TCP), index) {
        // A gap in the pool.
        return 0;
    }
    let port = search.base + index;
    if has_listener(search.context, family, port as u16) {
        return 0;
    }
    search.port = port;
    1
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

#[inline(always)]
fn set_port(ctx: &SockAddrContext, port: u16) {
    // SAFETY: a context pointer; the field is in network byte order, and this hook may write it.
    unsafe { (*ctx.sock_addr).user_port = u32::from(port.to_be()) };
}

#[inline(always)]
fn bind_udp(ctx: &SockAddrContext, config: &Config) {
    if config.flags & FLAG_BIND_UDP == 0 {
        return;
    }
    let lease = lease_or_new(socket(ctx.sock_addr));
    // SAFETY: the storage of a socket that is locked by this very `bind`.
    if lease.is_null() || unsafe { (&raw const (*lease).state).read_volatile() } & LEASE_HELD != 0 {
        return;
    }
    let tables = Maps { words: config.words };
    let claimed = match enter(ctx, config, &Destination::ANY_UDP) {
        Ok(seat) => match slots::claim_random(&tables, seat, config.unconnected) {
            Ok(claim) => Ok((seat, claim)),
            Err(refusal) => {
                slots::leave(&tables, seat);
                Err(refusal)
            }
        },
        Err(refusal) => Err(refusal),
    };
    let (seat, claim) = match claimed {
        Ok(claimed) => claimed,
        // Each `sendto` from the port that the kernel chooses now would only show that it is outside.
        Err(refusal) if config.flags & FLAG_STRICT != 0 => {
            return note_refusal(ctx, &Destination::ANY_UDP, refusal);
        }
        Err(_) => return,
    };
    set_port(ctx, (config.base + claim.index) as u16);
    note(ctx, lease, seat, claim.index, &Destination::ANY_UDP, LEASE_ANY);
}

/// Refuses a datagram that would leave from a port outside the pool, or from one that another socket uses towards the same
/// destination.
#[inline(always)]
fn send(ctx: &SockAddrContext, family: Family) -> i32 {
    let Some(destination) = destination(ctx.sock_addr, family) else { return PASS };
    if !is_in_networks(&destination) {
        return PASS;
    }
    let Some(config) = POOL_CONFIG.get(0) else { return PASS };
    if config.flags & FLAG_STRICT == 0 {
        return PASS;
    }
    let socket = socket(ctx.sock_addr);
    let lease = lease(socket);
    if !lease.is_null() {
        // SAFETY: the storage of a socket of the context. A `connect` in another thread may change it meanwhile, and then
        // the datagram goes to either destination.
        let (held, own) =
            unsafe { ((&raw const (*lease).state).read_volatile(), (*lease).destination == destination) };
        if held & LEASE_HELD != 0 && (held & LEASE_ANY != 0 || own) {
            return PASS;
        }
    }
    // SAFETY: the socket of the context; host byte order.
    let index = unsafe { (*socket).src_port }.wrapping_sub(config.base);
    match lend(ctx, config, &destination, index) {
        Ok(()) => PASS,
        Err(refusal) => refuse(ctx, &destination, refusal),
    }
}

/// Makes sure that no other namespace, and no other socket, uses a port that the program has bound itself: the port is warm
/// from now on, so that it stays with the namespace. The socket holds no claim, since it may send anywhere at any time.
#[inline(always)]
fn lend(
    ctx: &SockAddrContext,
    config: &Config,
    destination: &Destination,
    index: u32,
) -> Result<(), Refusal> {
    let tables = Maps { words: config.words };
    let geometry = Geometry { words: config.words };
    if index >= config.words * 64 {
        return Err(Refusal::OUTSIDE);
    }
    let destination = if bitmap::is_free(&tables, geometry.free(TEMPLATE_UDP), index) {
        destination
    } else if bitmap::is_free(&tables, geometry.free(TEMPLATE_UDP_ANY), index) {
        &Destination::ANY_UDP
    } else {
        return Err(Refusal::OUTSIDE);
    };
    let seat = enter(ctx, config, destination)?;
    match tables.claim_exact(seat, config.quota, index) {
        Ok(_) => {
            pool_put_back(config.words, seat.slot, seat.owner_slot, index);
            Ok(())
        }
        Err(refusal) => {
            slots::leave(&tables, seat);
            Err(refusal)
        }
    }
}
