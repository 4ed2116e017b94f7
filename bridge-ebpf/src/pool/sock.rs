//! What the hooks ask of a socket.

use core::ptr;

use aya_ebpf::{
    EbpfContext,
    bindings::{bpf_sock, bpf_sock_addr},
    btf_maps::lpm_trie::Key,
    cty::c_void,
    helpers::generated::{bpf_get_netns_cookie, bpf_setsockopt, bpf_sk_storage_get},
    programs::SockAddrContext,
};
use bridge_common::{
    pool::{Destination, Lease},
    protocol::{TCP, UDP},
};

use crate::maps::{POOL_LEASES, POOL_NETWORKS};

pub(crate) const AF_INET: u32 = 2;
pub(crate) const AF_INET6: u32 = 10;
const SOL_SOCKET: i32 = 1;
const SO_REUSEADDR: i32 = 2;
const BPF_SK_STORAGE_GET_F_CREATE: u64 = 1;

/// `BPF_F_CURRENT_NETNS`.
pub(crate) const CURRENT_NETNS: u64 = u64::MAX;
/// Sizes of `struct bpf_sock_tuple`: remote address, local address, remote port, local port.
pub(crate) const TUPLE_V4: u32 = 12;
pub(crate) const TUPLE_V6: u32 = 36;

/// `struct bpf_sock_tuple`, of either family.
#[repr(C)]
#[derive(Default)]
pub(crate) struct Tuple {
    pub(crate) words: [u32; 9],
}

/// Which family a hook is for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
}

/// The protocol, if it is one the pool is for.
#[inline(always)]
pub(crate) fn protocol(address: *const bpf_sock_addr) -> Option<u8> {
    // SAFETY: a context pointer; the verifier checks the access.
    match unsafe { (*address).protocol } {
        6 => Some(TCP),
        17 => Some(UDP),
        _ => None,
    }
}

/// The destination in the arguments of a hook. `None`: not one the pool is for.
///
/// Port 0 is none: `getaddrinfo` connects to it to learn the source address.
#[inline(always)]
pub(crate) fn destination(address: *const bpf_sock_addr, family: Family) -> Option<Destination> {
    let protocol = protocol(address)?;
    // SAFETY: as in `protocol`. The port is in network byte order in the low half.
    let port = (unsafe { (*address).user_port } as u16).to_ne_bytes();
    if port == [0, 0] {
        return None;
    }
    if family == Family::V4 {
        // SAFETY: as in `protocol`.
        let ip = unsafe { (*address).user_ip4 }.to_ne_bytes();
        return Some(Destination::from_network_v4(ip, port, protocol));
    }
    let mut ip = [0; 16];
    let mut part = 0;
    while part < 4 {
        // SAFETY: as in `protocol`; volatile, since the context allows single 32-bit reads but no wider ones.
        let word = unsafe { ptr::addr_of!((*address).user_ip6[part]).read_volatile() }.to_ne_bytes();
        ip[part * 4] = word[0];
        ip[part * 4 + 1] = word[1];
        ip[part * 4 + 2] = word[2];
        ip[part * 4 + 3] = word[3];
        part += 1;
    }
    Some(Destination::from_network(ip, port, protocol))
}

/// Whether connections to a destination use the pool.
#[inline(always)]
pub(crate) fn is_in_networks(destination: &Destination) -> bool {
    covered(destination) != 0
}

/// [`is_in_networks`], as a function: its frame of the stack ends before others begin.
#[inline(never)]
extern "C" fn covered(destination: &Destination) -> u64 {
    u64::from(POOL_NETWORKS.get(&Key::new(128, destination.address())).is_some())
}

/// The socket behind a hook.
#[inline(always)]
pub(crate) fn socket(address: *const bpf_sock_addr) -> *mut bpf_sock {
    // SAFETY: a context pointer; `sk` is the only use of the union.
    unsafe { (*address).__bindgen_anon_1.sk }
}

/// The socket's storage, or null.
#[inline(always)]
pub(crate) fn lease(socket: *mut bpf_sock) -> *mut Lease {
    if socket.is_null() {
        return ptr::null_mut();
    }
    // SAFETY: a socket from a context, and a storage map.
    unsafe { bpf_sk_storage_get(leases(), socket.cast(), ptr::null_mut(), 0) }.cast()
}

/// The socket's storage, made if there is none (all zeros: nothing held). Null: no memory.
#[inline(always)]
pub(crate) fn lease_or_new(socket: *mut bpf_sock) -> *mut Lease {
    // SAFETY: as in `lease`.
    unsafe { bpf_sk_storage_get(leases(), socket.cast(), ptr::null_mut(), BPF_SK_STORAGE_GET_F_CREATE) }
        .cast()
}

#[inline(always)]
fn leases() -> *mut c_void {
    ptr::addr_of!(POOL_LEASES).cast_mut().cast()
}

/// `SO_NETNS_COOKIE` of the socket.
#[inline(always)]
pub(crate) fn netns_cookie(ctx: &impl EbpfContext) -> u64 {
    // SAFETY: the context of a program type that has the helper.
    unsafe { bpf_get_netns_cookie(ctx.as_ptr()) }
}

/// Lets other sockets of the namespace bind the same port, towards other destinations. Before Linux 6.1 the kernel
/// refuses, and a port serves one destination per namespace.
#[inline(always)]
pub(crate) fn reuse_address(ctx: &SockAddrContext) {
    let mut on = 1_i32;
    // SAFETY: a context of a program type that has the helper, and an option value of the size said.
    unsafe { bpf_setsockopt(ctx.as_ptr(), SOL_SOCKET, SO_REUSEADDR, ptr::from_mut(&mut on).cast(), 4) };
}

/// Replaces the port of a `bind`.
#[inline(always)]
pub(crate) fn set_port(ctx: &SockAddrContext, port: u16) {
    // SAFETY: a context pointer; the field is in network byte order, and this hook may write it.
    unsafe { (*ctx.sock_addr).user_port = u32::from(port.to_be()) };
}
