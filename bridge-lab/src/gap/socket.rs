//! Many frames with one system call each (packet(7), sendmmsg(2), recvmmsg(2)).

use std::io;
use std::mem::zeroed;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use socket2::{SockFilter, Socket};

use crate::lab::Netns;
use crate::wire::{self, BUFFER};

/// Frames of one system call.
pub(crate) const BATCH: usize = 64;
/// Room for a frame of the meter, and enough of others to distinguish them.
const ROOM: usize = 256;

/// Sends frames out of an interface.
#[derive(Debug)]
pub(crate) struct Sender(Socket);

impl Sender {
    pub(crate) fn new(netns: &Netns, interface: &str) -> io::Result<Self> {
        let socket = netns.run(|| wire::open(interface, 0))?;
        wire::set(&socket, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, BUFFER)?;
        Ok(Self(socket))
    }

    /// Sends all of them, in order; at most [`BATCH`].
    pub(crate) fn send(&self, frames: &mut [Vec<u8>]) -> io::Result<()> {
        let mut vectors: Vec<libc::iovec> = frames
            .iter_mut()
            .map(|frame| libc::iovec { iov_base: frame.as_mut_ptr().cast(), iov_len: frame.len() })
            .collect();
        let mut messages = headers(&mut vectors);
        let mut sent = 0;
        while sent < messages.len() {
            let left = &mut messages[sent..];
            let count = libc::c_uint::try_from(left.len()).map_err(io::Error::other)?;
            // SAFETY: `count` headers, each pointing to one vector, which points to a live frame of that length.
            let result = unsafe { libc::sendmmsg(self.0.as_raw_fd(), left.as_mut_ptr(), count, 0) };
            match usize::try_from(result) {
                Ok(count) => sent += count,
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.raw_os_error() != Some(libc::ENOBUFS)
                        && error.kind() != io::ErrorKind::Interrupted
                    {
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }
}

fn headers(vectors: &mut [libc::iovec]) -> Vec<libc::mmsghdr> {
    vectors
        .iter_mut()
        .map(|vector| {
            // SAFETY: plain data, for which all zeroes is a value.
            let mut message: libc::mmsghdr = unsafe { zeroed() };
            message.msg_hdr.msg_iov = vector;
            message.msg_hdr.msg_iovlen = 1;
            message
        })
        .collect()
}

/// Sees the IPv4 packets to one address that come in by an interface.
#[derive(Debug)]
pub(crate) struct Receiver {
    socket: Socket,
    buffer: Vec<u8>,
}

impl Receiver {
    pub(crate) fn new(netns: &Netns, interface: &str, to: Ipv4Addr) -> io::Result<Self> {
        let socket = netns.run(|| wire::open(interface, libc::ETH_P_IP))?;
        wire::set(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, BUFFER)?;
        // ld [30] (destination address); jeq; accept 64 KiB, or nothing.
        let accept = [
            SockFilter::new(0x20, 0, 0, 30),
            SockFilter::new(0x15, 0, 1, u32::from(to)),
            SockFilter::new(0x06, 0, 0, 0xffff),
            SockFilter::new(0x06, 0, 0, 0),
        ];
        socket.attach_filter(&accept)?;
        socket.set_read_timeout(Some(Duration::from_millis(20)))?;
        Ok(Self { socket, buffer: vec![0; BATCH * ROOM] })
    }

    /// Waits a little for frames, and shows each.
    pub(crate) fn receive(&mut self, mut visit: impl FnMut(&[u8])) -> io::Result<()> {
        let mut vectors: Vec<libc::iovec> = self
            .buffer
            .chunks_mut(ROOM)
            .map(|room| libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: ROOM })
            .collect();
        let mut messages = headers(&mut vectors);
        // SAFETY: as many headers as said, each with one vector of room in the live buffer; no time-out is passed.
        let result = unsafe {
            libc::recvmmsg(
                self.socket.as_raw_fd(),
                messages.as_mut_ptr(),
                libc::c_uint::try_from(BATCH).map_err(io::Error::other)?,
                libc::MSG_WAITFORONE,
                std::ptr::null_mut(),
            )
        };
        let Ok(count) = usize::try_from(result) else {
            let error = io::Error::last_os_error();
            let nothing = matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted);
            return if nothing { Ok(()) } else { Err(error) };
        };
        let lengths: Vec<usize> =
            messages.iter().take(count).map(|message| message.msg_len as usize).collect();
        for (room, length) in self.buffer.chunks(ROOM).zip(lengths) {
            visit(&room[..length.min(ROOM)]);
        }
        Ok(())
    }
}
