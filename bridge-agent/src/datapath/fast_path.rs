//! The fast path, as the user side sees it: whether flows may take it, by which interfaces, and what became of packets.

use crate::kernel::{bpf, mapping::SharedWord};
use std::time::Duration;

use aya::maps::MapData;
use bridge_common::filter::{
    fast_path::{Control, Outcome, Outcomes},
    policy::direction,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    error::{Error, Result},
    maps::{Maps, now},
};

/// Whether flows may take the fast path: a [`Control`] that is shared with the kernel.
#[derive(Debug)]
pub struct FastPath {
    until: SharedWord,
    /// The epoch and the protocols.
    rest: SharedWord,
}

impl FastPath {
    pub(super) fn open(map: &MapData) -> Result<Self> {
        let word = |index| SharedWord::new(bpf::fd(map), index).map_err(Error::map("fast_path"));
        Ok(Self { until: word(0)?, rest: word(1)? })
    }

    /// What the kernel side sees.
    #[must_use]
    pub fn control(&self) -> Control {
        let [epoch, protocols] = split(self.rest.load());
        Control { until: self.until.load(), epoch, protocols }
    }

    /// Flows of these protocols, bits of [`bridge_common::filter::fast_path::protocols`], may take it from now on and for this
    /// long, unless that is put off by another call.
    pub fn allow(&self, protocols: u32, time: Duration) {
        self.rest.update(|rest| join([split(rest)[0].max(1), protocols]));
        self.until.store(now().saturating_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)));
    }

    /// No flow may take it any longer.
    pub fn stop(&self) {
        self.until.store(0);
    }

    /// Discards all paths after a change of their inputs: each flow learns its path again.
    pub fn forget_paths(&self) {
        self.rest.update(|rest| {
            let [epoch, protocols] = split(rest);
            join([epoch.checked_add(1).unwrap_or(1), protocols])
        });
    }
}

/// Epoch and protocols, in the order that they lie in.
fn split(word: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = word.to_ne_bytes();
    [u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h])]
}

fn join([epoch, protocols]: [u32; 2]) -> u64 {
    let ([a, b, c, d], [e, f, g, h]) = (epoch.to_ne_bytes(), protocols.to_ne_bytes());
    u64::from_ne_bytes([a, b, c, d, e, f, g, h])
}

/// Packets of established flows of one direction that fared alike.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct OutcomeCount {
    /// `inbound`, `outbound` or `nodeport`.
    pub direction: String,
    /// `forwarded`, or the name of the [`Outcome`] that says why the packet took the normal path.
    pub outcome: String,
    /// Packets.
    pub packets: u64,
    /// Their lengths from the link layer header on, in bytes.
    pub bytes: u64,
}

impl Maps {
    /// Whether flows may take the fast path.
    #[must_use]
    pub const fn fast_path(&self) -> &FastPath {
        &self.fast_path
    }

    /// What became of packets of established flows, also what became of none: by direction, then by outcome.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn outcome_counts(&self) -> Result<Vec<OutcomeCount>> {
        let mut counts = Vec::with_capacity(direction::COUNT * Outcome::COUNT);
        for (index, name) in (0..).zip(direction::NAMES) {
            let rows = self.outcomes.get(&index, 0).map_err(Error::aya_map("outcomes"))?;
            for outcome in Outcome::ALL {
                let of = |row: &Outcomes| row.by_outcome[*outcome as usize];
                counts.push(OutcomeCount {
                    direction: name.to_owned(),
                    outcome: outcome.name().to_owned(),
                    packets: rows.iter().map(|row| of(row).packets).sum(),
                    bytes: rows.iter().map(|row| of(row).bytes).sum(),
                });
            }
        }
        Ok(counts)
    }
}
