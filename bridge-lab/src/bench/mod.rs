//! The costs of bridge: start, memory, policies of 100,000 rules, the packet path by itself, the routes of 5,000 nodes,
//! connects from the port pool, and forwarding beside the usual alternatives.
//!
//! Times are wall-clock; each is measured several times, and reported as median, minimum and maximum.

pub(crate) mod agent;
pub mod forward;
pub mod kube;
mod nftables;
mod packet;
mod policy;
pub mod pool;
mod routes;
mod rules;

pub use self::forward::limits::{Bound, Limit};

use anyhow::Result;
use serde::Serialize;

/// A figure. The unit is part of it; nothing here is a time without one.
#[derive(Clone, Debug, Serialize)]
pub struct Measurement {
    /// Name of the measurement.
    pub name: String,
    /// Median of the runs.
    pub value: f64,
    /// Of `value`, `least` and `most`.
    pub unit: &'static str,
    /// The smallest run.
    pub least: f64,
    /// The greatest run.
    pub most: f64,
    /// How many runs.
    pub runs: usize,
    /// Limit on the median, if the project promises one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<f64>,
}

impl Measurement {
    /// From single runs.
    ///
    /// # Panics
    /// There is none.
    pub fn of(name: impl Into<String>, unit: &'static str, mut runs: Vec<f64>) -> Self {
        runs.sort_by(f64::total_cmp);
        let (Some(&least), Some(&most)) = (runs.first(), runs.last()) else { panic!("no run") };
        Self {
            name: name.into(),
            value: runs[runs.len() / 2],
            unit,
            least,
            most,
            runs: runs.len(),
            limit: None,
        }
    }

    /// Sets the limit on the median.
    #[must_use]
    pub fn limit(self, limit: f64) -> Self {
        Self { limit: Some(limit), ..self }
    }

    /// The same as a promise, if it is one.
    #[must_use]
    pub fn promise(&self) -> Option<Limit> {
        let limit = Bound::AtMost(self.limit?);
        Some(Limit { promise: self.name.clone(), measured: Some(self.value), limit })
    }
}

/// A group of measurements, by name.
pub type Group = (&'static str, fn() -> Result<Vec<Measurement>>);

/// Every group but the comparisons ([`forward::Work`]), in the order they run.
pub const GROUPS: &[Group] = &[
    ("policy", policy::measure),
    ("agent", agent::measure),
    ("packet", packet::measure),
    ("nftables", nftables::measure),
    ("routes", routes::measure),
    ("pool", pool::measure),
];
