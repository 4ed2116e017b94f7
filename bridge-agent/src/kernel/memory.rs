//! Limits and memory of this process.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Limits the malloc arenas to two. By default each of many short-lived threads would leave an arena behind, up to eight per
/// CPU, with its free memory. Call it before a second thread exists.
pub fn limit_arenas() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes no pointers; sets a limit of the allocator.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 2);
    }
}

/// Raises the soft limit of descriptors to the hard one: each pod needs two or three for its links, so 1024 are too few.
pub fn raise_descriptor_limit() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        tracing::warn!(%error, "cannot raise the limit of open descriptors");
    }
}

/// Returns free pages of the heap to the kernel. Call it after work that needed much memory for a moment: compiling, a first
/// sync of many routes, an answer with many rules.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes no pointers; returns free pages of the heap.
    unsafe {
        libc::malloc_trim(0);
    }
}
