//! The thin layer over rtnetlink: reads everything, applies operations, watches for changes.

mod codec;
mod events;
mod interest;

use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_sys::protocols::NETLINK_ROUTE;

use codec::{AF_INET, AF_INET6};
pub use events::{Event, Events};
pub use interest::Interest;

use super::health::Ask;
use super::model::Hop;
use super::model::{KernelHop, KernelRoute, Observed, PROTOCOL, RouteKey, RouteKind, TABLE_MAIN};
use super::plan::Operation;
use crate::kernel::netlink::Socket;
pub use crate::kernel::netlink::{Error, KernelError};

const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;
const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_GETROUTE: u16 = 26;
const RTM_NEWNEIGH: u16 = 28;
const RTM_DELNEIGH: u16 = 29;
const RTM_GETNEIGH: u16 = 30;

/// Requests in one `send`: their acknowledgements must fit into a receive buffer of default size.
const BATCH: usize = 64;
/// An operation that failed: its place in the list, and why.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Index into the operations given to [`Netlink::apply`].
    pub index: usize,
    /// The kernel's answer.
    pub error: KernelError,
}

/// A request socket in the network namespace of the thread that opened it.
pub struct Netlink {
    socket: Socket,
}

impl Netlink {
    /// Opens a socket.
    pub fn open() -> Result<Self, Error> {
        Ok(Self { socket: Socket::open(NETLINK_ROUTE)? })
    }

    /// Returns how many dumps were repeated since the last call because the tables changed meanwhile.
    pub const fn take_interrupted(&mut self) -> usize {
        self.socket.take_interrupted()
    }

    /// Returns the port id that marks the events which our own requests cause.
    #[must_use]
    pub const fn port(&self) -> u32 {
        self.socket.port()
    }

    /// Everything a plan depends on. Foreign routes that cannot matter for `interest` are left out.
    pub fn observe(&mut self, interest: &Interest) -> Result<Observed, Error> {
        let mut observed = Observed { v4_via_v6: self.can_route_v4_via_v6()?, ..Observed::default() };
        observed.links = self.dump(RTM_GETLINK, &[0; 16], codec::decode_link)?.into_iter().collect();
        observed.addresses = self.dump(RTM_GETADDR, &[0; 8], codec::decode_address)?;
        for family in [AF_INET, AF_INET6] {
            let request = [family, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
            let decode = |body: &[u8]| codec::decode_route(body).filter(|route| interest.matters(route));
            observed.routes.append(&mut self.dump(RTM_GETROUTE, &request, decode)?);
        }
        Ok(observed)
    }

    /// The neighbours the kernel knows, and their `NUD_*` states.
    pub fn neighbours(&mut self) -> Result<Vec<(Hop, u16)>, Error> {
        let mut neighbours = Vec::new();
        for family in [AF_INET, AF_INET6] {
            let request = [family, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
            neighbours.append(&mut self.dump(RTM_GETNEIGH, &request, codec::decode_neighbour)?);
        }
        Ok(neighbours)
    }

    /// Applies the operations in order, and goes on after a failure. An operation whose outcome is already there
    /// (something to delete that is gone) has not failed.
    pub fn apply(&mut self, operations: &[Operation]) -> Result<Vec<Failure>, Error> {
        let mut failures = Vec::new();
        for (batch, operations) in operations.chunks(BATCH).enumerate() {
            let requests = operations.iter().map(|operation| match operation {
                Operation::Add(route) => {
                    (RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL, codec::encode_route(route, false))
                }
                Operation::Replace { new, .. } => {
                    (RTM_NEWROUTE, NLM_F_REPLACE, codec::encode_route(new, false))
                }
                Operation::Delete(route) => (RTM_DELROUTE, 0, codec::encode_route(route, true)),
            });
            let answers = self.socket.request(requests)?;
            for (place, (operation, answer)) in operations.iter().zip(answers).enumerate() {
                match (operation, answer) {
                    (_, None) => {}
                    (Operation::Delete(_), Some(error)) if error.errno == libc::ESRCH => {}
                    (_, Some(error)) => failures.push(Failure { index: batch * BATCH + place, error }),
                }
            }
        }
        Ok(failures)
    }

    /// Makes the kernel ask whether each neighbour is still there (ARP, neighbour discovery). The outcome comes as
    /// an event.
    pub fn ask_neighbours(&mut self, neighbours: &[(Hop, Ask)]) -> Result<(), Error> {
        for batch in neighbours.chunks(BATCH) {
            let requests = batch.iter().map(|((address, ifindex), ask)| {
                let flags = match ask {
                    Ask::Resolve => NLM_F_CREATE,
                    Ask::Verify => NLM_F_REPLACE,
                };
                (RTM_NEWNEIGH, flags, codec::encode_neighbour(*address, *ifindex, *ask))
            });
            // An entry that vanished meanwhile is resolved the next time; after a vanished link the plan is made again.
            for error in self.socket.request(requests)?.into_iter().flatten() {
                tracing::debug!(%error, "the kernel does not ask for a neighbour");
            }
        }
        Ok(())
    }

    /// Whether an IPv4 route may have an IPv6 next hop: asked without any effect, by a route through an interface
    /// that cannot exist. A kernel that can reads the next hop first and misses the interface (ENODEV); one that
    /// cannot says so (EINVAL, EAFNOSUPPORT).
    fn can_route_v4_via_v6(&mut self) -> Result<bool, Error> {
        let hop = KernelHop {
            via: Some(IpAddr::from([0xfe80, 0, 0, 0, 0, 0, 0, 1])),
            ifindex: 0x7fff_ffff,
            weight: 1,
        };
        let to = "192.0.2.0/24".parse().expect("TEST-NET-1 of RFC 5737");
        let key = RouteKey { table: TABLE_MAIN, to, tos: 0, metric: u32::MAX };
        let route = KernelRoute {
            key,
            protocol: PROTOCOL,
            kind: RouteKind::Unicast,
            hops: vec![hop],
            altered: false,
        };
        let answers = self.socket.request(std::iter::once((
            RTM_NEWROUTE,
            NLM_F_EXCL,
            codec::encode_route(&route, false),
        )))?;
        Ok(answers.into_iter().flatten().all(|error| error.errno == libc::ENODEV))
    }

    fn dump<T>(
        &mut self,
        kind: u16,
        body: &[u8],
        decode: impl Fn(&[u8]) -> Option<T>,
    ) -> Result<Vec<T>, Error> {
        self.socket.dump(kind, body, |_, body| decode(body))
    }
}
