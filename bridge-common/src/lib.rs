//! The ABI that the kernel side and the user side of bridge share: keys and values of BPF maps, events, and the
//! numbers that stand for verdicts, reasons and states.
//!
//! Everything here is plain old data with explicit padding and sizes asserted at compile time. A change of any
//! layout or number needs a new [`ABI_VERSION`]: pinned maps outlive the agent that made them.

#![no_std]

pub mod filter;
pub mod pool;
pub mod protocol;

/// Version of everything in this crate; names the directory that maps and links are pinned in.
pub const ABI_VERSION: u32 = 4;

/// Marks types that may be copied from and to a BPF map as bytes, and asserts their size.
macro_rules! plain_old_data {
    ($($type:ty: $size:literal),+ $(,)?) => {$(
        const _: () = assert!(core::mem::size_of::<$type>() == $size);
        // SAFETY: `repr(C)`, integers and byte arrays only, padding explicit: every bit pattern is a value.
        #[cfg(feature = "user")]
        unsafe impl aya::Pod for $type {}
    )+};
}
pub(crate) use plain_old_data;
