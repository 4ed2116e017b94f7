//! Creation of sockets of protocols that leave without a connect hook.

use aya_ebpf::{macros::cgroup_sock, programs::SockContext};
use bridge_common::{
    pool::{FLAG_STRICT, Refusal},
    protocol::UDP_LITE,
};

use crate::{
    maps::POOL_CONFIG,
    refuse::{PASS, refuse_socket},
};

/// `socket`: refuses UDP-Lite while the pool is strict. Its `connect` runs no hook (`udplite_prot` has no `pre_connect`,
/// net/ipv4/udplite.c), and its port is chosen there.
#[cgroup_sock(sock_create)]
pub(crate) fn pool_create(ctx: SockContext) -> i32 {
    // SAFETY: the socket of the context; the verifier checks the access.
    if unsafe { (*ctx.sock).protocol } != u32::from(UDP_LITE) {
        return PASS;
    }
    match POOL_CONFIG.get(0) {
        Some(config) if config.flags & FLAG_STRICT != 0 => refuse_socket(&ctx, Refusal::PROTOCOL),
        _ => PASS,
    }
}
