//! Unconnected UDP: the port is chosen by `bind`, and by the time of `sendmsg` it is too late to choose.

use aya_ebpf::{btf_maps::lpm_trie::Key, macros::cgroup_sock_addr, programs::SockAddrContext};
use bridge_common::pool::{
    Destination, FLAG_BIND_UDP, FLAG_STRICT, LEASE_ANY, LEASE_HELD, Refusal, TEMPLATE_UDP, TEMPLATE_UDP_ANY,
    UDP, bitmap, slots,
};

use crate::{
    claim::note,
    maps::{POOL_CONFIG, POOL_NETWORKS},
    refuse::{PASS, refuse},
    sock::{Family, destination, lease, lease_or_new, netns_cookie, protocol, socket},
    tables::Maps,
};

/// `bind` of an IPv4 socket.
#[cgroup_sock_addr(bind4)]
pub(crate) fn pool_bind4(ctx: SockAddrContext) -> i32 {
    bind(&ctx);
    PASS
}

/// `bind` of an IPv6 socket.
#[cgroup_sock_addr(bind6)]
pub(crate) fn pool_bind6(ctx: SockAddrContext) -> i32 {
    bind(&ctx);
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

/// Puts a port of the pool in the place of port 0, for a UDP socket. Where that cannot be, the kernel chooses as ever:
/// the socket may be for destinations that are none of the pool's business, and `sendmsg` refuses the others.
#[inline(always)]
fn bind(ctx: &SockAddrContext) {
    // SAFETY: a context pointer; the verifier checks the access.
    if protocol(ctx.sock_addr) != Some(UDP) || unsafe { (*ctx.sock_addr).user_port } as u16 != 0 {
        return;
    }
    let Some(config) = POOL_CONFIG.get(0) else { return };
    if config.flags & FLAG_BIND_UDP == 0 {
        return;
    }
    let lease = lease_or_new(socket(ctx.sock_addr));
    // SAFETY: the storage of a socket that is locked by this very `bind`.
    if lease.is_null() || unsafe { (&raw const (*lease).state).read_volatile() } & LEASE_HELD != 0 {
        return;
    }
    let tables = Maps { words: config.words };
    let Ok(seat) = slots::enter(&tables, &Destination::ANY_UDP, netns_cookie(ctx), config.quota) else {
        return;
    };
    let Ok(claim) = slots::claim(&tables, seat, false) else { return slots::leave(&tables, seat) };
    let port = (config.base + claim.index) as u16;
    // SAFETY: a context pointer; the field is in network byte order, and this hook may write it.
    unsafe { (*ctx.sock_addr).user_port = u32::from(port.to_be()) };
    note(ctx, lease, seat, claim.index, &Destination::ANY_UDP, LEASE_ANY);
}

/// Refuses what would leave from a port outside the pool.
#[inline(always)]
fn send(ctx: &SockAddrContext, family: Family) -> i32 {
    let Some(destination) = destination(ctx.sock_addr, family) else { return PASS };
    if POOL_NETWORKS.get(&Key::new(128, destination.address())).is_none() {
        return PASS;
    }
    let Some(config) = POOL_CONFIG.get(0) else { return PASS };
    let socket = socket(ctx.sock_addr);
    let lease = lease(socket);
    // SAFETY: the storage of a socket of the context.
    let held = !lease.is_null() && unsafe { (&raw const (*lease).state).read_volatile() } & LEASE_HELD != 0;
    if held || config.flags & FLAG_STRICT == 0 {
        return PASS;
    }
    // SAFETY: the socket of the context; host byte order.
    let index = unsafe { (*socket).src_port }.wrapping_sub(config.base);
    let tables = Maps { words: config.words };
    let geometry = bridge_common::pool::Geometry { words: config.words };
    if index < config.words * 64
        && (bitmap::is_free(&tables, geometry.free(TEMPLATE_UDP), index)
            || bitmap::is_free(&tables, geometry.free(TEMPLATE_UDP_ANY), index))
    {
        return PASS;
    }
    refuse(ctx, &destination, Refusal::OUTSIDE)
}
