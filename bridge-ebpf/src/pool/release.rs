//! Giving a port back.
//!
//! A tuple is free when its socket is closed as a file and in state CLOSE, in whichever order: closing the file comes
//! first when this side closes actively, CLOSE comes first when the peer resets. A socket that never left CLOSE (no
//! route) gets no callback about its state; a connection in FIN_WAIT has no file any more. A subflow of MPTCP never has
//! one.

use aya_ebpf::{
    Global,
    bindings::{bpf_sock, bpf_sock_ops},
    helpers::generated::{bpf_load_hdr_opt, bpf_skc_to_mptcp_sock},
    macros::{cgroup_sock, sock_ops},
    programs::{SockContext, SockOpsContext},
};
use bridge_common::pool::{
    LEASE_CONNECTING, LEASE_FILE_CLOSED, LEASE_FRESH, LEASE_HELD, LEASE_TCP_CLOSED, LEASE_TIME_WAIT,
    LEASE_TIMESTAMPS, Lease, counter,
    slots::{self, Seat},
    uses::SOCKET,
};
use bridge_common::protocol::TCP;
use bridge_ebpf::atomic::{fetch_and, fetch_or};

use crate::{
    maps::{POOL_CONFIG, count},
    refuse::note_failure,
    rest::{avoid, rest},
    sock::lease,
    tables::{Maps, pool_put_back, pool_unclaim},
    uses::{add, end_bound},
};

// States of TCP (include/net/tcp_states.h).
const TCP_FIN_WAIT2: u32 = 5;
const TCP_CLOSE: u32 = 7;
const TCP_CLOSING: u32 = 11;
/// The option of RFC 7323, and its length.
const TCPOPT_TIMESTAMP: u8 = 8;
const TCPOLEN_TIMESTAMP: usize = 10;
const BPF_SOCK_OPS_TCP_CONNECT_CB: u32 = 3;
const BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB: u32 = 4;
const BPF_SOCK_OPS_STATE_CB: u32 = 10;
const BPF_SOCK_OPS_STATE_CB_FLAG: i32 = 1 << 2;

/// Whether the kernel has MPTCP and `bpf_skc_to_mptcp_sock` (Linux 5.19). Set by the loader.
#[unsafe(no_mangle)]
static POOL_HAS_MPTCP: Global<u8> = Global::new(0);

/// How long, in nanoseconds, the kernel may keep a tuple in TIME_WAIT. Set by the loader, which knows the tick.
#[unsafe(no_mangle)]
static POOL_REST_NS: Global<u64> = Global::new(0);

/// The last descriptor of a socket is closed.
#[cgroup_sock(sock_release)]
pub(crate) fn pool_release(ctx: SockContext) -> i32 {
    let lease = lease(ctx.sock);
    if !lease.is_null() {
        end_bound(lease);
        // SAFETY: the storage of the socket of the context; fields of the context are checked by the verifier.
        let (before, state, protocol) = unsafe {
            let before = fetch_or(&raw mut (*lease).state, LEASE_FILE_CLOSED);
            (before, (*ctx.sock).state, (*ctx.sock).protocol)
        };
        let silent = before & LEASE_CONNECTING == 0;
        if protocol == u32::from(TCP) && before & LEASE_HELD != 0 && silent && state == TCP_CLOSE {
            // SAFETY: the storage of the socket of the context.
            note_failure(&ctx, unsafe { &(*lease).destination });
        }
        // Without a SYN there is no callback: the socket listens by now, or its SYN was to go with the first data.
        if before & LEASE_TCP_CLOSED != 0 || state == TCP_CLOSE || protocol != u32::from(TCP) || silent {
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
            let lease = lease(sock_ops_socket(ctx.ops));
            if !lease.is_null() {
                // SAFETY: the storage of the socket of the context.
                unsafe {
                    note_source(&ctx, lease);
                    fetch_and(&raw mut (*lease).state, !LEASE_FRESH);
                }
                let own = if is_subflow(sock_ops_socket(ctx.ops)) { LEASE_FILE_CLOSED } else { 0 };
                // SAFETY: the storage of the socket of the context.
                unsafe { fetch_or(&raw mut (*lease).state, LEASE_CONNECTING | own) };
                let flags = ctx.cb_flags().cast_signed() | BPF_SOCK_OPS_STATE_CB_FLAG;
                // An error would mean that this kernel reports no states at all; the reconciler frees then.
                let _ = ctx.set_cb_flags(flags);
            }
        }
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => {
            let lease = lease(sock_ops_socket(ctx.ops));
            if !lease.is_null() && has_timestamps(&ctx) {
                // SAFETY: the storage of the socket of the context.
                unsafe { fetch_or(&raw mut (*lease).state, LEASE_TIMESTAMPS) };
            }
        }
        BPF_SOCK_OPS_STATE_CB if ctx.arg(1) == TCP_CLOSE => {
            let lease = lease(sock_ops_socket(ctx.ops));
            if !lease.is_null() {
                // `tcp_time_wait` takes a socket from these two states; the peer's FIN has come, or is waited for.
                let time_wait = matches!(ctx.arg(0), TCP_FIN_WAIT2 | TCP_CLOSING);
                let closed = LEASE_TCP_CLOSED | if time_wait { LEASE_TIME_WAIT } else { 0 };
                // SAFETY: the storage of the socket of the context.
                let before = unsafe { fetch_or(&raw mut (*lease).state, closed) };
                if before & LEASE_FILE_CLOSED != 0 {
                    give_back(lease);
                }
            }
        }
        _ => {}
    }
    1
}

/// Gives a socket's port back, if it holds one; only one caller gets to. A function: its frame of the stack ends before
/// others begin.
#[inline(never)]
pub(crate) extern "C" fn give_back(lease: *mut Lease) {
    // SAFETY: the storage of a socket. Once LEASE_HELD is cleared no one else reads or writes the other fields.
    let (before, seat, index) = unsafe {
        let before = fetch_and(&raw mut (*lease).state, !(LEASE_HELD | LEASE_FRESH));
        (before, Seat { slot: (*lease).slot, owner_slot: (*lease).owner_slot }, (*lease).index)
    };
    if before & LEASE_HELD == 0 {
        return;
    }
    if let Some(config) = POOL_CONFIG.get(0) {
        // SAFETY: as above.
        let protocol = unsafe { (*lease).destination.protocol() };
        let tcp = protocol == TCP;
        count(counter::RELEASES);
        add(index, protocol, SOCKET.wrapping_neg());
        let silent = tcp && before & LEASE_CONNECTING == 0;
        if silent && before & LEASE_FRESH != 0 {
            // No packet has left from the port: it is as free as it was.
            let (tables, packed) =
                (Maps { words: config.words }, u64::from(seat.owner_slot) << 32 | u64::from(seat.slot));
            pool_unclaim(config.words, packed, config.quota, index, seat.slot);
            return slots::leave(&tables, seat);
        }
        let rests = if before & (LEASE_TIME_WAIT | LEASE_TIMESTAMPS) == LEASE_TIME_WAIT {
            rest(config.words, lease, seat, index, POOL_REST_NS.load())
        } else {
            silent && avoid(config.words, lease, seat, index)
        };
        if !rests {
            pool_put_back(config.words, seat.slot, seat.owner_slot, index);
        }
    }
}

/// Notes the address that a connection leaves from, and the interface that its socket is bound to.
///
/// # Safety
/// `lease` is the storage of the socket of the context.
#[inline(always)]
unsafe fn note_source(ctx: &SockOpsContext, lease: *mut Lease) {
    let socket = sock_ops_socket(ctx.ops);
    let ops = ctx.ops;
    // SAFETY: the caller's promise, and a context; volatile, since it allows single 32-bit reads but no wider ones. Each field
    // is read on every path: its offset must be a constant.
    unsafe {
        let v4 = (&raw const (*ops).local_ip4).read_volatile();
        let v6 = [
            (&raw const (*ops).local_ip6[0]).read_volatile(),
            (&raw const (*ops).local_ip6[1]).read_volatile(),
            (&raw const (*ops).local_ip6[2]).read_volatile(),
            (&raw const (*ops).local_ip6[3]).read_volatile(),
        ];
        let mapped = [0, 0, u32::from_ne_bytes([0, 0, 0xff, 0xff]), v4];
        let words = if (*lease).destination.is_v4() { mapped } else { v6 };
        let source = (&raw mut (*lease).source).cast::<[u8; 4]>();
        source.write(words[0].to_ne_bytes());
        source.add(1).write(words[1].to_ne_bytes());
        source.add(2).write(words[2].to_ne_bytes());
        source.add(3).write(words[3].to_ne_bytes());
        (*lease).device = if socket.is_null() { 0 } else { (*socket).bound_dev_if };
    }
}

/// Whether a socket is a subflow of MPTCP: the kernel's own, without a descriptor whose end [`pool_release`] would see.
#[inline(always)]
pub(crate) fn is_subflow(socket: *mut bpf_sock) -> bool {
    if POOL_HAS_MPTCP.load() == 0 || socket.is_null() {
        return false;
    }
    // SAFETY: a socket of a context of a program type that has the helper.
    !unsafe { bpf_skc_to_mptcp_sock(socket.cast()) }.is_null()
}

/// Whether the SYN-ACK that this callback is about has a timestamp. The kernel only keeps it if our SYN had one, too.
#[inline(always)]
fn has_timestamps(ctx: &SockOpsContext) -> bool {
    let mut option = [0_u8; TCPOLEN_TIMESTAMP];
    option[0] = TCPOPT_TIMESTAMP;
    // SAFETY: the context of a program type that has the helper, and a buffer of the length given.
    let found = unsafe { bpf_load_hdr_opt(ctx.ops, option.as_mut_ptr().cast(), TCPOLEN_TIMESTAMP as u32, 0) };
    found > 0
}

#[inline(always)]
fn sock_ops_socket(ops: *mut bpf_sock_ops) -> *mut bpf_sock {
    // SAFETY: a context pointer; null for a socket that is not a full one.
    unsafe { (*ops).__bindgen_anon_2.sk }
}
