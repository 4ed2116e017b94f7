//! Single requests to rtnetlink(7), and the news it tells.

use std::io;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use tokio::io::{Interest, unix::AsyncFd};

/// A socket of rtnetlink in the network namespace of the thread that opens it.
#[derive(Debug)]
pub struct Route {
    socket: Socket,
    sequence: u32,
}

impl Route {
    /// Opens one.
    ///
    /// # Errors
    ///
    /// Of `socket(2)`, `bind(2)` and `connect(2)`.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // So that a dump of one interface is of that interface only; kernels since 4.20 have it.
        drop(socket.set_netlink_get_strict_chk(true));
        Ok(Self { socket, sequence: 0 })
    }

    /// Asks for every object of a kind.
    ///
    /// # Errors
    ///
    /// What the kernel answers; [`io::ErrorKind::Interrupted`] if the objects changed while they were read.
    pub fn dump(&mut self, request: RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.request(request, NLM_F_DUMP)
    }

    /// Asks for a change, and waits until it is made.
    ///
    /// # Errors
    ///
    /// What the kernel answers.
    pub fn change(&mut self, request: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.request(request, flags | NLM_F_ACK).map(drop)
    }

    fn request(&mut self, request: RouteNetlinkMessage, flags: u16) -> io::Result<Vec<RouteNetlinkMessage>> {
        const NLM_F_DUMP_INTR: u16 = 0x10;
        self.sequence += 1;
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(request));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;

        let mut answers = Vec::new();
        let mut interrupted = false;
        loop {
            let (bytes, _) = self.socket.recv_from_full()?;
            let mut rest = &bytes[..];
            while let Some((message, after)) = next(rest)? {
                rest = after;
                if message.header.sequence_number != self.sequence {
                    continue;
                }
                interrupted |= message.header.flags & NLM_F_DUMP_INTR != 0;
                match message.payload {
                    NetlinkPayload::InnerMessage(answer) => answers.push(answer),
                    NetlinkPayload::Done(_) if interrupted => return Err(io::ErrorKind::Interrupted.into()),
                    NetlinkPayload::Done(_) => return Ok(answers),
                    NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                    NetlinkPayload::Error(_) => return Ok(answers),
                    _ => {}
                }
            }
        }
    }
}

/// The first message of a buffer, and what follows it. A message of a kind that is not understood is left out.
pub(crate) fn next(mut bytes: &[u8]) -> io::Result<Option<(NetlinkMessage<RouteNetlinkMessage>, &[u8])>> {
    const ALIGNMENT: usize = 4;
    const HEADER: usize = 16;
    while bytes.len() >= HEADER {
        let length = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize;
        if length < HEADER || length > bytes.len() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "netlink message that is cut off"));
        }
        let (message, _) = bytes.split_at(length);
        bytes = bytes.get(length.next_multiple_of(ALIGNMENT)..).unwrap_or_default();
        match NetlinkMessage::deserialize(message) {
            Ok(message) => return Ok(Some((message, bytes))),
            Err(error) => tracing::debug!(%error, "netlink message that is not understood"),
        }
    }
    Ok(None)
}

/// The name of the interface with this index, if there is one.
#[must_use]
pub fn interface_name(index: u32) -> Option<String> {
    let socket =
        rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None).ok()?;
    rustix::net::netdevice::index_to_name(socket, index).ok()
}

/// A socket that tells the news of groups (linux/rtnetlink.h) in the network namespace of this thread, and does not block.
///
/// # Errors
///
/// Of `socket(2)` and `setsockopt(2)`.
pub(crate) fn subscribe(groups: &[u32]) -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    for group in groups {
        socket.add_membership(*group)?;
    }
    socket.set_non_blocking(true)?;
    Ok(socket)
}

/// Tells that interfaces, addresses or routes have changed.
#[derive(Debug)]
pub struct Watch {
    socket: AsyncFd<Socket>,
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
        ])?;
        // SAFETY: the socket owns its descriptor, hands out no other, and is owned by what is registered.
        let socket = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE)? };
        Ok(Self { socket })
    }

    /// Waits for a change that `matters`, and takes in all that were told so far. May be cancelled.
    ///
    /// # Errors
    ///
    /// Of `recv(2)`.
    pub async fn changed(&mut self, matters: impl Fn(&RouteNetlinkMessage) -> bool) -> io::Result<()> {
        loop {
            let mut ready = self.socket.readable().await?;
            let mut any = false;
            loop {
                match ready.get_inner().recv_from_full() {
                    Ok((bytes, _)) => {
                        let mut rest = &bytes[..];
                        while let Some((message, after)) = next(rest)? {
                            rest = after;
                            any = any
                                || matches!(&message.payload, NetlinkPayload::InnerMessage(inner) if matters(inner));
                        }
                    }
                    // More was told than the socket holds: anything may have changed.
                    Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => any = true,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error),
                }
            }
            ready.clear_ready();
            if any {
                return Ok(());
            }
        }
    }
}
