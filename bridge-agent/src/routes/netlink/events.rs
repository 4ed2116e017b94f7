//! What others do to routes, links, addresses and neighbours, as it happens.

use std::io;

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_recv_buffer_size_force};
use tokio::io::unix::AsyncFd;

use super::{
    Error, RTM_DELADDR, RTM_DELLINK, RTM_DELNEIGH, RTM_DELROUTE, RTM_NEWADDR, RTM_NEWLINK, RTM_NEWNEIGH,
    RTM_NEWROUTE, codec,
};
use crate::kernel::netlink::{Header, RECEIVE_BUFFER, messages, receive};
use crate::routes::model::Hop;
use crate::routes::model::KernelRoute;

/// `RTNLGRP_*` of `linux/rtnetlink.h`.
const GROUPS: [u32; 6] = [
    libc::RTNLGRP_LINK,
    libc::RTNLGRP_NEIGH,
    libc::RTNLGRP_IPV4_IFADDR,
    libc::RTNLGRP_IPV6_IFADDR,
    libc::RTNLGRP_IPV4_ROUTE,
    libc::RTNLGRP_IPV6_ROUTE,
];

/// Something changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A route came, changed or went.
    Route(KernelRoute),
    /// A link or an address came, changed or went. IPv4 routes go silently with them.
    Topology,
    /// What the kernel knows of a neighbour.
    Neighbour {
        /// Which one.
        hop: Hop,
        /// `NUD_*` of `linux/neighbour.h`; 0 (`NUD_NONE`) if it was forgotten.
        state: u16,
    },
    /// Events were lost (ENOBUFS): anything may have changed.
    Overrun,
}

/// A stream of events in the network namespace of the thread that opened it.
pub struct Events {
    socket: AsyncFd<Socket>,
    ignored_port: u32,
    buffer: Vec<u8>,
}

impl Events {
    /// Opens the stream; events caused by requests of `ignored_port` are left out. What happens from here on is
    /// seen, so a dump that is read later misses nothing.
    ///
    /// `receive_bytes` is what the kernel may hold for us before it drops events.
    pub fn open(ignored_port: u32, receive_bytes: usize) -> Result<Self, Error> {
        let mut socket = Socket::new(NETLINK_ROUTE).map_err(Error::Open)?;
        socket.bind(&SocketAddr::new(0, 0)).map_err(Error::Open)?;
        // Beyond net.core.rmem_max only with CAP_NET_ADMIN in the first user namespace. Less is not wrong: loss
        // comes sooner, and loss is noticed.
        if set_socket_recv_buffer_size_force(&socket, receive_bytes).is_err() {
            set_socket_recv_buffer_size(&socket, receive_bytes).map_err(|error| Error::Open(error.into()))?;
        }
        socket.set_non_blocking(true).map_err(Error::Open)?;
        for group in GROUPS {
            socket.add_membership(group).map_err(Error::Open)?;
        }
        // SAFETY: `Socket` owns its descriptor and gives out the same one for as long as it lives.
        let socket = unsafe { AsyncFd::register(socket) }.map_err(|error| Error::Open(error.into()))?;
        Ok(Self { socket, ignored_port, buffer: Vec::with_capacity(RECEIVE_BUFFER) })
    }

    /// Waits until there are events and appends them to `events`.
    pub async fn next(&mut self, events: &mut Vec<Event>) -> Result<(), Error> {
        loop {
            let mut ready = self.socket.readable().await?;
            if read(ready.get_inner(), &mut self.buffer, self.ignored_port, events)? {
                return Ok(());
            }
            ready.clear_ready();
        }
    }

    /// Appends to `events` what is there, without waiting.
    pub fn drain(&mut self, events: &mut Vec<Event>) -> Result<(), Error> {
        while read(self.socket.get_ref(), &mut self.buffer, self.ignored_port, events)? {}
        Ok(())
    }
}

/// Reads one datagram; false if there is none.
fn read(
    socket: &Socket,
    buffer: &mut Vec<u8>,
    ignored_port: u32,
    events: &mut Vec<Event>,
) -> Result<bool, Error> {
    match receive(socket, buffer) {
        Ok(()) => {}
        Err(Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
        Err(Error::Overrun) => {
            events.push(Event::Overrun);
            return Ok(true);
        }
        Err(error) => return Err(error),
    }
    for message in messages(buffer) {
        let (header, body) = message?;
        // The port of a multicast is the port of the request that caused it.
        if header.port == 0 || header.port != ignored_port {
            events.extend(decode(&header, body));
        }
    }
    Ok(true)
}

fn decode(header: &Header, body: &[u8]) -> Option<Event> {
    match header.kind {
        RTM_NEWROUTE | RTM_DELROUTE => codec::decode_route(body).map(Event::Route),
        RTM_NEWLINK | RTM_DELLINK | RTM_NEWADDR | RTM_DELADDR => Some(Event::Topology),
        RTM_NEWNEIGH | RTM_DELNEIGH => {
            let (hop, state) = codec::decode_neighbour(body)?;
            let state = if header.kind == RTM_DELNEIGH { 0 } else { state };
            Some(Event::Neighbour { hop, state })
        }
        _ => None,
    }
}
