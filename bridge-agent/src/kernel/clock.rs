//! Clocks, and times as they are shown.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jiff::Timestamp;
use rustix::time::{ClockId, clock_getres, clock_gettime};

/// Returns `CLOCK_MONOTONIC`.
#[must_use]
pub fn monotonic() -> Duration {
    let now = clock_gettime(ClockId::Monotonic);
    Duration::try_from(now).expect("the monotonic clock is never negative")
}

/// Returns `CLOCK_MONOTONIC` in nanoseconds, as `bpf_ktime_get_ns` does.
#[must_use]
pub fn monotonic_ns() -> u64 {
    u64::try_from(monotonic().as_nanos()).unwrap_or(u64::MAX)
}

/// Returns the length of the kernel's timer tick, in nanoseconds.
#[must_use]
pub(crate) fn tick_ns() -> u64 {
    u64::try_from(clock_getres(ClockId::MonotonicCoarse).tv_nsec).unwrap_or(0)
}

/// Returns the current time as RFC 3339 in UTC.
#[must_use]
pub fn wall_clock() -> String {
    at(SystemTime::now())
}

/// Formats a time as RFC 3339 in UTC.
#[must_use]
pub fn at(time: SystemTime) -> String {
    rfc3339(time.duration_since(UNIX_EPOCH).unwrap_or_default())
}

/// Formats a time since 1970 as RFC 3339 in UTC, to the microsecond.
#[must_use]
pub fn rfc3339(since_epoch: Duration) -> String {
    let time = i128::try_from(since_epoch.as_nanos()).ok().and_then(|ns| Timestamp::from_nanosecond(ns).ok());
    format!("{:.6}", time.unwrap_or(Timestamp::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_shown_in_utc() {
        assert_eq!(rfc3339(Duration::new(951_827_696, 7_000)), "2000-02-29T12:34:56.000007Z");
        assert!(rfc3339(Duration::MAX).starts_with("9999-"));
    }
}
