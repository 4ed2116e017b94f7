//! The words of the pool, in memory that the kernel shares.

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
    ptr::{self, NonNull},
    slice,
    sync::atomic::{AtomicU64, Ordering},
};

use bridge_common::pool::bitmap::Memory;

/// The words of the pool.
#[derive(Debug)]
pub struct Words {
    at: NonNull<AtomicU64>,
    count: usize,
    mapped: bool,
}

// SAFETY: the memory is only reached through atomics, and stays where it is until drop.
unsafe impl Send for Words {}
// SAFETY: as above.
unsafe impl Sync for Words {}

impl Words {
    /// Maps the array `map` of `count` 64-bit elements, made with `BPF_F_MMAPABLE`.
    ///
    /// # Errors
    /// What `mmap` says.
    pub fn map(map: impl AsFd, count: u32) -> io::Result<Self> {
        let count = count as usize;
        // SAFETY: a new shared mapping; the kernel checks descriptor, length and permission.
        let at = unsafe {
            libc::mmap(
                ptr::null_mut(),
                count * size_of::<u64>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                map.as_fd().as_raw_fd(),
                0,
            )
        };
        match NonNull::new(at) {
            Some(at) if at.as_ptr() != libc::MAP_FAILED => Ok(Self { at: at.cast(), count, mapped: true }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// So many words, all 0, that no kernel knows of.
    #[must_use]
    pub fn private(count: u32) -> Self {
        let words: Box<[AtomicU64]> = (0..count).map(|_| AtomicU64::new(0)).collect();
        let count = words.len();
        let at = NonNull::from(Box::leak(words)).cast();
        Self { at, count, mapped: false }
    }

    fn all(&self) -> &[AtomicU64] {
        // SAFETY: `count` words lie at `at`, for as long as `self` does.
        unsafe { slice::from_raw_parts(self.at.as_ptr(), self.count) }
    }

    fn word(&self, at: u32) -> &AtomicU64 {
        &self.all()[at as usize]
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        if self.mapped {
            // SAFETY: the mapping that `map` made; no reference into it outlives `self`.
            unsafe { libc::munmap(self.at.as_ptr().cast(), self.count * size_of::<u64>()) };
        } else {
            let words = ptr::slice_from_raw_parts_mut(self.at.as_ptr(), self.count);
            // SAFETY: the box that `private` leaked.
            drop(unsafe { Box::from_raw(words) });
        }
    }
}

impl Memory for Words {
    fn load(&self, at: u32) -> u64 {
        self.word(at).load(Ordering::SeqCst)
    }

    fn store(&self, at: u32, value: u64) {
        self.word(at).store(value, Ordering::SeqCst);
    }

    fn fetch_or(&self, at: u32, bits: u64) -> u64 {
        self.word(at).fetch_or(bits, Ordering::SeqCst)
    }

    fn fetch_and(&self, at: u32, bits: u64) -> u64 {
        self.word(at).fetch_and(bits, Ordering::SeqCst)
    }

    fn fetch_add(&self, at: u32, n: u64) -> u64 {
        self.word(at).fetch_add(n, Ordering::SeqCst)
    }
}
