//! `connect`: the moment a source port is chosen.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};
use bridge_common::pool::{
    Config, Destination, FLAG_STRICT, LEASE_ANY, LEASE_CONNECTING, LEASE_FRESH, LEASE_HELD,
    LEASE_OF_CONNECTION, Lease, Refusal, TEMPLATE_UDP_ANY, bitmap, counter,
    slots::{self, Claim, Seat, Tables as _},
};
use bridge_common::protocol::{TCP, UDP};
use bridge_ebpf::atomic::fetch_and;

use crate::{
    claim::{claim_and_bind, enter, note, take_grant},
    maps::{POOL_CONFIG, count},
    refuse::{PASS, note_earlier_failure, refuse},
    release::give_back,
    rest::wake_port,
    sock::{Family, destination, is_in_networks, lease_or_new, socket},
    tables::Maps,
    uses::{end_bound, expect},
};

/// `connect` of an IPv4 socket.
#[cgroup_sock_addr(connect4)]
pub(crate) fn pool_connect4(ctx: SockAddrContext) -> i32 {
    connect(&ctx, Family::V4)
}

/// `connect` of an IPv6 socket, also to a v4-mapped address.
#[cgroup_sock_addr(connect6)]
pub(crate) fn pool_connect6(ctx: SockAddrContext) -> i32 {
    connect(&ctx, Family::V6)
}

#[inline(always)]
fn connect(ctx: &SockAddrContext, family: Family) -> i32 {
    let Some(destination) = destination(ctx.sock_addr, family) else { return PASS };
    if !is_in_networks(&destination) {
        return PASS;
    }
    match try_connect(ctx, family, &destination) {
        Ok(()) => PASS,
        Err(refusal) => refuse(ctx, &destination, refusal),
    }
}

#[inline(always)]
fn try_connect(ctx: &SockAddrContext, family: Family, destination: &Destination) -> Result<(), Refusal> {
    let Some(config) = POOL_CONFIG.get(0) else { return Ok(()) };
    let socket = socket(ctx.sock_addr);
    let lease = lease_or_new(socket);
    if lease.is_null() {
        return Err(Refusal::MEMORY);
    }
    // SAFETY: the storage of a socket that is locked by this very `connect`.
    let held = unsafe { (&raw const (*lease).state).read_volatile() };
    if held & LEASE_HELD != 0 {
        if held & (LEASE_ANY | LEASE_CONNECTING) == 0 && destination.protocol() == TCP {
            // SAFETY: as above.
            note_earlier_failure(ctx, unsafe { &(*lease).destination });
        }
        // SAFETY: as above.
        if held & LEASE_ANY != 0 || unsafe { (*lease).destination } == *destination {
            // The same connection, tried again: the port is still bound and still ours.
            reopen(lease);
            return Ok(());
        }
    }
    // SAFETY: the socket of the context; host byte order.
    let bound = unsafe { (*socket).src_port };
    let index = bound.wrapping_sub(config.base);
    let mut extra = 0;
    let (seat, claim) = if bound == 0 {
        let seat = enter(ctx, config, destination)?;
        match claim_and_bind(ctx, family, config, destination.protocol(), seat) {
            Ok(claim) => (seat, claim),
            Err(refusal) => return Err(stand(config, seat, refusal)),
        }
    } else {
        let again = destination.protocol() == UDP && held & LEASE_HELD != 0;
        // The next sockets of the process will come here with a port of their own, too: to the first of several destinations, unless
        // another one refuses a port.
        if destination.protocol() == TCP || again {
            expect(ctx, destination, !again);
        }
        let adopted = if is_of(config, slots::template(destination), index) {
            match adopt(ctx, config, destination, index) {
                Ok(adopted) => adopted,
                Err(refusal) => {
                    if again {
                        expect(ctx, destination, true);
                    }
                    return Err(refusal);
                }
            }
        } else if destination.protocol() == UDP && is_of(config, TEMPLATE_UDP_ANY, index) {
            extra = LEASE_ANY;
            adopt(ctx, config, &Destination::ANY_UDP, index)?
        } else if config.flags & FLAG_STRICT != 0 {
            return Err(Refusal::OUTSIDE);
        } else {
            return Ok(());
        };
        count(counter::ADOPTIONS);
        end_bound(lease);
        adopted
    };
    if held & LEASE_HELD != 0 {
        // The socket was connected elsewhere before and keeps its port, towards a new destination.
        give_back(lease);
    }
    reopen(lease);
    if claim.from == seat.slot {
        extra |= LEASE_FRESH;
    }
    let destination = if extra & LEASE_ANY != 0 { &Destination::ANY_UDP } else { destination };
    note(ctx, lease, seat, claim.index, destination, extra);
    Ok(())
}

/// Whether a port, counted from the base, is one of a template.
#[inline(always)]
fn is_of(config: &Config, template: u32, index: u32) -> bool {
    let tables = Maps { words: config.words };
    index < config.words * 64 && bitmap::is_free(&tables, tables.geometry().free(template), index)
}

/// Claims the port that the program has bound itself.
#[inline(always)]
fn adopt(
    ctx: &SockAddrContext,
    config: &Config,
    destination: &Destination,
    index: u32,
) -> Result<(Seat, Claim), Refusal> {
    if let Some(seat) = take_grant(ctx, destination, index) {
        return Ok((seat, Claim { index, from: seat.owner_slot }));
    }
    let seat = enter(ctx, config, destination)?;
    let tables = Maps { words: config.words };
    let claim = match tables.claim_exact(seat, config.quota, index) {
        Err(_) if wake_port(ctx.sock_addr, config.base, config.words, seat, index) => {
            tables.claim_exact(seat, config.quota, index)
        }
        claim => claim,
    };
    match claim {
        Ok(claim) => Ok((seat, claim)),
        Err(refusal) => Err(stand(config, seat, refusal)),
    }
}

#[inline(always)]
fn stand(config: &Config, seat: Seat, refusal: Refusal) -> Refusal {
    slots::leave(&Maps { words: config.words }, seat);
    refusal
}

/// The socket is about to connect: whatever it was closed from is over.
#[inline(always)]
fn reopen(lease: *mut Lease) {
    // SAFETY: the storage of a socket of the context.
    unsafe { fetch_and(&raw mut (*lease).state, !LEASE_OF_CONNECTION) };
}
