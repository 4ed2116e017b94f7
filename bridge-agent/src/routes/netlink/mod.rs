//! The thin layer over rtnetlink: read everything, apply operations, watch for changes.
//!
//! Requests block for as long as the kernel works on them, which is all the work there is: the kernel handles
//! rtnetlink inside the system call. Events come on a socket of their own, see [`Events`].

mod codec;
mod events;
mod frame;
mod interest;

use std::io;
use std::net::IpAddr;

use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use thiserror::Error;

pub use events::{Event, Events};
pub use interest::Interest;

use self::frame::{Reply, frame, parse_replies};
use super::Operation;
use super::health::{Ask, Hop};
use super::model::{KernelHop, KernelRoute, Observed, PROTOCOL, RouteKey, RouteKind, TABLE_MAIN};

/// `sa_family_t`, of one byte in every rtnetlink header.
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

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

/// The kernel fills at most this much in one datagram of a dump (`NLMSG_GOODSIZE` grown to the reader's buffer).
const RECEIVE_BUFFER: usize = 32 * 1024;
/// Requests in one `send`: their acknowledgements must fit into a receive buffer of default size.
const BATCH: usize = 64;
/// How often a dump that changed while it was read is read again before the caller is told.
const DUMP_ATTEMPTS: usize = 8;

/// Why the kernel could not be read or changed.
#[derive(Debug, Error)]
pub enum Error {
    /// No netlink socket.
    #[error("cannot open a route netlink socket: {0}; changing routes takes CAP_NET_ADMIN")]
    Open(#[source] io::Error),
    /// A system call failed.
    #[error("route netlink: {0}")]
    Io(#[from] io::Error),
    /// The kernel dropped messages because they were not read in time (ENOBUFS).
    #[error("route netlink: the kernel dropped messages (ENOBUFS); everything is read again")]
    Overrun,
    /// The table changed while it was read (`NLM_F_DUMP_INTR`), and did so each time it was tried.
    #[error("route netlink: the tables change faster than they can be read; everything is read again")]
    Interrupted,
    /// The kernel sent what is not netlink.
    #[error("route netlink: a message that cannot be understood ({0})")]
    Malformed(String),
    /// The kernel refused a request.
    #[error("{0}")]
    Refused(KernelError),
}

/// The kernel's answer to a request it did not carry out.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{}{}", io::Error::from_raw_os_error(*.errno), message.as_ref().map(|m| format!(" ({m})")).unwrap_or_default())]
pub struct KernelError {
    /// Positive `errno`.
    pub errno: i32,
    /// Its own words (`NLMSGERR_ATTR_MSG`), if it had any.
    pub message: Option<String>,
}

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
    port: u32,
    sequence: u32,
    buffer: Vec<u8>,
    /// Dumps that changed while they were read, since they were last asked for.
    interrupted: usize,
}

impl Netlink {
    /// Opens a socket.
    pub fn open() -> Result<Self, Error> {
        let mut socket = Socket::new(NETLINK_ROUTE).map_err(Error::Open)?;
        let port = socket.bind_auto().map_err(Error::Open)?.port_number();
        socket.connect(&SocketAddr::new(0, 0)).map_err(Error::Open)?;
        // Words of explanation, without our own message sent back to us. Kernels without them say less, that is all.
        _ = socket.set_ext_ack(true);
        _ = socket.set_cap_ack(true);
        Ok(Self { socket, port, sequence: 0, buffer: Vec::with_capacity(RECEIVE_BUFFER), interrupted: 0 })
    }

    /// How many dumps were read again because they changed meanwhile; counted from the last call.
    pub const fn take_interrupted(&mut self) -> usize {
        std::mem::replace(&mut self.interrupted, 0)
    }

    /// The port id that marks the events our own requests cause.
    #[must_use]
    pub const fn port(&self) -> u32 {
        self.port
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
            let answers = self.request(requests)?;
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
            // An entry that vanished meanwhile is resolved the next time; a link that vanished is planned anew.
            for error in self.request(requests)?.into_iter().flatten() {
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
        let answers =
            self.request(std::iter::once((RTM_NEWROUTE, NLM_F_EXCL, codec::encode_route(&route, false))))?;
        Ok(answers.into_iter().flatten().all(|error| error.errno == libc::ENODEV))
    }

    /// Sends requests in one go; the answers in the same order, `None` for done.
    fn request(
        &mut self,
        requests: impl Iterator<Item = (u16, u16, Vec<u8>)>,
    ) -> Result<Vec<Option<KernelError>>, Error> {
        let first = self.sequence.wrapping_add(1);
        let mut bytes = Vec::new();
        let mut count = 0;
        for (kind, flags, body) in requests {
            self.sequence = self.sequence.wrapping_add(1);
            frame(&mut bytes, kind, NLM_F_REQUEST | NLM_F_ACK | flags, self.sequence, &body);
            count += 1;
        }
        self.socket.send(&bytes, 0)?;
        let mut answers = vec![None; count];
        let mut missing = count;
        while missing > 0 {
            self.receive()?;
            for reply in parse_replies(&self.buffer) {
                if let (sequence, _, Reply::Answer(error)) = reply?
                    && let Some(answer) = answers.get_mut(sequence.wrapping_sub(first) as usize)
                {
                    *answer = error;
                    missing -= 1;
                }
            }
        }
        Ok(answers)
    }

    fn dump<T>(
        &mut self,
        kind: u16,
        body: &[u8],
        decode: impl Fn(&[u8]) -> Option<T>,
    ) -> Result<Vec<T>, Error> {
        for _ in 0..DUMP_ATTEMPTS {
            match self.dump_once(kind, body, &decode) {
                Err(Error::Interrupted) => self.interrupted += 1,
                outcome => return outcome,
            }
        }
        Err(Error::Interrupted)
    }

    fn dump_once<T>(
        &mut self,
        kind: u16,
        body: &[u8],
        decode: impl Fn(&[u8]) -> Option<T>,
    ) -> Result<Vec<T>, Error> {
        self.sequence = self.sequence.wrapping_add(1);
        let sequence = self.sequence;
        let mut bytes = Vec::new();
        frame(&mut bytes, kind, NLM_F_REQUEST | NLM_F_DUMP, sequence, body);
        self.socket.send(&bytes, 0)?;
        let mut found = Vec::new();
        let mut interrupted = false;
        loop {
            self.receive()?;
            for reply in parse_replies(&self.buffer) {
                let (of, was_interrupted, reply) = reply?;
                // What is left of an earlier dump that was given up.
                if of != sequence {
                    continue;
                }
                interrupted |= was_interrupted;
                match reply {
                    Reply::Object(_, body) => found.extend(decode(body)),
                    Reply::Answer(Some(error)) => return Err(Error::Refused(error)),
                    // Read to the end first, so that nothing of it is left for the next request.
                    Reply::Answer(None) if interrupted => return Err(Error::Interrupted),
                    Reply::Answer(None) => return Ok(found),
                }
            }
        }
    }

    fn receive(&mut self) -> Result<(), Error> {
        receive(&self.socket, &mut self.buffer)
    }
}

/// Reads one datagram into `buffer`.
fn receive(socket: &Socket, buffer: &mut Vec<u8>) -> Result<(), Error> {
    loop {
        buffer.clear();
        // Without spare room `recv` would read into nothing.
        buffer.reserve(RECEIVE_BUFFER);
        return match socket.recv(buffer, libc::MSG_TRUNC) {
            Ok(length) if length > buffer.len() => {
                Err(Error::Malformed(format!("a datagram of {length} bytes")))
            }
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => Err(Error::Overrun),
            Err(error) => Err(Error::Io(error)),
        };
    }
}
