//! Moments, as they are shown.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

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

/// Time since 1970 as RFC 3339 in UTC, to the microsecond.
#[must_use]
pub fn rfc3339(since_epoch: Duration) -> String {
    let seconds = libc::time_t::try_from(since_epoch.as_secs()).unwrap_or(libc::time_t::MAX);
    // SAFETY: a struct of integers and a pointer that may be null.
    let mut parts: libc::tm = unsafe { std::mem::zeroed() };
    // SAFETY: both live through the call.
    unsafe { libc::gmtime_r(&raw const seconds, &raw mut parts) };
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:06}Z",
        parts.tm_year + 1900,
        parts.tm_mon + 1,
        parts.tm_mday,
        parts.tm_hour,
        parts.tm_min,
        parts.tm_sec,
        since_epoch.subsec_micros()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_is_shown_in_utc() {
        assert_eq!(rfc3339(Duration::new(951_827_696, 7_000)), "2000-02-29T12:34:56.000007Z");
    }
}
