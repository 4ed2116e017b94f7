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
pub const ABI_VERSION: u32 = 5;

/// Defines an enum as numbers, names and sentences, in one order.
macro_rules! named {
    ($(#[$attribute:meta])* $enum:ident { $($name:ident, $number:literal, $text:literal;)+ }) => {
        $(#[$attribute])*
        #[repr(u8)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[expect(non_camel_case_types, reason = "one spelling for the number and the operator's text")]
        pub enum $enum {
            $(#[doc = $text] $name = $number,)+
        }

        impl $enum {
            /// Every variant, by number.
            pub const ALL: &[Self] = &[$(Self::$name),+];
            /// The number of variants.
            pub const COUNT: usize = Self::ALL.len();

            /// The name, as it is shown.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => stringify!($name),)+ }
            }

            /// Returns the meaning, in a sentence.
            #[must_use]
            pub const fn text(self) -> &'static str {
                match self { $(Self::$name => $text,)+ }
            }
        }
    };
}
pub(crate) use named;

/// Asserts the sizes of types that are copied from and to BPF maps as bytes. On the user side, their derives prove that they
/// have no padding but named fields, and that every bit pattern is a value.
macro_rules! plain_old_data {
    ($($type:ty: $size:literal),+ $(,)?) => {$(
        const _: () = assert!(core::mem::size_of::<$type>() == $size);
        #[cfg(feature = "user")]
        const _: () = {
            const fn proven<T: zerocopy::FromBytes + zerocopy::IntoBytes + zerocopy::Immutable + Copy>() {}
            proven::<$type>();
        };
        // SAFETY: `proven` above.
        #[cfg(feature = "user")]
        unsafe impl aya::Pod for $type {}
    )+};
}
pub(crate) use plain_old_data;
