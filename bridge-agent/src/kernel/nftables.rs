//! Changes of the nf_tables ruleset: its generation, one small question that shows whether any program changed a rule, and
//! the kernel's notifications, which name the tables that changed.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use netlink_sys::protocols::NETLINK_NETFILTER;

use super::netlink::{self, Error, RECEIVE_BUFFER, Socket, attribute, messages, receive};

/// `NFNL_SUBSYS_NFTABLES` (linux/netfilter/nfnetlink.h).
pub(super) const NFTABLES: u16 = 10;
/// `NFT_MSG_GETGEN` (linux/netfilter/nf_tables.h).
const GET_GENERATION: u16 = (NFTABLES << 8) | 16;
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

/// `NFT_MSG_DELTABLE` (linux/netfilter/nf_tables.h).
const DELETE_TABLE: u16 = (NFTABLES << 8) | 2;
/// `NFPROTO_INET` (linux/netfilter.h).
pub(super) const INET: u8 = 1;
/// Bytes of notifications that may wait: those of a transaction of some 20,000 elements.
const WAITING: usize = 8 << 20;

/// What notifications say about a table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Touched {
    /// Nothing but transactions of the caller.
    #[default]
    No,
    /// Some were lost.
    Perhaps,
    /// Another program has changed it.
    Changed,
    /// Another program has removed it.
    Removed,
}

/// Generations of the ruleset, first and last, among which is a transaction of the caller.
pub type Transaction = (u32, u32);

/// Notifications of changes, from the time it was opened, in the network namespace of the thread that opens it.
pub struct Changes {
    socket: netlink_sys::Socket,
    buffer: Vec<u8>,
    claimed: Claimed,
}

/// Transactions of the caller with the lower half of the generation that each turned out to have. It has changed the table; a
/// second generation among the same ones that did so is another program's.
type Claimed = Vec<(Transaction, u16)>;

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
        // Without the privilege the usual size has to do: more is lost then, and reported as such.
        let _ = rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, WAITING);
        Ok(Self { socket, buffer: Vec::with_capacity(RECEIVE_BUFFER), claimed: Claimed::new() })
    }

    /// Returns a descriptor that can be read while notifications wait: for poll(2) beside calls of [`Self::touched`].
    ///
    /// # Errors
    /// Of `fcntl(2)`.
    pub fn descriptor(&self) -> io::Result<OwnedFd> {
        self.socket.as_fd().try_clone_to_owned()
    }

    /// Returns what has become of the table of family inet with this name since the last call, apart from the caller's `own`
    /// transactions and those before the generation `since`; does not wait. One transaction may be notified of in several parts.
    ///
    /// # Errors
    /// Of `recv(2)`.
    pub fn touched(&mut self, table: &str, own: &[Transaction], since: Option<u32>) -> io::Result<Touched> {
        let mut touched = Touched::No;
        self.claimed.retain(|(transaction, _)| own.contains(transaction));
        loop {
            match receive(&self.socket, &mut self.buffer) {
                Ok(()) => {
                    for message in messages(&self.buffer) {
                        touched = touched.max(about(message, table, own, since, &mut self.claimed));
                    }
                }
                // Other programs may write more at once than the socket holds.
                Err(Error::Overrun | Error::Malformed(_)) => touched = touched.max(Touched::Perhaps),
                Err(Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => return Ok(touched),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// What a notification says about a table.
fn about(
    message: Result<(netlink::Header, &[u8]), Error>,
    table: &str,
    own: &[Transaction],
    since: Option<u32>,
    claimed: &mut Claimed,
) -> Touched {
    let Ok((header, body)) = message else { return Touched::Perhaps };
    // `struct nfgenmsg`: the family, a version, and the lower half of the generation in network byte order.
    let Some((&[family, _, high, low], attributes)) = body.split_first_chunk::<NFGEN_HEADER>() else {
        return Touched::Perhaps;
    };
    let name = attribute(attributes, TABLE_NAME).and_then(|name| name.strip_suffix(&[0]));
    if family != INET || name != Some(table.as_bytes()) {
        return Touched::No;
    }
    let generation = u16::from_be_bytes([high, low]);
    if let Some([.., high, low]) = since.map(u32::to_be_bytes)
        && generation.wrapping_sub(u16::from_be_bytes([high, low])) > u16::MAX / 2
    {
        return Touched::No;
    }
    let within = |&&(first, last): &&Transaction| {
        let [.., high, low] = first.to_be_bytes();
        let after_first = generation.wrapping_sub(u16::from_be_bytes([high, low]));
        u32::from(after_first) <= last.wrapping_sub(first)
    };
    let is_own = own.iter().rev().find(within).is_some_and(|transaction| {
        let known = claimed.iter().find(|(of, _)| of == transaction).map(|(_, generation)| *generation);
        if known.is_none() {
            claimed.push((*transaction, generation));
        }
        known.is_none_or(|known| known == generation)
    });
    match header.kind {
        _ if is_own => Touched::No,
        DELETE_TABLE => Touched::Removed,
        _ => Touched::Changed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::netlink::encode_attribute;

    #[test]
    fn own_transactions_are_not_taken_for_those_of_others() {
        let mut claimed = Claimed::new();
        let mut said = |kind, family, generation: u32, own: &[Transaction]| {
            let [.., high, low] = generation.to_be_bytes();
            let body = [&[family, 0, high, low][..], &encode_attribute(TABLE_NAME, b"mine\0")].concat();
            let header = netlink::Header { kind, flags: 0, sequence: 0, port: 0 };
            about(Ok((header, &body)), "mine", own, Some(4), &mut claimed)
        };
        const NEW: u16 = 10 << 8;
        assert_eq!(said(NEW, INET, 7, &[]), Touched::Changed);
        assert_eq!(said(NEW, INET, 7, &[(7, 7)]), Touched::No);
        // One of three transactions has to be the own one, and no other one may change the table.
        assert_eq!(said(NEW, INET, 7, &[(6, 8)]), Touched::No);
        assert_eq!(said(DELETE_TABLE, INET, 7, &[(6, 8)]), Touched::No);
        assert_eq!(said(NEW, INET, 8, &[(6, 8)]), Touched::Changed);
        assert_eq!(said(DELETE_TABLE, INET, 6, &[(6, 8)]), Touched::Removed);
        assert_eq!(said(NEW, INET, 9, &[(6, 8)]), Touched::Changed);
        assert_eq!(said(NEW, INET, 5, &[(6, 8)]), Touched::Changed);
        assert_eq!(said(DELETE_TABLE, INET, 9, &[(6, 8)]), Touched::Removed);
        // The lower half of the generation alone is sent.
        assert_eq!(said(NEW, INET, 0x2_0006, &[(0x1_ffff, 0x2_0006)]), Touched::No);
        assert_eq!(said(NEW, 2, 7, &[]), Touched::No);
        // What came before the table was written again.
        assert_eq!(said(DELETE_TABLE, INET, 3, &[]), Touched::No);
        assert_eq!(said(DELETE_TABLE, INET, 4, &[]), Touched::Removed);
    }
}
