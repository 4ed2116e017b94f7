//! The generation of the nf_tables ruleset: one small question that shows whether any program changed a rule.

use std::io;

use netlink_sys::protocols::NETLINK_NETFILTER;

use super::netlink::{Socket, attribute};

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
