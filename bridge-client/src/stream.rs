//! A connection together with its port.

use std::{
    io::{self, IoSlice, IoSliceMut, Read, Write},
    net::TcpStream,
    ops::{Deref, DerefMut},
};

use crate::Lease;

/// A [`TcpStream`] whose source port goes back to the pool when it is dropped.
#[derive(Debug)]
pub struct Stream {
    // Dropped in this order: the connection, then the lease.
    tcp: TcpStream,
    lease: Option<Lease>,
}

impl Stream {
    pub(crate) fn new(tcp: TcpStream, lease: Option<Lease>) -> Self {
        Self { tcp, lease }
    }

    /// Returns the two parts, for callers that keep the lease longer than the connection.
    #[must_use]
    pub fn into_parts(self) -> (TcpStream, Option<Lease>) {
        (self.tcp, self.lease)
    }

    /// The lease, if the port came from the agent.
    #[must_use]
    pub fn lease(&self) -> Option<&Lease> {
        self.lease.as_ref()
    }
}

impl Deref for Stream {
    type Target = TcpStream;

    fn deref(&self) -> &TcpStream {
        &self.tcp
    }
}

impl DerefMut for Stream {
    fn deref_mut(&mut self) -> &mut TcpStream {
        &mut self.tcp
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.tcp.read(buffer)
    }

    fn read_vectored(&mut self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        self.tcp.read_vectored(buffers)
    }
}

impl Write for Stream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.tcp.write(buffer)
    }

    fn write_vectored(&mut self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        self.tcp.write_vectored(buffers)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.tcp.flush()
    }
}
