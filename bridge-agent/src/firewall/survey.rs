//! Reads the interfaces of the node when they change, for rules that name them.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::time::{Duration, Instant};

use crate::kernel::netlink::{Error, RECEIVE_BUFFER, receive, subscribe};
use crate::model::Topology;

/// Between two readings without a notification, between two with one, and how many times its own duration a reading must leave
/// free.
const PAUSE: Duration = Duration::from_millis(400);
const SHORTEST: Duration = Duration::from_millis(20);
const SHARE: u32 = 50;
const GROUPS: [u32; 3] = [libc::RTNLGRP_LINK, libc::RTNLGRP_IPV4_ROUTE, libc::RTNLGRP_IPV6_ROUTE];

/// Reads the interfaces of this node.
pub type Surveyor = Box<dyn FnMut() -> io::Result<Topology> + Send>;

/// Asks a [`Surveyor`] in intervals that leave it idle most of the time.
pub(crate) struct Survey {
    surveyor: Surveyor,
    /// Notifications of links and routes; without them the pauses are longer.
    notified: Option<netlink_sys::Socket>,
    buffer: Vec<u8>,
    changed: bool,
    /// Since when a reading may be, with and without a notification.
    next: Option<[Instant; 2]>,
}

impl Survey {
    /// In the network namespace of this thread.
    pub(crate) fn new(surveyor: Surveyor) -> Self {
        let notified = subscribe(&GROUPS)
            .inspect_err(|error| tracing::debug!(%error, "links and routes cannot be watched"))
            .ok();
        Self { surveyor, notified, buffer: Vec::with_capacity(RECEIVE_BUFFER), changed: false, next: None }
    }

    /// Returns a descriptor that can be read when links or routes have changed since [`Self::take`].
    pub(crate) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.notified.as_ref().map(|socket| socket.as_fd())
    }

    /// Returns the topology, if it is time to read it and it can be read.
    pub(crate) fn take(&mut self, now: Instant) -> Option<Topology> {
        self.changed |= self.was_notified();
        if self.next.is_some_and(|[changed, unchanged]| now < if self.changed { changed } else { unchanged })
        {
            return None;
        }
        self.changed = false;
        let read = (self.surveyor)();
        let idle = now.elapsed() * SHARE;
        self.next = Some([SHORTEST, PAUSE].map(|shortest| Instant::now() + idle.max(shortest)));
        read.inspect_err(|error| tracing::warn!(%error, "the rules do not follow the interfaces")).ok()
    }

    /// Takes in every notification. A message too many, or one that cannot be read, counts as one.
    fn was_notified(&mut self) -> bool {
        let Some(socket) = &self.notified else { return false };
        let mut notified = false;
        loop {
            match receive(socket, &mut self.buffer) {
                Ok(()) | Err(Error::Overrun | Error::Malformed(_)) => notified = true,
                Err(_) => return notified,
            }
        }
    }
}
