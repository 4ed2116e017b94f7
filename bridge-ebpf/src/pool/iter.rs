//! Reports the sockets that hold a port to the agent, over all namespaces.

use aya_ebpf::{
    bindings::seq_file,
    cty::{c_int, c_void},
    helpers::generated::bpf_seq_write,
};
use bridge_common::pool::Lease;

/// `struct bpf_iter_meta` (include/linux/bpf.h).
#[repr(C)]
struct IterMeta {
    seq: *mut seq_file,
    session_id: u64,
    seq_num: u64,
}

/// `struct bpf_iter__bpf_sk_storage_map` (net/core/bpf_sk_storage.c).
#[repr(C)]
struct IterContext {
    meta: *const IterMeta,
    map: *const c_void,
    sk: *const c_void,
    value: *mut c_void,
}

/// Writes the storage of each socket, a [`Lease`] each.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/bpf_sk_storage_map")]
extern "C" fn pool_walk(ctx: *const IterContext) -> c_int {
    // SAFETY: the context of this iterator; the verifier checks every access.
    let value = unsafe { (*ctx).value };
    if !value.is_null() {
        // SAFETY: as above. A full buffer makes the kernel call again for the same socket.
        unsafe { bpf_seq_write((*(*ctx).meta).seq, value, size_of::<Lease>() as u32) };
    }
    0
}
