//! The words of the pool, in memory that the kernel shares.

use std::{
    io,
    os::fd::AsFd,
    sync::atomic::{AtomicU64, Ordering},
};

use bridge_common::pool::bitmap::Memory;

use crate::kernel::mapping::Mapping;

/// The words of the pool.
#[derive(Debug)]
pub(crate) enum Words {
    /// Shared with the kernel.
    Shared(Mapping),
    /// Of this process alone.
    #[cfg(test)]
    Private(Box<[AtomicU64]>),
}

impl Words {
    /// Maps an array map of `count` 64-bit elements that was created with `BPF_F_MMAPABLE`.
    ///
    /// # Errors
    /// Of `mmap(2)`.
    pub(crate) fn map(map: impl AsFd, count: u32) -> io::Result<Self> {
        Mapping::new(map, count as usize).map(Self::Shared)
    }

    /// Creates `count` words, all 0, in private memory.
    #[cfg(test)]
    pub(crate) fn private(count: u32) -> Self {
        Self::Private((0..count).map(|_| AtomicU64::new(0)).collect())
    }

    fn word(&self, at: u32) -> &AtomicU64 {
        let words = match self {
            Self::Shared(mapping) => mapping.words(),
            #[cfg(test)]
            Self::Private(words) => words,
        };
        &words[at as usize]
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
