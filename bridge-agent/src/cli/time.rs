//! Durations on the command line.

use std::time::Duration;

use crate::config::{TimeSpan, leaf::Leaf as _};

/// Reads a duration of an option.
pub(super) fn time(text: &str) -> Result<Duration, String> {
    TimeSpan::parse(text)
        .map(TimeSpan::duration)
        .map_err(|problem| format!("{}; {}", problem.message, problem.help))
}
