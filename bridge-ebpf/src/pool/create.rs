//! Creation of sockets of protocols that leave without a connect hook.

use aya_ebpf::{macros::cgroup_sock, programs::SockContext};
use bridge_common::pool::{FLAG_STRICT, Refusal, UNSERVED};

use crate::{
    maps::POOL_CONFIG,
    refuse::{PASS, refuse_socket},
};

/// `socket`: refuses UDP-Lite, SCTP and DCCP while the pool is strict. Their `connect` runs no hook (`udplite_prot` has no
/// `pre_connect`, net/ipv4/udplite.c) or one that the pool does not serve, and their port is chosen there.
#[cgroup_sock(sock_create)]
pub(crate) fn pool_create(ctx: SockContext) -> i32 {
    // SAFETY: the socket of the context; the verifier checks the access.
    let protocol = unsafe { (*ctx.sock).protocol };
    if !UNSERVED.iter().any(|unserved| protocol == u32::from(*unserved)) {
        return PASS;
    }
    match POOL_CONFIG.get(0) {
        Some(config) if config.flags & FLAG_STRICT != 0 => refuse_socket(&ctx, Refusal::PROTOCOL),
        _ => PASS,
    }
}
