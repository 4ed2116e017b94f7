//! The programs of the pool.

use aya::{Ebpf, programs::Program};

use super::error::KernelPoolError;
use crate::kernel::bpf::without_signals;

/// The programs of the object, in the order in which they are attached: those that release come before those that
/// claim, so that no claim goes unseen.
pub const PROGRAMS: [&str; 9] = [
    "pool_sock_ops",
    "pool_release",
    "pool_create",
    "pool_sendmsg4",
    "pool_sendmsg6",
    "pool_bind4",
    "pool_bind6",
    "pool_connect4",
    "pool_connect6",
];

/// Loads every program of the object.
pub(super) fn load_programs(ebpf: &mut Ebpf) -> Result<(), KernelPoolError> {
    for name in PROGRAMS {
        match ebpf.program_mut(name).ok_or(KernelPoolError::Missing(name))? {
            Program::CgroupSockAddr(program) => without_signals(|| program.load()),
            Program::CgroupSock(program) => without_signals(|| program.load()),
            Program::SockOps(program) => without_signals(|| program.load()),
            _ => return Err(KernelPoolError::Missing(name)),
        }
        .map_err(|source| KernelPoolError::Program { name, source })?;
    }
    Ok(())
}
