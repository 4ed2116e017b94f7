//! The ABI that the kernel side and the user side share.

#![no_std]

pub mod pool;
