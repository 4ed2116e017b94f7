//! Waiting for something to become true, with a deadline.

use std::thread;
use std::time::{Duration, Instant};

/// Time between two looks at the condition.
const INTERVAL: Duration = Duration::from_millis(2);

/// A deadline as it is on this machine: `BRIDGE_PATIENCE` times as long, where that is set, for an emulated processor.
#[must_use]
pub fn patience(deadline: Duration) -> Duration {
    let times = std::env::var("BRIDGE_PATIENCE").ok().and_then(|times| times.parse().ok());
    deadline * times.unwrap_or(1)
}

/// Looks at `condition` until it yields a value; `None` once `deadline` has passed without one.
///
/// The condition is looked at once more after the deadline, so a busy machine that was late to look is not
/// taken for a condition that never came true.
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
