//! Claiming a port for a socket and binding it.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{bpf_sock, sockaddr},
    helpers::{
        bpf_get_current_comm,
        generated::{bpf_bind, bpf_get_current_cgroup_id, bpf_ktime_get_ns},
    },
    programs::SockAddrContext,
};
use bridge_common::pool::{
    Config, Destination, Grant, LEASE_HELD, Lease, MAX_SLOTS, MAX_WORDS, Refusal, counter,
    slots::{self, Seat},
};
use bridge_ebpf::atomic::fetch_or;

use crate::{
    maps::{POOL_GRANTS, count},
    rest::pool_wake,
    sock::{AF_INET, AF_INET6, Family, netns_cookie, reuse_address},
    tables::{Maps, pool_unclaim},
};

/// How many ports are tried when sockets outside the pool have bound some exclusively.
const BIND_TRIES: usize = 12;
/// How many of these may go to ports whose last connection is just about to end.
const SETTLE_TRIES: usize = 4;

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

/// Claims some port and binds the socket to it.
#[inline(always)]
pub(crate) fn claim_and_bind(
    ctx: &SockAddrContext,
    family: Family,
    config: &Config,
    seat: Seat,
) -> Result<u32, Refusal> {
    let tables = Maps { words: config.words };
    reuse_address(ctx);
    // Ports that other programs have bound, and their slots: they stay claimed until a free one is found, so that no
    // try goes to the same port again.
    let mut bound_by_others = [[0_u16; 2]; BIND_TRIES];
    let mut others = 0;
    let mut tries = 0;
    let result = loop {
        // A warm port that another program has bound would be found warm again at once.
        let claim = match slots::claim(&tables, seat, tries > 0) {
            Ok(claim) => claim,
            Err(_) if others != 0 => break Err(Refusal::BIND),
            Err(refusal) => {
                let resting = pool_wake(config.words, seat.slot) != 0;
                match slots::claim(&tables, seat, false) {
                    Ok(claim) => claim,
                    Err(_) if resting => break Err(Refusal::RESTING),
                    Err(_) => break Err(refusal),
                }
            }
        };
        // If nothing else is free it has to be this one.
        if tries < SETTLE_TRIES && slots::settling(&tables, seat, claim) {
            pool_unclaim(config.words, seat.owner_slot, claim.index, claim.from);
        } else {
            let port = (config.base + claim.index) as u16;
            if bind(ctx, family, port) == 0 {
                break Ok(claim.index);
            }
            count(counter::BIND_RETRIES);
            let Some(place) = bound_by_others.get_mut(others) else { break Err(Refusal::BIND) };
            *place = [claim.index as u16, claim.from as u16];
            others += 1;
        }
        // At the end, and not at the beginning: on Linux 6.1 no loop may go back by an instruction that is no jump.
        tries += 1;
        if tries == BIND_TRIES {
            break Err(Refusal::BIND);
        }
    };
    for [index, from] in bound_by_others.into_iter().take(others) {
        pool_unclaim(config.words, seat.owner_slot, index.into(), from.into());
    }
    result
}

/// Takes over the port that the agent has granted to this namespace, together with the seat that the grant has.
#[inline(always)]
pub(crate) fn take_grant(ctx: &SockAddrContext, destination: &Destination, index: u32) -> Option<Seat> {
    let grant = Grant::new(*destination, index);
    // SAFETY: the value is written once, at insertion, and copied before anything is removed.
    let granted = unsafe { POOL_GRANTS.get(grant) }.copied()?;
    if granted.netns_cookie != netns_cookie(ctx) {
        return None;
    }
    // The removal decides: the agent may be ending the grant at this moment.
    POOL_GRANTS.remove(grant).ok()?;
    Some(Seat { slot: granted.slot, owner_slot: granted.owner_slot })
}

/// Records the port in the socket's storage. The last step of a claim.
#[inline(always)]
pub(crate) fn note(
    ctx: &SockAddrContext,
    lease: *mut Lease,
    seat: Seat,
    index: u32,
    destination: &Destination,
    extra: u64,
) {
    // SAFETY: `lease` is the storage of a socket that is locked by the system call that runs this hook; `state` alone is
    // touched from elsewhere, and as long as LEASE_HELD is not set no one acts on the rest.
    unsafe {
        (*lease).netns_cookie = netns_cookie(ctx);
        (*lease).cgroup_id = bpf_get_current_cgroup_id();
        (*lease).since_ns = bpf_ktime_get_ns();
        (*lease).slot = seat.slot;
        (*lease).owner_slot = seat.owner_slot;
        (*lease).index = index;
        (*lease).pid = ctx.tgid();
        (*lease).uid = ctx.uid();
        (*lease).destination = *destination;
        (*lease).comm = bpf_get_current_comm().unwrap_or_default();
        fetch_or(&raw mut (*lease).state, LEASE_HELD | extra);
    }
    count(counter::CLAIMS);
}

/// Binds the socket to its source address, if it has one, and `port` (host byte order).
#[inline(always)]
fn bind(ctx: &SockAddrContext, family: Family, port: u16) -> i64 {
    let socket: *const bpf_sock = crate::sock::socket(ctx.sock_addr);
    match family {
        Family::V4 => {
            let mut address = SockaddrIn {
                family: AF_INET as u16,
                port: port.to_be_bytes(),
                // SAFETY: the socket of the context; the verifier checks the access.
                address: unsafe { (*socket).src_ip4 },
                zero: [0; 8],
            };
            let at = (&raw mut address).cast::<sockaddr>();
            // SAFETY: an initialised address of the size said.
            unsafe { bpf_bind(ctx.sock_addr, at, size_of::<SockaddrIn>() as i32) }
        }
        Family::V6 => {
            let mut address = SockaddrIn6 {
                family: AF_INET6 as u16,
                port: port.to_be_bytes(),
                flow_info: 0,
                // SAFETY: as above; volatile, since a socket allows single 32-bit reads but no wider ones.
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
            let at = (&raw mut address).cast::<sockaddr>();
            // SAFETY: an initialised address of the size said.
            unsafe { bpf_bind(ctx.sock_addr, at, size_of::<SockaddrIn6>() as i32) }
        }
    }
}
