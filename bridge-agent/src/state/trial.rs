//! A configuration on trial as the status shows it.

use std::time::{Duration, SystemTime};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{datapath, kernel::clock};

/// The configuration on trial.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TrialStatus {
    /// When the former configuration comes back; RFC 3339, UTC.
    pub deadline: String,
    /// Whole seconds until then, rounded up.
    pub seconds_left: u64,
    /// Whether the kernel keeps the deadline: eBPF enforces, and its policy differs from the former one.
    pub in_kernel: bool,
    /// Probes that confirm the trial when all have answered.
    pub probes: Vec<ProbeStatus>,
    /// Why the former configuration could not be restored after the deadline.
    pub failure: Option<String>,
    /// The deadline, in milliseconds of `CLOCK_MONOTONIC`.
    #[serde(skip)]
    pub(crate) deadline_ms: u64,
}

/// A probe of a trial.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProbeStatus {
    /// As given in the request.
    pub target: String,
    /// Whether it has answered.
    pub answered: bool,
    /// Error of the last attempt.
    pub error: Option<String>,
}

/// How a trial ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum TrialOutcome {
    /// By `bridge-agent confirm`.
    Confirmed,
    /// Every probe answered.
    ConfirmedByProbes,
    /// Not confirmed in time: the former configuration is active.
    Expired,
    /// By `bridge-agent revert`.
    Reverted,
    /// The agent stopped, so no client could have confirmed it.
    Stopped,
}

/// End of the last trial.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TrialEnd {
    /// RFC 3339, UTC.
    pub time: String,
    pub outcome: TrialOutcome,
}

impl TrialEnd {
    pub(crate) fn now(outcome: TrialOutcome) -> Self {
        Self { time: clock::wall_clock(), outcome }
    }
}

impl TrialStatus {
    /// Status of a trial with a deadline in milliseconds of `CLOCK_MONOTONIC`.
    pub(crate) fn new(deadline_ms: u64, in_kernel: bool, probes: Vec<ProbeStatus>) -> Self {
        let deadline = clock::at(SystemTime::now() + time_left(deadline_ms));
        let mut status = Self { deadline, in_kernel, probes, deadline_ms, ..Self::default() };
        status.refresh();
        status
    }

    /// Updates the seconds left.
    pub(crate) fn refresh(&mut self) {
        let left = time_left(self.deadline_ms).as_millis().div_ceil(1000);
        self.seconds_left = left.try_into().unwrap_or(u64::MAX);
    }
}

/// Time until a deadline in milliseconds of `CLOCK_MONOTONIC`.
pub(crate) fn time_left(deadline_ms: u64) -> Duration {
    Duration::from_millis(deadline_ms.saturating_sub(datapath::now() / 1_000_000))
}
