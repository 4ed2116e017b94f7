//! Time that threads have had on a CPU.

use std::io;
use std::mem::MaybeUninit;
use std::time::Duration;

use anyhow::{Result, ensure};

/// CPU time of these processes together, soft interrupts that ran in them included: the kernel's own threads are
/// processes, too. To the nanosecond, up to now, where /proc knows no more than the last tick.
pub(super) fn cpu_time(processes: &[u32]) -> Result<Duration> {
    processes.iter().map(|process| of_one(process.cast_signed())).sum()
}

fn of_one(process: libc::pid_t) -> Result<Duration> {
    let mut clock = 0;
    // SAFETY: a pointer to a clock's number, which lives through the call.
    let error = unsafe { libc::clock_getcpuclockid(process, &raw mut clock) };
    ensure!(error == 0, "CPU clock of process {process}: {}", io::Error::from_raw_os_error(error));
    let mut time = MaybeUninit::<libc::timespec>::uninit();
    // SAFETY: a pointer to room for a time, which lives through the call.
    let result = unsafe { libc::clock_gettime(clock, time.as_mut_ptr()) };
    ensure!(result == 0, "CPU time of process {process}: {}", io::Error::last_os_error());
    // SAFETY: the call has succeeded, and so has written it.
    let time = unsafe { time.assume_init() };
    Ok(Duration::new(u64::try_from(time.tv_sec)?, u32::try_from(time.tv_nsec)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_goes_on_while_the_process_runs() -> Result<()> {
        let own = [std::process::id()];
        let before = cpu_time(&own)?;
        while cpu_time(&own)? == before {}
        assert!(cpu_time(&[own[0], own[0]])? > cpu_time(&own)?);
        Ok(())
    }
}
