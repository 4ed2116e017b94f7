//! Kernel interfaces that several subsystems need, below all of them.

pub mod bpf;
pub mod capabilities;
pub mod memory;
pub mod netlink;
pub mod state_directory;
pub(crate) mod sysctl;
pub mod time;
