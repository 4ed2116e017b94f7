//! rtnetlink(7) with the message types of `netlink-packet-route`.

use std::io;

use netlink_packet_core::{NetlinkDeserializable, NetlinkHeader, NetlinkSerializable};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::protocols::NETLINK_ROUTE;
use tokio::io::{Interest, unix::AsyncFd};

use super::{Error, RECEIVE_BUFFER, Socket, messages, receive, subscribe};

/// A request socket of rtnetlink in the network namespace of the thread that opens it.
#[derive(Debug)]
pub struct Route {
    socket: Socket,
}

impl Route {
    /// Opens a socket.
    ///
    /// # Errors
    ///
    /// Of `socket(2)`, `bind(2)` and `connect(2)`.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::open(NETLINK_ROUTE)?;
        socket.check_strictly();
        Ok(Self { socket })
    }

    /// Reads every object that `request` selects.
    ///
    /// # Errors
    ///
    /// The kernel's refusal; [`io::ErrorKind::Interrupted`] if the objects changed during each of several dumps.
    pub fn dump(&mut self, request: RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
        let (kind, body) = encode(&request);
        Ok(self.socket.dump(kind, &body, message_of)?)
    }

    /// Reads the objects that answer one request.
    ///
    /// # Errors
    ///
    /// The kernel's refusal.
    pub(super) fn get(&mut self, request: &RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
        let (kind, body) = encode(request);
        Ok(self.socket.get(kind, &body, message_of)?)
    }

    /// Requests a change and waits until it is made.
    ///
    /// # Errors
    ///
    /// The kernel's refusal.
    pub fn change(&mut self, request: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        let (kind, body) = encode(&request);
        let answers = self.socket.request(std::iter::once((kind, flags, body)))?;
        match answers.into_iter().flatten().next() {
            Some(error) => Err(Error::Refused(error).into()),
            None => Ok(()),
        }
    }
}

fn encode(message: &RouteNetlinkMessage) -> (u16, Vec<u8>) {
    let mut body = vec![0; message.buffer_len()];
    message.serialize(&mut body);
    (message.message_type(), body)
}

/// Decodes the body of a message; `None` for one that `netlink-packet-route` does not know.
pub(crate) fn message_of(kind: u16, body: &[u8]) -> Option<RouteNetlinkMessage> {
    let mut header = NetlinkHeader::default();
    header.message_type = kind;
    RouteNetlinkMessage::deserialize(&header, body)
        .inspect_err(|error| tracing::debug!(%error, kind, "a netlink message cannot be decoded"))
        .ok()
}

/// Returns the name of the interface with this index, if there is one.
#[must_use]
pub fn interface_name(index: u32) -> Option<String> {
    let socket =
        rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None).ok()?;
    rustix::net::netdevice::index_to_name(socket, index).ok()
}

/// Notifies of changes to interfaces, addresses, routes and neighbours.
#[derive(Debug)]
pub struct Watch {
    socket: AsyncFd<netlink_sys::Socket>,
    buffer: Vec<u8>,
}

impl Watch {
    /// Watches the network namespace of this thread, inside a tokio runtime.
    ///
    /// # Errors
    ///
    /// Of `socket(2)` and `setsockopt(2)`.
    pub fn open() -> io::Result<Self> {
        let socket = subscribe(&[
            libc::RTNLGRP_LINK,
            libc::RTNLGRP_IPV4_IFADDR,
            libc::RTNLGRP_IPV6_IFADDR,
            libc::RTNLGRP_IPV4_ROUTE,
            libc::RTNLGRP_IPV6_ROUTE,
            libc::RTNLGRP_NEIGH,
        ])?;
        // SAFETY: the socket owns its descriptor, hands out no other, and is owned by what is registered.
        let socket = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE)? };
        Ok(Self { socket, buffer: Vec::with_capacity(RECEIVE_BUFFER) })
    }

    /// Waits for a change that `matters`, and consumes every notification so far. Cancel safe.
    ///
    /// # Errors
    ///
    /// Of `recv(2)`.
    pub async fn changed(&mut self, mut matters: impl FnMut(&RouteNetlinkMessage) -> bool) -> io::Result<()> {
        loop {
            let mut ready = self.socket.readable().await?;
            let mut any = false;
            loop {
                match receive(ready.get_inner(), &mut self.buffer) {
                    Ok(()) => {
                        for message in messages(&self.buffer) {
                            let (header, body) = message?;
                            any |= message_of(header.kind, body).is_some_and(|message| matters(&message));
                        }
                    }
                    // Notifications were lost: anything may have changed.
                    Err(Error::Overrun) => any = true,
                    Err(Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error.into()),
                }
            }
            ready.clear_ready();
            if any {
                return Ok(());
            }
        }
    }
}
