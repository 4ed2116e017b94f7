//! Threads and the CPUs that they run on.

use anyhow::Result;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Keeps the calling thread on the `nth` of the CPUs that it may run on, counted round.
///
/// # Errors
/// The kernel refused.
pub fn stay_on(nth: usize) -> Result<()> {
    let allowed = sched_getaffinity(None)?;
    let cpus: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).collect();
    let mut one = CpuSet::new();
    one.set(cpus[nth % cpus.len()]);
    Ok(sched_setaffinity(None, &one)?)
}
