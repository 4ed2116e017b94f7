//! The packet path in the kernel: its programs and maps.

pub mod object;
