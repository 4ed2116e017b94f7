//! Connections that are slow, that read nothing, or that begin and never end, and measurements beside them.

use std::{
    fs,
    io::{self, Read, Write},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};

/// Connections that one attacker holds at a time.
const HELD: usize = 300;
/// Longer than a stalled reader is kept.
pub(crate) const ATTACK: Duration = Duration::from_secs(14);

/// A connection of either kind.
pub(crate) trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

/// Opens connections until `stop`, each with the next request, and reads a byte of one of them now and then.
pub(crate) fn attack<S: Stream>(
    requests: &[String],
    open: impl Fn() -> io::Result<S>,
    stop: &AtomicBool,
) -> usize {
    let mut held: Vec<S> = Vec::new();
    let mut opened = 0;
    while !stop.load(Ordering::Relaxed) {
        if held.len() == HELD {
            held.remove(opened % HELD);
        }
        // The agent may refuse it.
        if let Ok(mut stream) = open()
            && stream.write_all(requests[opened % requests.len()].as_bytes()).is_ok()
        {
            held.push(stream);
        }
        opened += 1;
        let slow = opened % held.len().max(1);
        if let Some(stream) = held.get_mut(slow) {
            drop(stream.read(&mut [0]));
        }
        thread::sleep(Duration::from_millis(5));
    }
    opened
}

pub(crate) fn resident_kib(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}
