//! Errors of the pool in the kernel.

use std::{io, path::PathBuf};

use aya::{EbpfError, maps::MapError, programs::ProgramError};

use super::{attach::CgroupError, layout::LayoutError, pins::PinError};
use crate::kernel;

/// Why the pool is not in the kernel.
#[derive(Debug, thiserror::Error)]
pub enum KernelPoolError {
    /// See the text.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// See the text.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// See the text.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// See the text.
    #[error("the kernel does not take the pool's object: {0}")]
    Load(#[from] EbpfError),
    /// See the text.
    #[error("map {name}: {source}")]
    Map {
        /// Its name.
        name: &'static str,
        /// Error of the kernel.
        source: MapError,
    },
    /// See the text.
    #[error("the object has no {0}: it was built from another version")]
    Missing(&'static str),
    /// See the text.
    #[error("program {name}: {source}")]
    Program {
        /// Its name.
        name: &'static str,
        /// Error of the kernel.
        source: ProgramError,
    },
    /// See the text.
    #[error("cannot pin {path}: {reason}")]
    Link {
        /// The pin.
        path: PathBuf,
        /// The reason.
        reason: String,
    },
    /// Another agent works on these pins.
    #[error(transparent)]
    Locked(#[from] kernel::pins::Error),
    /// See the text.
    #[error("cannot list the sockets that hold a port: {0}")]
    Walk(String),
    /// See the text.
    #[error("cannot map the words of the pool into memory: {0}")]
    Mmap(io::Error),
}
