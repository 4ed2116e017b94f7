//! Counts the sockets that have a port.

use aya_ebpf::{EbpfContext, programs::SockAddrContext};
use bridge_common::{
    pool::{
        Destination, LEASE_BOUND, Lease, Owner, TEMPLATE_EMPTY, TEMPLATE_TCP, shares,
        uses::{self, KEPT, SOCKET},
    },
    protocol::TCP,
};
use bridge_ebpf::atomic::{fetch_add, fetch_and, fetch_or};

use crate::{
    maps::{POOL_BOUND_TO, POOL_DESTINATIONS, POOL_OWNERS, POOL_USES},
    sock::netns_cookie,
    tables::{pool_extend_share, pool_reduce_share},
};

/// The word of a port; see [`bridge_common::pool::uses`].
#[inline(always)]
pub(crate) fn load(index: u32, protocol: u8) -> u64 {
    // SAFETY: a pointer to a map's value; an aligned 64-bit load is one instruction.
    POOL_USES.get_ptr(uses::word(index, protocol)).map_or(0, |word| unsafe { word.read_volatile() })
}

/// Adds to the word of a port; returns its former value.
#[inline(always)]
pub(crate) fn add(index: u32, protocol: u8, n: u64) -> u64 {
    // SAFETY: a pointer to a map's value.
    POOL_USES.get_ptr_mut(uses::word(index, protocol)).map_or(0, |word| unsafe { fetch_add(word, n) })
}

/// Counts one more socket with a port that its destination keeps from others.
#[inline(always)]
pub(crate) fn add_connection(index: u32, protocol: u8) {
    if let Some(word) = POOL_USES.get_ptr_mut(uses::word(index, protocol)) {
        // SAFETY: a pointer to a map's value.
        unsafe {
            fetch_add(word, SOCKET);
            fetch_or(word, KEPT);
        }
    }
}

/// Counts one more TCP socket that has a port, by [`add`], and no destination.
///
/// # Safety
/// `lease` is the storage of the socket of the context, which holds no port.
#[inline(always)]
pub(crate) unsafe fn note_bound(ctx: &SockAddrContext, lease: *mut Lease, index: u32) {
    // SAFETY: the caller's promise.
    unsafe {
        (*lease).netns_cookie = netns_cookie(ctx);
        (*lease).index = index;
        fetch_or(&raw mut (*lease).state, LEASE_BOUND);
    }
}

/// Undoes [`note_bound`], if it was done: the socket has a destination, another port, or is closed. A function: its frame of the
/// stack ends before others begin.
#[inline(never)]
pub(crate) extern "C" fn end_bound(lease: *mut Lease) {
    // SAFETY: the storage of a socket; only one caller gets to the rest.
    unsafe {
        if fetch_and(&raw mut (*lease).state, !LEASE_BOUND) & LEASE_BOUND != 0 {
            add((*lease).index, TCP, SOCKET.wrapping_neg());
            pool_reduce_share(shares::bound((*lease).netns_cookie), 1);
        }
    }
}

/// Makes sure that sockets without a destination leave half of the ports to others of their namespace: each may be a listener,
/// whose port no other socket can bind. `false`: there are as many already.
#[inline(always)]
pub(crate) fn begin_bound(netns_cookie: u64, ports: u64) -> bool {
    let key = shares::bound(netns_cookie);
    let before = pool_extend_share(key);
    // One below zero is an error of counting, which the agent corrects.
    if before.cast_signed() < 0 || 2 * before < ports {
        return true;
    }
    pool_reduce_share(key, 1);
    false
}

/// Key of `POOL_BOUND_TO` for a process in a network namespace; process 0: any. That two may have the same does little harm.
#[inline(always)]
pub(crate) fn process(netns_cookie: u64, process: u32, protocol: u8) -> u64 {
    netns_cookie ^ u64::from(process) << 32 ^ u64::from(protocol) << 56
}

/// The slots of the destination under the first of two keys of `POOL_BOUND_TO`, that of the namespace's warm ports in the upper
/// half. Unknown: as a destination whose ports are all free.
#[inline(never)]
pub(crate) extern "C" fn expected(netns_cookie: u64, key: u64, other_key: u64) -> u64 {
    let none = u64::from(TEMPLATE_EMPTY) << 32 | u64::from(TEMPLATE_TCP);
    // SAFETY: a copy that may be torn misleads the choice of a port, no more.
    let known = unsafe { POOL_BOUND_TO.get(key).or_else(|| POOL_BOUND_TO.get(other_key)) };
    let Some(destination) = known else { return none };
    // SAFETY: as in `Tables::destination_slot`.
    let Some(slot) = (unsafe { POOL_DESTINATIONS.get(destination) }).copied() else { return none };
    let owner = Owner { netns_cookie, slot, padding: 0 };
    // SAFETY: as above.
    let owner_slot = unsafe { POOL_OWNERS.get(owner) }.copied().unwrap_or(TEMPLATE_EMPTY);
    u64::from(owner_slot) << 32 | u64::from(slot)
}

/// Notes the destination of a socket that had its port before; unless `replaces`, only if none is noted.
#[inline(always)]
pub(crate) fn expect(ctx: &SockAddrContext, destination: &Destination, replaces: bool) {
    note_expected(netns_cookie(ctx), ctx.tgid(), destination, u64::from(!replaces));
}

/// [`expect`], as a function: its frame of the stack ends before others begin. An error costs a good guess.
#[inline(never)]
extern "C" fn note_expected(netns_cookie: u64, pid: u32, destination: &Destination, flags: u64) {
    // BPF_ANY is 0, BPF_NOEXIST 1.
    let protocol = destination.protocol();
    let _ = POOL_BOUND_TO.insert(process(netns_cookie, pid, protocol), destination, flags);
    let _ = POOL_BOUND_TO.insert(process(netns_cookie, 0, protocol), destination, flags);
}
