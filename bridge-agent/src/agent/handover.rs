//! Enters flows that eBPF knows into conntrack, before a packet filter begins to judge by it.
//!
//! On a node without other rules the kernel tracks no connections. Rules that begin to ask for their state would take each
//! packet of an open connection for one that belongs to none.

use std::{
    collections::HashMap,
    hash::{BuildHasher as _, RandomState},
};

use bridge_common::protocol;

use crate::{
    conntrack::{self, Opened, Tuple},
    datapath::{Alive, Maps, Pins},
    kernel::tracking::Tracking,
};

/// A flow that moves from one table to another during the first pass is found by the second one.
const PASSES: usize = 2;

/// Makes the kernel track connections, and enters those that eBPF passes. Drop the result when the rules are active.
///
/// A failure is logged: without the entries, open connections are cut, which is no reason not to enforce.
pub(super) fn begin(pins: &Pins) -> Option<Tracking> {
    if !pins.exist() {
        return None;
    }
    let entered = || -> Result<(Tracking, usize), Box<dyn std::error::Error>> {
        let maps = Maps::open(pins)?;
        let tracking = Tracking::begin()?;
        let mut entered = 0;
        for _ in 0..PASSES {
            entered += conntrack::enter(&unknown(&maps)?)?;
        }
        Ok((tracking, entered))
    };
    match entered() {
        Ok((tracking, entered)) => {
            if entered > 0 {
                tracing::info!(entered, "conntrack took over connections that eBPF passes");
            }
            Some(tracking)
        }
        Err(error) => {
            tracing::warn!(%error, "conntrack does not know the connections that eBPF passes: some may be cut");
            None
        }
    }
}

/// Returns the flows that conntrack does not know as eBPF does.
fn unknown(maps: &Maps) -> Result<Vec<Opened>, Box<dyn std::error::Error>> {
    // Hashes: with 100,000 connections, the tuples would take several times the memory.
    let hasher = RandomState::new();
    let hash = |tuple: &Tuple| hasher.hash_one(tuple);
    let mut tracked: HashMap<u64, bool> = HashMap::new();
    conntrack::for_each(|connection| {
        for tuple in [&connection.original, &connection.reply] {
            tracked.insert(hash(tuple), connection.replied);
        }
    })?;
    let mut unknown = Vec::new();
    maps.for_each_alive(|flow| {
        let opened = opened(&flow);
        let known = tracked.get(&hash(&opened.opening)).copied();
        // Queries last for a second, and an association without its tags would be refused as invalid.
        let lasts = match flow.protocol {
            protocol::ICMP | protocol::ICMPV6 => false,
            protocol::SCTP => flow.answered && !flow.tags.contains(&0),
            _ => true,
        };
        let differs = known.is_none_or(|answered| flow.answered && !answered);
        if lasts && differs {
            unknown.push(opened);
        }
    })?;
    Ok(unknown)
}

fn opened(flow: &Alive) -> Opened {
    let Alive { initiator, responder, protocol, answered, tags: [initiators, responders], left } = *flow;
    Opened {
        opening: Tuple {
            source: initiator.0,
            source_port: initiator.1,
            destination: responder.0,
            destination_port: responder.1,
            protocol,
        },
        answered,
        // A packet carries the tag that its receiver announced.
        tags: [responders, initiators],
        timeout: u32::try_from(left).unwrap_or(u32::MAX).max(1),
    }
}
