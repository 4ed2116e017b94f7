//! BPF array maps in shared memory.

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
    ptr, slice,
    sync::atomic::{AtomicU64, Ordering},
};

/// The 64-bit elements of an array map that was created with `BPF_F_MMAPABLE`, shared with the kernel.
#[derive(Debug)]
pub(crate) struct Mapping {
    address: ptr::NonNull<AtomicU64>,
    count: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread, and is accessed atomically.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `count` elements.
    pub(crate) fn new(map: impl AsFd, count: usize) -> io::Result<Self> {
        let length = Self::length(count);
        // SAFETY: a new mapping at an address that the kernel chooses; it checks descriptor, length and permission.
        let address = unsafe {
            libc::mmap(
                ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                map.as_fd().as_raw_fd(),
                0,
            )
        };
        match ptr::NonNull::new(address) {
            Some(address) if address.as_ptr() != libc::MAP_FAILED => {
                Ok(Self { address: address.cast(), count })
            }
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn length(count: usize) -> usize {
        (count * size_of::<AtomicU64>()).next_multiple_of(rustix::param::page_size())
    }

    /// Returns the elements.
    pub(crate) fn words(&self) -> &[AtomicU64] {
        // SAFETY: page-aligned, at least `count` elements long, and mapped as long as `self` lives.
        unsafe { slice::from_raw_parts(self.address.as_ptr(), self.count) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping that `new` made; no reference into it outlives `self`.
        unsafe {
            libc::munmap(self.address.as_ptr().cast(), Self::length(self.count));
        }
    }
}

/// One 64-bit element of an array map, shared with the kernel.
#[derive(Debug)]
pub(crate) struct SharedWord {
    mapping: Mapping,
    index: usize,
}

impl SharedWord {
    /// Maps a map that was created with `BPF_F_MMAPABLE`, for its `index`th element.
    pub(crate) fn new(map: impl AsFd, index: usize) -> io::Result<Self> {
        Ok(Self { mapping: Mapping::new(map, index + 1)?, index })
    }

    fn word(&self) -> &AtomicU64 {
        &self.mapping.words()[self.index]
    }

    pub(crate) fn load(&self) -> u64 {
        self.word().load(Ordering::Acquire)
    }

    pub(crate) fn store(&self, value: u64) {
        self.word().store(value, Ordering::Release);
    }

    pub(crate) fn update(&self, change: impl Fn(u64) -> u64) {
        let _ = self.word().fetch_update(Ordering::AcqRel, Ordering::Acquire, |word| Some(change(word)));
    }
}

/// An array map of counters, shared with the kernel.
#[derive(Debug)]
pub(crate) struct SharedCounters(Mapping);

impl SharedCounters {
    /// Maps a map of `count` elements that was created with `BPF_F_MMAPABLE`.
    pub(crate) fn new(map: impl AsFd, count: u32) -> io::Result<Self> {
        Mapping::new(map, count as usize).map(Self)
    }

    /// The counters.
    pub(crate) fn words(&self) -> &[AtomicU64] {
        self.0.words()
    }

    pub(crate) fn add_one(&self, index: u32) {
        self.0.words()[index as usize].fetch_add(1, Ordering::AcqRel);
    }
}
