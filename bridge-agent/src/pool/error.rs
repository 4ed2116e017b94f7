//! Errors of the pool in the kernel.

use std::{io, path::PathBuf};

use aya::{EbpfError, maps::MapError, programs::ProgramError};

use super::{attach::CgroupError, layout::LayoutError, pins::PinError};
use crate::kernel;

/// Why the pool is not in the kernel.
#[derive(Debug, thiserror::Error)]
pub enum KernelPoolError {
    #[error(transparent)]
    Pin(#[from] PinError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Layout(#[from] LayoutError),
    #[error("the kernel does not take the pool's object: {0}")]
    Load(#[from] EbpfError),
    #[error("map {name}: {source}")]
    Map {
        name: &'static str,
        /// Error of the kernel.
        source: MapError,
    },
    #[error("the object has no {0}: it was built from another version")]
    Missing(&'static str),
    #[error("program {name}: {source}")]
    Program {
        name: &'static str,
        /// Error of the kernel.
        source: ProgramError,
    },
    #[error("cannot pin {path}: {reason}")]
    Link {
        /// The pin.
        path: PathBuf,
        reason: String,
    },
    /// Another agent works on these pins.
    #[error(transparent)]
    Locked(#[from] kernel::pins::Error),
    #[error("cannot list the sockets that hold a port: {0}")]
    Walk(String),
    #[error("cannot map the words of the pool into memory: {0}")]
    Mmap(io::Error),
}
