//! Shared by every object: licence, panic handler, atomic operations, protocol numbers.

#![no_std]
#![feature(asm_experimental_arch)]

/// Declares the licence of an object: helpers for tracing are GPL only.
#[macro_export]
macro_rules! license {
    () => {
        #[unsafe(link_section = "license")]
        #[unsafe(no_mangle)]
        static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
    };
}

/// The verifier accepts no program that could get here.
#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// IP protocol numbers.
pub mod protocol {
    pub use bridge_common::protocol::{ICMP, ICMPV6, SCTP, TCP, UDP};

    /// IPv6 extension header: hop-by-hop options.
    pub const HOP_BY_HOP: u8 = 0;
    /// IPv6 extension header: routing.
    pub const ROUTING: u8 = 43;
    /// IPv6 extension header: fragment.
    pub const FRAGMENT: u8 = 44;
    /// IPv6 extension header: authentication.
    pub const AUTHENTICATION: u8 = 51;
    /// No header follows.
    pub const NO_NEXT_HEADER: u8 = 59;
    /// IPv6 extension header: destination options.
    pub const DESTINATION: u8 = 60;
}

/// Atomic operations on words of maps. The compiler has none for this target that Linux 6.1 would take.
#[cfg(target_arch = "bpf")]
pub mod atomic {
    use core::arch::asm;

    /// Adds to a word, without a barrier and without the old value.
    ///
    /// # Safety
    /// `word` points into a map's value and is aligned.
    #[inline(always)]
    pub unsafe fn add(word: *mut u64, n: u64) {
        // SAFETY: the caller's promise; the instruction touches this word alone.
        unsafe { asm!("lock *(u64 *)({p} + 0) += {v}", p = in(reg) word, v = in(reg) n) };
    }

    /// Adds to a word and returns its old value. A full barrier.
    ///
    /// # Safety
    /// As [`add`].
    #[inline(always)]
    pub unsafe fn fetch_add(word: *mut u64, n: u64) -> u64 {
        let mut value = n;
        // SAFETY: as in `add`.
        unsafe {
            asm!("{v} = atomic_fetch_add((u64 *)({p} + 0), {v})", p = in(reg) word, v = inout(reg) value)
        };
        value
    }

    /// Sets bits of a word and returns its old value. A full barrier.
    ///
    /// # Safety
    /// As [`add`].
    #[inline(always)]
    pub unsafe fn fetch_or(word: *mut u64, bits: u64) -> u64 {
        let mut value = bits;
        // SAFETY: as in `add`.
        unsafe {
            asm!("{v} = atomic_fetch_or((u64 *)({p} + 0), {v})", p = in(reg) word, v = inout(reg) value)
        };
        value
    }

    /// Keeps only these bits of a word and returns its old value. A full barrier.
    ///
    /// # Safety
    /// As [`add`].
    #[inline(always)]
    pub unsafe fn fetch_and(word: *mut u64, bits: u64) -> u64 {
        let mut value = bits;
        // SAFETY: as in `add`.
        unsafe {
            asm!("{v} = atomic_fetch_and((u64 *)({p} + 0), {v})", p = in(reg) word, v = inout(reg) value)
        };
        value
    }

    /// Writes `new` if the word is `old`, and returns its old value. A full barrier.
    ///
    /// # Safety
    /// As [`add`].
    #[inline(always)]
    pub unsafe fn compare_exchange(word: *mut u64, old: u64, new: u64) -> u64 {
        let was;
        // SAFETY: as in `add`.
        unsafe {
            asm!("r0 = cmpxchg_64({p} + 0, r0, {n})", p = in(reg) word, n = in(reg) new, inout("r0") old => was);
        }
        was
    }

    /// Writes `new`. A full barrier.
    ///
    /// # Safety
    /// As [`add`].
    #[inline(always)]
    pub unsafe fn exchange(word: *mut u64, new: u64) {
        // SAFETY: as in `add`.
        unsafe { asm!("{v} = xchg_64({p} + 0, {v})", p = in(reg) word, v = inout(reg) new => _) };
    }
}

/// Keeps the compiler from making one call of two with different maps: the verifier replaces a lookup by its code only where
/// the map is always the same.
#[inline(always)]
pub fn apart() {
    #[cfg(target_arch = "bpf")]
    // SAFETY: no instruction.
    unsafe {
        core::arch::asm!("", options(nomem, nostack));
    }
}
