//! Polls a condition until a deadline; waits for the user to end a program.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};

/// Time between two polls.
const INTERVAL: Duration = Duration::from_millis(2);

/// Returns the deadline for this machine: `BRIDGE_PATIENCE` times as long, where that is set, for an emulated processor.
#[must_use]
pub fn patience(deadline: Duration) -> Duration {
    let times = std::env::var("BRIDGE_PATIENCE").ok().and_then(|times| times.parse().ok());
    deadline * times.unwrap_or(1)
}

/// Polls `condition` until it yields a value; `None` once `deadline` has passed without one.
///
/// The last poll comes after the deadline, so a busy machine that polls late does not fail a condition that came true.
pub fn eventually<T>(deadline: Duration, mut condition: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + deadline;
    loop {
        let late = Instant::now() >= end;
        let seen = condition();
        if seen.is_some() || late {
            return seen;
        }
        thread::sleep(INTERVAL);
    }
}

/// Polls until `condition` holds, and returns the time that it took. Panics with `description` after `deadline`.
#[track_caller]
pub fn until(description: &str, deadline: Duration, mut condition: impl FnMut() -> bool) -> Duration {
    let start = Instant::now();
    let held = eventually(deadline, || condition().then_some(()));
    assert!(held.is_some(), "not within {deadline:?}: {description}");
    start.elapsed()
}

/// Returns when the user asks this program to end: SIGINT, SIGTERM or SIGHUP.
///
/// # Errors
/// A signal cannot be listened for.
pub async fn end_requested() -> io::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
        _ = hangup.recv() => {}
    }
    Ok(())
}
