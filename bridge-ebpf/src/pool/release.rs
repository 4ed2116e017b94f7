//! Giving a port back.
//!
//! A tuple is free when its socket is closed as a file and in state CLOSE, in whichever order: closing the file comes
//! first when this side closes actively, CLOSE comes first when the peer resets. A socket that never left CLOSE (no
//! route) gets no callback about its state; a connection in FIN_WAIT has no file any more.

use aya_ebpf::{
    bindings::{bpf_sock, bpf_sock_ops},
    macros::{cgroup_sock, sock_ops},
    programs::{SockContext, SockOpsContext},
};
use bridge_common::pool::{
    LEASE_FILE_CLOSED, LEASE_HELD, LEASE_TCP_CLOSED, Lease, counter,
    slots::{self, Seat},
};
use bridge_ebpf::atomic::{fetch_and, fetch_or};

use crate::{
    maps::{POOL_CONFIG, count},
    sock::lease,
    tables::Maps,
};

const TCP_CLOSE: u32 = 7;
const IPPROTO_TCP: u32 = 6;
const BPF_SOCK_OPS_TCP_CONNECT_CB: u32 = 3;
const BPF_SOCK_OPS_STATE_CB: u32 = 10;
const BPF_SOCK_OPS_STATE_CB_FLAG: i32 = 1 << 2;

/// The last descriptor of a socket is closed.
#[cgroup_sock(sock_release)]
pub(crate) fn pool_release(ctx: SockContext) -> i32 {
    let lease = lease(ctx.sock);
    if !lease.is_null() {
        // SAFETY: the storage of the socket of the context; fields of the context are checked by the verifier.
        let (before, state, protocol) = unsafe {
            let before = fetch_or(&raw mut (*lease).state, LEASE_FILE_CLOSED);
            (before, (*ctx.sock).state, (*ctx.sock).protocol)
        };
        if before & LEASE_TCP_CLOSED != 0 || state == TCP_CLOSE || protocol != IPPROTO_TCP {
            give_back(lease);
        }
    }
    1
}

/// A TCP socket of a cgroup connects, or changes its state.
#[sock_ops]
pub(crate) fn pool_sock_ops(ctx: SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => {
            if !lease(sock_ops_socket(ctx.ops)).is_null() {
                let flags = ctx.cb_flags().cast_signed() | BPF_SOCK_OPS_STATE_CB_FLAG;
                // An error would mean that this kernel reports no states at all; the reconciler frees then.
                let _ = ctx.set_cb_flags(flags);
            }
        }
        BPF_SOCK_OPS_STATE_CB if ctx.arg(1) == TCP_CLOSE => {
            let lease = lease(sock_ops_socket(ctx.ops));
            if !lease.is_null() {
                // SAFETY: the storage of the socket of the context.
                let before = unsafe { fetch_or(&raw mut (*lease).state, LEASE_TCP_CLOSED) };
                if before & LEASE_FILE_CLOSED != 0 {
                    give_back(lease);
                }
            }
        }
        _ => {}
    }
    1
}

/// Gives a socket's port back, if it holds one; only one caller gets to.
#[inline(always)]
pub(crate) fn give_back(lease: *mut Lease) {
    // SAFETY: the storage of a socket. Once LEASE_HELD is cleared no one else reads or writes the other fields.
    let (before, seat, index) = unsafe {
        let before = fetch_and(&raw mut (*lease).state, !LEASE_HELD);
        (before, Seat { slot: (*lease).slot, owner_slot: (*lease).owner_slot }, (*lease).index)
    };
    if before & LEASE_HELD == 0 {
        return;
    }
    if let Some(config) = POOL_CONFIG.get(0) {
        slots::release(&Maps { words: config.words }, seat, index);
        count(counter::RELEASES);
    }
}

#[inline(always)]
fn sock_ops_socket(ops: *mut bpf_sock_ops) -> *mut bpf_sock {
    // SAFETY: a context pointer; null for a socket that is not a full one.
    unsafe { (*ops).__bindgen_anon_2.sk }
}
