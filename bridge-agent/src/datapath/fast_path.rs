//! Allows and stops the fast path, by a word that is shared with the kernel.

use std::time::Duration;

use aya::maps::MapData;
use bridge_common::filter::fast_path::Control;

use super::error::{Error, Result};
use crate::kernel::{bpf, clock::monotonic_ns, mapping::SharedWord};

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
        self.until.store(monotonic_ns().saturating_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)));
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
