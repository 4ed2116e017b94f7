//! Removes expired flows, on a thread of its own.
//!
//! A full table evicts the flow that was not used for the longest time: without this, ended connections would outlive one that
//! is silent.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use crate::datapath::Maps;

/// The pause between two sweeps. One takes some 50 ms with full tables of the default sizes, 2 ms with empty ones.
const PAUSE: Duration = Duration::from_secs(10);

/// Ends with its owner.
#[derive(Debug)]
pub(super) struct Sweeper {
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Sweeper {
    /// Starts the thread.
    pub(super) fn start(maps: Arc<Maps>) -> io::Result<Self> {
        let ends = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&ends);
        let thread =
            thread::Builder::new().name("flow-sweeper".into()).spawn(move || sweep(&maps, &ended))?;
        Ok(Self { ends, thread: Some(thread) })
    }
}

impl Drop for Sweeper {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

fn sweep(maps: &Maps, ended: &AtomicBool) {
    let mut next = Instant::now() + PAUSE;
    while !ended.load(Ordering::Relaxed) {
        let left = next.saturating_duration_since(Instant::now());
        if !left.is_zero() {
            thread::park_timeout(left);
            continue;
        }
        match maps.remove_expired_flows(ended) {
            Ok(0) => {}
            Ok(removed) => tracing::debug!(removed, "removed expired flows"),
            Err(error) => tracing::debug!(%error, "cannot remove expired flows; the agent tries again"),
        }
        next = Instant::now() + PAUSE;
    }
}
