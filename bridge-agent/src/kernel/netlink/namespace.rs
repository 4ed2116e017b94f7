//! Network namespaces of other processes, and their end.

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd},
};

use netlink_sys::protocols::NETLINK_ROUTE;

use super::{Error, RECEIVE_BUFFER, Socket, attribute, encode_attribute, messages, receive, subscribe};

const RTM_NEWNSID: u16 = 88;
const RTM_DELNSID: u16 = 89;
const RTM_GETNSID: u16 = 90;
const NETNSA_NSID: u16 = 1;
const NETNSA_FD: u16 = 3;
/// Group of rtnetlink.
const RTNLGRP_NSID: u32 = 28;
/// `struct rtgenmsg`, padded.
const HEADER: [u8; 4] = [0; 4];

/// A descriptor of a network namespace, which keeps it alive.
#[derive(Debug)]
pub struct Namespace(OwnedFd);

impl Namespace {
    /// The namespace of a socket. For one that `accept` has made it is that of the client, also where its process is not to be seen.
    ///
    /// # Errors
    ///
    /// Without `CAP_NET_ADMIN`.
    pub fn of(socket: impl AsFd) -> io::Result<Self> {
        const SIOCGSKNS: libc::c_ulong = 0x894c;
        // SAFETY: takes no argument.
        let fd = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), SIOCGSKNS as _) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new descriptor without another owner.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Returns the number of this namespace in that of the thread, where it gets one if it has none.
    ///
    /// # Errors
    ///
    /// The kernel's refusal.
    pub fn number(&self) -> io::Result<i32> {
        let mut socket = Socket::open(NETLINK_ROUTE)?;
        let mut body = HEADER.to_vec();
        body.extend(encode_attribute(NETNSA_FD, &self.0.as_raw_fd().to_ne_bytes()));
        let known = |socket: &mut Socket| -> io::Result<Option<i32>> {
            let found = socket.get(RTM_GETNSID, &body, |_, body| number_in(body))?;
            Ok(found.into_iter().next().filter(|number| *number >= 0))
        };
        if let Some(number) = known(&mut socket)? {
            return Ok(number);
        }
        let mut wish = body.clone();
        wish.extend(encode_attribute(NETNSA_NSID, &(-1_i32).to_ne_bytes()));
        // A refusal can mean that it has got one meanwhile.
        socket.request(std::iter::once((RTM_NEWNSID, 0, wish)))?;
        known(&mut socket)?.ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

fn number_in(body: &[u8]) -> Option<i32> {
    Some(i32::from_ne_bytes(*attribute(body.get(HEADER.len()..)?, NETNSA_NSID)?.first_chunk()?))
}

/// Notices the end of namespaces that have a number.
pub(crate) struct NamespaceWatch {
    socket: netlink_sys::Socket,
    buffer: Vec<u8>,
}

impl NamespaceWatch {
    /// Watches from now on.
    pub(crate) fn open() -> io::Result<Self> {
        Ok(Self { socket: subscribe(&[RTNLGRP_NSID])?, buffer: Vec::with_capacity(RECEIVE_BUFFER) })
    }

    /// Returns the numbers of namespaces that have ended since the last call, as far as notifications were not lost.
    pub(crate) fn ended(&mut self) -> Vec<i32> {
        let mut ended = Vec::new();
        loop {
            match receive(&self.socket, &mut self.buffer) {
                Ok(()) => {
                    let deleted =
                        messages(&self.buffer).flatten().filter(|(header, _)| header.kind == RTM_DELNSID);
                    ended.extend(deleted.filter_map(|(_, body)| number_in(body)));
                }
                Err(Error::Overrun) => {}
                Err(_) => return ended,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_is_read_from_a_notification() {
        let mut body = HEADER.to_vec();
        body.extend(encode_attribute(NETNSA_NSID, &7_i32.to_ne_bytes()));
        assert_eq!((number_in(&body), number_in(&HEADER), number_in(&[])), (Some(7), None, None));
    }
}
