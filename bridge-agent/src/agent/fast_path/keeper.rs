//! Watches the inputs of the fast path: flows may take it only meanwhile.
//!
//! A thread of its own, so that a change is dealt with at once, whatever else the agent is busy with. Without an agent, the
//! permission runs out within [`LEASE`], and every packet takes the normal path.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use netlink_sys::Socket;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::{ends::Ends, neighbours::Neighbours};
use crate::{datapath::Maps, kernel::netlink};

/// How long flows may take the fast path without a word from the agent.
const LEASE: Duration = Duration::from_secs(3);
/// How often the agent says so.
const RENEWAL: Duration = Duration::from_millis(500);

/// Netlink groups whose changes affect every path.
const GROUPS: [u32; 9] = [
    libc::RTNLGRP_LINK,
    libc::RTNLGRP_NEIGH,
    libc::RTNLGRP_IPV4_ROUTE,
    libc::RTNLGRP_IPV6_ROUTE,
    libc::RTNLGRP_IPV4_RULE,
    RTNLGRP_IPV6_RULE,
    // Forwarding, rp_filter.
    RTNLGRP_IPV4_NETCONF,
    RTNLGRP_IPV6_NETCONF,
    RTNLGRP_NEXTHOP,
];
// linux/rtnetlink.h; not all are in `libc`.
const RTNLGRP_IPV6_RULE: u32 = 19;
const RTNLGRP_IPV4_NETCONF: u32 = 24;
const RTNLGRP_IPV6_NETCONF: u32 = 25;
const RTNLGRP_NEXTHOP: u32 = 32;

const RTM_NEWNEIGH: u16 = 28;
const RTM_DELNEIGH: u16 = 29;

/// Keeps the fast path open; dropping it leaves it to run out.
#[derive(Debug)]
pub(super) struct Keeper {
    maps: Arc<Maps>,
    allowed: Arc<AtomicU32>,
    wake: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    /// Starts; flows of no protocol may take the fast path yet.
    pub(super) fn start(maps: Arc<Maps>) -> io::Result<Self> {
        let socket = netlink::subscribe(&GROUPS)?;
        let neighbours = Neighbours::read()?;
        // Earlier changes were not watched.
        maps.fast_path().forget_paths();
        let allowed = Arc::new(AtomicU32::new(0));
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let watch = Watch {
            socket,
            buffer: Vec::with_capacity(netlink::RECEIVE_BUFFER),
            neighbours,
            ends: Ends::open(&maps)?,
            maps: Arc::clone(&maps),
            allowed: Arc::clone(&allowed),
            wake: Arc::clone(&wake),
        };
        let thread = std::thread::Builder::new().name("fast-path".into()).spawn(move || watch.run())?;
        Ok(Self { maps, allowed, wake, thread: Some(thread) })
    }

    /// From now on flows of these protocols may take the fast path.
    pub(super) fn allow(&self, allowed: u32) {
        self.allowed.store(allowed, Ordering::Relaxed);
        self.maps.fast_path().allow(allowed, LEASE);
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        // It fails for a counter that is about to overflow alone.
        let _ = rustix::io::write(&*self.wake, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Watch {
    socket: Socket,
    buffer: Vec<u8>,
    neighbours: Neighbours,
    ends: Ends,
    maps: Arc<Maps>,
    allowed: Arc<AtomicU32>,
    wake: Arc<OwnedFd>,
}

impl Watch {
    fn renew(&self) {
        self.maps.fast_path().allow(self.allowed.load(Ordering::Relaxed), LEASE);
    }

    fn run(mut self) {
        if let Err(error) = self.watch() {
            self.maps.fast_path().stop();
            tracing::error!(%error, "routes and neighbours can no longer be watched: the fast path is off");
        }
    }

    /// Until it is woken.
    fn watch(&mut self) -> io::Result<()> {
        let mut renewed = Instant::now();
        loop {
            let pause = self.ends.pause().map_or(RENEWAL, |pause| pause.min(RENEWAL));
            let mut sources = [
                PollFd::from_borrowed_fd(self.socket.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(self.wake.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(self.ends.as_fd(), PollFlags::IN),
            ];
            match poll(&mut sources, Some(&timespec(pause))) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            if !sources[1].revents().is_empty() {
                return Ok(());
            }
            if self.has_changed()? {
                self.maps.fast_path().forget_paths();
            }
            self.ends.look(&self.maps);
            if renewed.elapsed() >= RENEWAL / 2 {
                self.renew();
                renewed = Instant::now();
            }
        }
    }

    /// Returns whether any message so far changes the path of a flow.
    fn has_changed(&mut self) -> io::Result<bool> {
        let mut changed = false;
        loop {
            match netlink::receive(&self.socket, &mut self.buffer) {
                Ok(()) => {
                    for message in netlink::messages(&self.buffer) {
                        let (header, body) = message?;
                        let of_neighbour = matches!(header.kind, RTM_NEWNEIGH | RTM_DELNEIGH);
                        // Any other message matters, even one that cannot be decoded.
                        changed |= !of_neighbour
                            || netlink::message_of(header.kind, body)
                                .is_some_and(|message| self.neighbours.change(&message));
                    }
                }
                // Notifications were lost: anything may have changed.
                Err(netlink::Error::Overrun) => {
                    changed = true;
                    self.neighbours = Neighbours::read()?;
                }
                Err(netlink::Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Ok(changed);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// At least a millisecond, so that a pause that is nearly over is no busy loop.
fn timespec(pause: Duration) -> Timespec {
    let pause = pause.max(Duration::from_millis(1));
    Timespec { tv_sec: pause.as_secs().cast_signed(), tv_nsec: pause.subsec_nanos().into() }
}
