//! The fast path as a configuration wants it.

mod conntrack;
mod ends;
mod keeper;
mod neighbours;

use std::sync::Arc;

use bridge_common::filter::fast_path::protocols;

use self::{conntrack::Tracking, keeper::Keeper};
use crate::{datapath::Maps, kernel::backoff::Backoff, state::FastPathStatus};

/// Keeps the fast path open while it is wanted.
#[derive(Debug)]
pub(super) struct Switch {
    maps: Arc<Maps>,
    keeper: Option<Keeper>,
    status: FastPathStatus,
    /// Its inputs could not be watched.
    again: Backoff,
}

impl Switch {
    /// Off.
    pub(super) fn new(maps: Arc<Maps>) -> Self {
        Self { maps, keeper: None, status: FastPathStatus::default(), again: Backoff::default() }
    }

    pub(super) const fn is_on(&self) -> bool {
        self.keeper.is_some()
    }

    /// Whether it is time for another attempt to open the fast path.
    pub(super) fn is_due(&self) -> bool {
        self.again.is_due()
    }

    pub(super) const fn status(&self) -> &FastPathStatus {
        &self.status
    }

    /// Opens the fast path, or closes it.
    pub(super) fn set(&mut self, wanted: bool) {
        if !wanted {
            self.keeper = None;
            self.again = Backoff::default();
            self.maps.fast_path().stop();
            self.status = FastPathStatus::default();
            return;
        }
        if self.keeper.is_none() {
            let started = Keeper::start(Arc::clone(&self.maps));
            self.again.note(started.is_ok());
            match started {
                Ok(keeper) => self.keeper = Some(keeper),
                Err(error) => {
                    self.maps.fast_path().stop();
                    let remark = format!("no fast path: routes and neighbours cannot be watched: {error}");
                    tracing::warn!("{remark}");
                    self.status = status(0, vec![remark]);
                    return;
                }
            }
        }
        self.allow(true);
    }

    /// Follows changes of conntrack's settings by another program.
    pub(super) fn check(&mut self) {
        self.allow(false);
    }

    /// Allows the fast path to the protocols that conntrack tolerates there. `relax`: sets conntrack to tolerate TCP.
    fn allow(&mut self, relax: bool) {
        let Some(keeper) = &self.keeper else { return };
        let mut tracking = Tracking::read();
        let mut failure = None;
        if relax && matches!(tracking, Ok(Tracking::Strict)) {
            failure = Tracking::relax().err();
            tracking = Tracking::read();
        }
        let status = match tracking {
            Ok(Tracking::Absent | Tracking::Liberal) => {
                keeper.allow(protocols::TCP | protocols::UDP);
                status(protocols::TCP | protocols::UDP, Vec::new())
            }
            other => {
                keeper.allow(protocols::UDP);
                let failure = failure.or(other.err());
                status(protocols::UDP, vec![Tracking::remark(failure.as_ref())])
            }
        };
        if status.protocols != self.status.protocols {
            for remark in &status.remarks {
                tracing::warn!("{remark}");
            }
            self.status = status;
        }
    }
}

/// Returns the status for protocols that may take the fast path, and remarks why others may not.
fn status(allowed: u32, remarks: Vec<String>) -> FastPathStatus {
    let names = [(protocols::TCP, "tcp"), (protocols::UDP, "udp")];
    let allowed = names.into_iter().filter(|(bit, _)| allowed & bit != 0);
    FastPathStatus { protocols: allowed.map(|(_, name)| name.to_owned()).collect(), remarks }
}
