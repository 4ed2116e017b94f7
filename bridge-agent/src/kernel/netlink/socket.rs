//! A socket for requests to the kernel.

use std::io;

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST};
use netlink_sys::SocketAddr;

use super::{
    Error, KernelError,
    frame::{Reply, frame, parse_replies},
};

/// The kernel fills at most this much in one datagram of a dump (`NLMSG_GOODSIZE` grown to the reader's buffer).
pub(crate) const RECEIVE_BUFFER: usize = 32 * 1024;
/// A dump that the kernel marks as inconsistent is repeated this often before it fails.
const DUMP_ATTEMPTS: usize = 8;

/// A request socket in the network namespace of the thread that opened it.
pub(crate) struct Socket {
    socket: netlink_sys::Socket,
    port: u32,
    sequence: u32,
    buffer: Vec<u8>,
    interrupted: usize,
}

impl std::fmt::Debug for Socket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Socket").field("port", &self.port).finish_non_exhaustive()
    }
}

impl Socket {
    /// Opens a socket of a `NETLINK_*` protocol.
    pub(crate) fn open(protocol: isize) -> Result<Self, Error> {
        let mut socket = netlink_sys::Socket::new(protocol).map_err(Error::Open)?;
        let port = socket.bind_auto().map_err(Error::Open)?.port_number();
        socket.connect(&SocketAddr::new(0, 0)).map_err(Error::Open)?;
        // The reason of a refusal, without a copy of the request. Both fail on no kernel that is supported.
        _ = socket.set_ext_ack(true);
        _ = socket.set_cap_ack(true);
        Ok(Self { socket, port, sequence: 0, buffer: Vec::with_capacity(RECEIVE_BUFFER), interrupted: 0 })
    }

    /// Makes the kernel honour every field of a dump request (`NETLINK_GET_STRICT_CHK`), such as an interface index.
    pub(crate) fn check_strictly(&mut self) {
        drop(self.socket.set_netlink_get_strict_chk(true));
    }

    /// Returns the port id, which marks the notifications that requests of this socket cause.
    pub(crate) const fn port(&self) -> u32 {
        self.port
    }

    /// Returns how many dumps were repeated since the last call.
    pub(crate) const fn take_interrupted(&mut self) -> usize {
        std::mem::replace(&mut self.interrupted, 0)
    }

    /// Sends requests in one datagram and returns their answers in the same order; `None` is success.
    ///
    /// The acknowledgements must fit into a receive buffer of default size: keep to some 64 requests.
    pub(crate) fn request(
        &mut self,
        requests: impl Iterator<Item = (u16, u16, Vec<u8>)>,
    ) -> Result<Vec<Option<KernelError>>, Error> {
        let first = self.sequence.wrapping_add(1);
        let (mut bytes, mut missing) = (Vec::new(), 0);
        for (kind, flags, body) in requests {
            self.append(&mut bytes, kind, NLM_F_ACK | flags, &body);
            missing += 1;
        }
        self.socket.send(&bytes, 0)?;
        let mut answers = vec![None; missing];
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

    /// Sends a batch that succeeds or fails as a whole, in which one message has `NLM_F_ACK`.
    pub(crate) fn batch(&mut self, messages: &[(u16, u16, Vec<u8>)]) -> Result<(), Error> {
        let first = self.sequence.wrapping_add(1);
        let mut bytes = Vec::new();
        for (kind, flags, body) in messages {
            self.append(&mut bytes, *kind, *flags, body);
        }
        self.socket.send(&bytes, 0)?;
        loop {
            self.receive()?;
            for reply in parse_replies(&self.buffer) {
                if let (sequence, _, Reply::Answer(error)) = reply?
                    && (sequence.wrapping_sub(first) as usize) < messages.len()
                {
                    return error.map_or(Ok(()), |error| Err(Error::Refused(error)));
                }
            }
        }
    }

    /// Reads one object, or the objects that answer one request.
    pub(crate) fn get<T>(
        &mut self,
        kind: u16,
        body: &[u8],
        mut decode: impl FnMut(u16, &[u8]) -> Option<T>,
    ) -> Result<Vec<T>, Error> {
        let mut found = Vec::new();
        self.read(kind, NLM_F_ACK, body, |kind, body| found.extend(decode(kind, body)))?;
        Ok(found)
    }

    /// Reads every object of a kind: `decode` gets message type and body, and returns `None` for an object to leave out.
    /// Repeats a dump that the kernel marks as inconsistent.
    pub(crate) fn dump<T>(
        &mut self,
        kind: u16,
        body: &[u8],
        mut decode: impl FnMut(u16, &[u8]) -> Option<T>,
    ) -> Result<Vec<T>, Error> {
        for _ in 0..DUMP_ATTEMPTS {
            let mut found = Vec::new();
            match self.dump_once(kind, body, |kind, body| found.extend(decode(kind, body))) {
                Err(Error::Interrupted) => self.interrupted += 1,
                Err(error) => return Err(error),
                Ok(()) => return Ok(found),
            }
        }
        Err(Error::Interrupted)
    }

    /// Visits every object of a kind once, without keeping any.
    pub(crate) fn dump_once(
        &mut self,
        kind: u16,
        body: &[u8],
        visit: impl FnMut(u16, &[u8]),
    ) -> Result<(), Error> {
        self.read(kind, NLM_F_DUMP, body, visit)
    }

    fn read(
        &mut self,
        kind: u16,
        flags: u16,
        body: &[u8],
        mut visit: impl FnMut(u16, &[u8]),
    ) -> Result<(), Error> {
        let mut bytes = Vec::new();
        self.append(&mut bytes, kind, flags, body);
        let sequence = self.sequence;
        self.socket.send(&bytes, 0)?;
        let mut interrupted = false;
        loop {
            self.receive()?;
            for reply in parse_replies(&self.buffer) {
                let (of, inconsistent, reply) = reply?;
                // The rest of an earlier dump that failed.
                if of != sequence {
                    continue;
                }
                interrupted |= inconsistent;
                match reply {
                    Reply::Object(kind, body) => visit(kind, body),
                    Reply::Answer(Some(error)) => return Err(Error::Refused(error)),
                    // Read to the end first: nothing of it is left for the next request.
                    Reply::Answer(None) if interrupted => return Err(Error::Interrupted),
                    Reply::Answer(None) => return Ok(()),
                }
            }
        }
    }

    fn append(&mut self, bytes: &mut Vec<u8>, kind: u16, flags: u16, body: &[u8]) {
        self.sequence = self.sequence.wrapping_add(1);
        frame(bytes, kind, NLM_F_REQUEST | flags, self.sequence, body);
    }

    fn receive(&mut self) -> Result<(), Error> {
        receive(&self.socket, &mut self.buffer)
    }
}

/// Reads one datagram into `buffer`.
pub(crate) fn receive(socket: &netlink_sys::Socket, buffer: &mut Vec<u8>) -> Result<(), Error> {
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
