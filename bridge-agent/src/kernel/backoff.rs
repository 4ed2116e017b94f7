//! Repeats an action that has failed, until it works or is no longer wanted.

use std::time::{Duration, Instant};

/// The first pause, doubled with each failure up to [`MAX`].
const MIN: Duration = Duration::from_millis(500);
const MAX: Duration = Duration::from_secs(30);

/// Says when an action that has failed is due again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backoff {
    failed: Option<(Instant, Duration)>,
}

impl Backoff {
    /// Notes the outcome of an attempt.
    pub fn note(&mut self, succeeded: bool) {
        self.note_at(succeeded, Instant::now());
    }

    /// Whether the last attempt failed and its pause is over.
    #[must_use]
    pub fn is_due(&self) -> bool {
        self.is_due_at(Instant::now())
    }

    /// The pause until the next attempt; zero if none is wanted.
    #[must_use]
    pub fn pause(&self) -> Duration {
        self.failed.map_or(Duration::ZERO, |(_, pause)| pause)
    }

    fn note_at(&mut self, succeeded: bool, now: Instant) {
        let next = |pause: Duration| (pause * 2).min(MAX);
        self.failed = (!succeeded).then(|| (now, self.failed.map_or(MIN, |(_, pause)| next(pause))));
    }

    fn is_due_at(&self, now: Instant) -> bool {
        self.failed.is_some_and(|(at, pause)| now.saturating_duration_since(at) >= pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_until_an_attempt_succeeds() {
        let mut backoff = Backoff::default();
        let start = Instant::now();
        assert!(!backoff.is_due_at(start + MAX), "nothing has failed");
        backoff.note_at(false, start);
        assert!(!backoff.is_due_at(start) && backoff.is_due_at(start + MIN));
        backoff.note_at(false, start);
        assert!(!backoff.is_due_at(start + MIN) && backoff.is_due_at(start + MIN * 2));
        for _ in 0..100 {
            backoff.note_at(false, start);
        }
        assert!(backoff.is_due_at(start + MAX), "it never gives up");
        backoff.note_at(true, start);
        assert_eq!((backoff, backoff.pause()), (Backoff::default(), Duration::ZERO));
    }
}
