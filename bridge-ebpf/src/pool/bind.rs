//! `bind` to port 0, before the destination is known.
//!
//! Unconnected UDP: by the time of `sendmsg` it is too late to choose a port. TCP: see [`crate::bind_tcp`].

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};
use bridge_common::pool::{
    Config, Destination, FLAG_BIND_UDP, FLAG_STRICT, Geometry, LEASE_ANY, LEASE_HELD, Refusal, TEMPLATE_UDP,
    TEMPLATE_UDP_ANY, bitmap,
    slots::{self, Tables as _},
};
use bridge_common::protocol::{TCP, UDP};

use crate::{
    bind_tcp::bind_tcp,
    claim::{enter, note},
    maps::POOL_CONFIG,
    refuse::{PASS, note_refusal, refuse},
    sock::{Family, destination, is_in_networks, lease, lease_or_new, protocol, set_port, socket},
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
