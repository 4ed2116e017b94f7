//! Reads the interfaces of the node from time to time, for rules that name them.

use std::io;
use std::time::{Duration, Instant};

use crate::model::Topology;

/// Between two readings, and how many times its own duration a reading must leave free.
const PAUSE: Duration = Duration::from_millis(400);
const SHARE: u32 = 50;

/// Reads the interfaces of this node.
pub type Surveyor = Box<dyn FnMut() -> io::Result<Topology> + Send>;

/// Asks a [`Surveyor`] in intervals that leave it idle most of the time.
pub(crate) struct Survey {
    surveyor: Surveyor,
    next: Option<Instant>,
}

impl Survey {
    pub(crate) const fn new(surveyor: Surveyor) -> Self {
        Self { surveyor, next: None }
    }

    /// Returns the topology, if it is time to read it and it can be read.
    pub(crate) fn take(&mut self, now: Instant) -> Option<Topology> {
        if self.next.is_some_and(|next| now < next) {
            return None;
        }
        let read = (self.surveyor)();
        self.next = Some(Instant::now() + (now.elapsed() * SHARE).max(PAUSE));
        read.inspect_err(|error| tracing::warn!(%error, "the rules do not follow the interfaces")).ok()
    }
}
