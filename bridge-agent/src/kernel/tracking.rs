//! Connection tracking without rules that judge by it.

use std::io;

use netlink_packet_core::{NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE};
use netlink_sys::protocols::NETLINK_NETFILTER;

use super::{
    netlink::{NESTED, Socket, encode_attribute as attribute},
    nftables::{INET, NFTABLES},
};

/// `NFNL_MSG_BATCH_BEGIN` and `NFNL_MSG_BATCH_END`.
const BATCH: [u16; 2] = [16, 17];
/// `NFT_MSG_NEWTABLE`, `NFT_MSG_NEWCHAIN`, `NFT_MSG_NEWRULE` (linux/netfilter/nf_tables.h).
const TABLE: u16 = NFTABLES << 8;
const CHAIN: u16 = TABLE | 3;
const RULE: u16 = TABLE | 6;
/// `NFT_TABLE_F_OWNER`: the table is removed with the socket.
const OWNER: u32 = 2;
/// `NFT_REG32_00`.
const REGISTER: u32 = 8;

/// Keeps the kernel tracking connections of both families in a network namespace, until it is dropped or the process ends.
///
/// The kernel tracks where a rule of nf_tables reads its state, also in a chain that no packet enters.
#[derive(Debug)]
pub struct Tracking {
    _socket: Socket,
}

impl Tracking {
    /// Begins, in the network namespace of this thread.
    ///
    /// # Errors
    /// The kernel has no nf_tables or no connection tracking, or refuses.
    pub fn begin() -> io::Result<Self> {
        let mut socket = Socket::open(NETLINK_NETFILTER)?;
        let table = [format!("bridge-tracking-{}", socket.port()).as_bytes(), &[0]].concat();
        let (chain, number) = (*b"state\0", |number: u32| number.to_be_bytes());
        // NFTA_CT_DREG, NFTA_CT_KEY: NFT_CT_STATE.
        let state = [attribute(1, &number(REGISTER)), attribute(2, &number(0))].concat();
        // NFTA_EXPR_NAME, NFTA_EXPR_DATA.
        let expression = [attribute(1, b"ct\0"), attribute(2 | NESTED, &state)].concat();
        let expressions = attribute(4 | NESTED, &attribute(1 | NESTED, &expression));
        let body = |attributes: &[Vec<u8>]| [&[INET, 0, 0, 0], attributes.concat().as_slice()].concat();
        let edge = || [&[0, 0], NFTABLES.to_be_bytes().as_slice()].concat();
        let [begin, end] = BATCH;
        socket.batch(&[
            (begin, 0, edge()),
            // NFTA_TABLE_NAME, NFTA_TABLE_FLAGS.
            (TABLE, NLM_F_CREATE, body(&[attribute(1, &table), attribute(2, &number(OWNER))])),
            // NFTA_CHAIN_TABLE, NFTA_CHAIN_NAME.
            (CHAIN, NLM_F_CREATE, body(&[attribute(1, &table), attribute(3, &chain)])),
            // NFTA_RULE_TABLE, NFTA_RULE_CHAIN, NFTA_RULE_EXPRESSIONS.
            (
                RULE,
                NLM_F_CREATE | NLM_F_APPEND | NLM_F_ACK,
                body(&[attribute(1, &table), attribute(2, &chain), expressions]),
            ),
            (end, 0, edge()),
        ])?;
        Ok(Self { _socket: socket })
    }
}
