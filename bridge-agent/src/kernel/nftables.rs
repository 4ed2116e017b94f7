//! Changes of the nf_tables ruleset: its generation, one small question that shows whether any program changed a rule, and
//! the kernel's notifications, which name the tables that changed.

use std::io;

use netlink_sys::protocols::NETLINK_NETFILTER;

use super::netlink::{self, Error, RECEIVE_BUFFER, Socket, attribute, messages, receive};

/// `NFNL_SUBSYS_NFTABLES` and `NFT_MSG_GETGEN` (linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h).
const GET_GENERATION: u16 = (10 << 8) | 16;
const NFTA_GEN_ID: u16 = 1;
/// Bytes of `struct nfgenmsg`.
const NFGEN_HEADER: usize = 4;

/// A socket to nf_tables in the network namespace of the thread that opens it.
#[derive(Debug)]
pub struct Ruleset {
    socket: Socket,
}

impl Ruleset {
    /// Opens the socket.
    ///
    /// # Errors
    /// Of `socket(2)`, `bind(2)` and `connect(2)`.
    pub fn open() -> io::Result<Self> {
        Ok(Self { socket: Socket::open(NETLINK_NETFILTER)? })
    }

    /// Returns a number that grows with every change of the ruleset by any program.
    ///
    /// # Errors
    /// The kernel has no nf_tables.
    pub fn generation(&mut self) -> io::Result<u32> {
        generation(&mut self.socket)
    }
}

/// As [`Ruleset::generation`], on a socket that is open.
pub(crate) fn generation(socket: &mut Socket) -> io::Result<u32> {
    let generation = |_, body: &[u8]| {
        let value = attribute(body.get(NFGEN_HEADER..)?, NFTA_GEN_ID)?;
        Some(u32::from_be_bytes(value.try_into().ok()?))
    };
    let found = socket.get(GET_GENERATION, &[0; NFGEN_HEADER], generation)?;
    found
        .first()
        .copied()
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the kernel's answer has no generation"))
}

/// `NFNLGRP_NFTABLES` (linux/netfilter/nfnetlink.h).
const GROUP: u32 = 7;
/// The name of the table in messages about tables, chains, rules, sets, elements and objects alike.
const TABLE_NAME: u16 = 1;

/// Notifications of changes, from the time it was opened, in the network namespace of the thread that opens it.
pub struct Changes {
    socket: netlink_sys::Socket,
    buffer: Vec<u8>,
}

impl std::fmt::Debug for Changes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Changes").finish_non_exhaustive()
    }
}

impl Changes {
    /// Subscribes to the changes of every table.
    ///
    /// # Errors
    /// Of `socket(2)` and `setsockopt(2)`.
    pub fn open() -> io::Result<Self> {
        let socket = netlink::subscribe_to(NETLINK_NETFILTER, &[GROUP])?;
        Ok(Self { socket, buffer: Vec::with_capacity(RECEIVE_BUFFER) })
    }

    /// Returns whether a table of this name may have changed since the last call; does not wait.
    ///
    /// Other programs may write more at once than the socket holds: then every table may have.
    ///
    /// # Errors
    /// Of `recv(2)`.
    pub fn touched(&mut self, table: &str) -> io::Result<bool> {
        let mut touched = false;
        loop {
            match receive(&self.socket, &mut self.buffer) {
                Ok(()) => touched |= messages(&self.buffer).any(|message| names(message, table)),
                Err(Error::Overrun | Error::Malformed(_)) => touched = true,
                Err(Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => return Ok(touched),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Whether a notification is about this table, or cannot be read.
fn names(message: Result<(netlink::Header, &[u8]), Error>, table: &str) -> bool {
    let Ok((_, body)) = message else { return true };
    let name = body.get(NFGEN_HEADER..).and_then(|attributes| attribute(attributes, TABLE_NAME));
    name.and_then(|name| name.strip_suffix(&[0])) == Some(table.as_bytes())
}
