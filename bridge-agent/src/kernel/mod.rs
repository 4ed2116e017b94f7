//! The ground floor: interfaces of the Linux kernel that several subsystems use. It uses no other module of this crate.

pub mod backoff;
pub mod bpf;
pub mod capabilities;
pub mod clock;
pub mod conntrack;
pub mod file_watch;
pub mod files;
pub mod lock;
pub mod mapping;
pub mod memory;
pub mod netlink;
pub mod nftables;
pub(crate) mod pin_guard;
pub mod pins;
pub(crate) mod program;
pub mod sole;
pub mod state_directory;
pub(crate) mod sysctl;
pub mod tracking;
