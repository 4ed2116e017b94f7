//! FINs of LAN hosts that their pods have not acknowledged.
//!
//! The fast path needs a liberal conntrack, which takes the FIN of a stranger for the end of the connection: its entry soon
//! expires, and iptables denies the next packet. The kernel side notes each FIN. One that no pod has acknowledged after
//! [`PATIENCE`] ends nothing there, and neither in conntrack.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, BorrowedFd},
    time::{Duration, Instant},
};

use crate::{
    conntrack::{self, Direction, Tuple},
    datapath::{EndReader, Ended, Maps, Unended},
};

/// How long the pod has for its acknowledgement. Longer than a round trip inside the node, shorter than conntrack waits.
const PATIENCE: Duration = Duration::from_millis(150);
/// Ends that may wait; more are not looked at.
const MOST: usize = 1 << 16;

pub(super) struct Ends {
    reader: EndReader,
    waiting: VecDeque<(Instant, Ended)>,
}

impl Ends {
    pub(super) fn open(maps: &Maps) -> io::Result<Self> {
        let reader = EndReader::new(maps).map_err(io::Error::other)?;
        Ok(Self { reader, waiting: VecDeque::new() })
    }

    /// Returns the time until the next end is to be looked at.
    pub(super) fn pause(&self) -> Option<Duration> {
        let (due, _) = self.waiting.front()?;
        Some(due.saturating_duration_since(Instant::now()))
    }

    /// Takes in new FINs, and restores the connections whose time is over.
    pub(super) fn look(&mut self, maps: &Maps) {
        let due = Instant::now() + PATIENCE;
        for ended in &mut self.reader {
            if self.waiting.len() < MOST {
                self.waiting.push_back((due, ended));
            }
        }
        let now = Instant::now();
        let ripe = self.waiting.partition_point(|(due, _)| *due <= now);
        let unended = self.waiting.drain(..ripe).filter_map(|(_, ended)| maps.unended(&ended).ok().flatten());
        let mut forged: Vec<Direction> = unended.map(|connection| direction(&connection)).collect();
        forged.dedup();
        if forged.is_empty() {
            return;
        }
        match conntrack::restore(&forged) {
            Ok(connections) => {
                tracing::debug!(connections, "conntrack forgets FINs that no pod acknowledged")
            }
            Err(error) => tracing::warn!(%error, "conntrack keeps FINs that no pod acknowledged"),
        }
    }
}

/// Readable while there are FINs.
impl AsFd for Ends {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.reader.as_fd()
    }
}

/// The packets of the pod: the node translates none of them before it is judged.
fn direction(connection: &Unended) -> Direction {
    let tuple = Tuple {
        source: connection.pod.0,
        source_port: connection.pod.1,
        destination: connection.peer.0,
        destination_port: connection.peer.1,
        protocol: connection.protocol,
    };
    if connection.outbound { Direction::Original(tuple) } else { Direction::Reply(tuple) }
}
