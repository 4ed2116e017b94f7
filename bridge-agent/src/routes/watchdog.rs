//! Does the asking for [`super::health`]: makes the kernel verify neighbours, connects to ports, keeps the clock.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::health::{Change, Health, Options};
use super::model::Hop;
use super::netlink::{Error, Netlink};

/// The interval is divided into this many parts, each for a part of the next hops: a large cluster gets no burst of probes.
const PARTS: u32 = 10;

/// Watches the next hops of a plan.
pub(super) struct Watchdog {
    health: Health,
    checks: JoinSet<(Hop, bool)>,
    tick: Instant,
}

impl Watchdog {
    pub(super) fn new(options: Options) -> Self {
        Self { health: Health::new(options), checks: JoinSet::new(), tick: Instant::now() }
    }

    /// Those not to be used.
    pub(super) fn down(&self) -> BTreeSet<Hop> {
        self.health.down()
    }

    /// Watches exactly these. What the kernel knows of new ones is read once; from then on there are events.
    pub(super) fn watch(
        &mut self,
        hops: &BTreeSet<Hop>,
        netlink: &mut Netlink,
    ) -> Result<Vec<Change>, Error> {
        if self.health.watch(std::time::Instant::now(), hops) {
            self.refresh(netlink)
        } else {
            Ok(Vec::new())
        }
    }

    /// Reads all neighbours: some are new, or events were lost.
    pub(super) fn refresh(&mut self, netlink: &mut Netlink) -> Result<Vec<Change>, Error> {
        let neighbours = netlink.neighbours()?;
        Ok(neighbours.into_iter().filter_map(|(hop, state)| self.heard(hop, state)).collect())
    }

    /// An event of the kernel.
    pub(super) fn heard(&mut self, hop: Hop, state: u16) -> Option<Change> {
        self.health.neighbour(std::time::Instant::now(), hop, state)
    }

    /// Waits until it is time to ask, or a check has ended.
    pub(super) async fn next(&mut self) -> Option<(Hop, bool)> {
        tokio::select! {
            Some(Ok(check)) = self.checks.join_next() => Some(check),
            () = tokio::time::sleep_until(self.tick) => None,
        }
    }

    /// What [`Self::next`] waited for: takes up the outcome of a check, or asks the next part.
    pub(super) fn act(
        &mut self,
        check: Option<(Hop, bool)>,
        netlink: &mut Netlink,
    ) -> Result<Vec<Change>, Error> {
        let now = std::time::Instant::now();
        if let Some((hop, accepted)) = check {
            return Ok(self.health.tcp(now, hop, accepted).into_iter().collect());
        }
        let options = self.health.options().clone();
        self.tick = Instant::now() + options.interval / PARTS;
        let slice = self.health.slice(PARTS as usize);
        netlink.ask_neighbours(&self.health.ask(&slice))?;
        if let Some(port) = options.tcp {
            for hop in slice {
                self.checks.spawn(accepts(hop, port, options.timeout));
            }
        }
        Ok(self.health.decay(now))
    }
}

async fn accepts(hop: Hop, port: u16, timeout: Duration) -> (Hop, bool) {
    let (address, ifindex) = hop;
    let mut to = SocketAddr::new(address, port);
    if let SocketAddr::V6(to) = &mut to
        && to.ip().is_unicast_link_local()
    {
        to.set_scope_id(ifindex);
    }
    let connected = tokio::time::timeout(timeout, TcpStream::connect(to)).await;
    (hop, matches!(connected, Ok(Ok(_))))
}
