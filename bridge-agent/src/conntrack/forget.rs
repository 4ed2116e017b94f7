//! Deletes connections of addresses that have gone.

use std::{collections::BTreeSet, io, net::IpAddr};

use netlink_sys::protocols::NETLINK_NETFILTER;

use bridge_common::protocol;

use super::{Connection, Tuple, for_each};
use crate::kernel::{
    backoff::Backoff,
    netlink::{NESTED, Socket, encode_attribute as attribute},
};

/// `NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_DELETE`.
const CT_DELETE: u16 = 1 << 8 | 2;
/// Requests in one datagram.
pub(super) const BATCH: usize = 64;

/// Deletes every connection from or to one of `addresses` in the network namespace of this thread, except for ICMP
/// queries, which end by themselves within seconds. Returns the number of deleted connections.
///
/// # Errors
///
/// Those of the kernel; [`io::ErrorKind::Unsupported`] without conntrack.
pub fn forget(addresses: &BTreeSet<IpAddr>) -> io::Result<usize> {
    let mut originals = Vec::new();
    for_each(|Connection { original, reply, .. }| {
        let ends = [original.source, original.destination, reply.source, reply.destination];
        let queries = matches!(original.protocol, protocol::ICMP | protocol::ICMPV6);
        if !queries && ends.iter().any(|end| addresses.contains(end)) {
            originals.push(original);
        }
    })?;
    let mut socket = Socket::open(NETLINK_NETFILTER)?;
    let mut deleted = 0;
    for originals in originals.chunks(BATCH) {
        let answers = socket.request(originals.iter().map(|original| (CT_DELETE, 0, body(original))))?;
        // Another program, or its age, may have removed a connection since it was listed.
        deleted += answers.iter().filter(|refusal| refusal.is_none()).count();
    }
    Ok(deleted)
}

/// Deletes the connections of pods that have gone: their addresses may soon be those of others.
#[derive(Debug, Default)]
pub struct Forgetting {
    gone: BTreeSet<IpAddr>,
    again: Backoff,
}

impl Forgetting {
    /// Adds pods that have gone, and makes the next attempt due.
    pub fn add(&mut self, gone: impl IntoIterator<Item = IpAddr>) {
        let before = self.gone.len();
        self.gone.extend(gone);
        if self.gone.len() > before {
            self.again = Backoff::default();
        }
    }

    /// Deletes their connections; after a failure when it is time for another attempt.
    pub fn try_again(&mut self) {
        self.try_with(forget);
    }

    fn try_with(&mut self, forget: impl FnOnce(&BTreeSet<IpAddr>) -> io::Result<usize>) {
        let first = self.again == Backoff::default();
        if self.gone.is_empty() || !(first || self.again.is_due()) {
            return;
        }
        let pods = self.gone.len();
        match forget(&self.gone) {
            Ok(connections) => {
                tracing::debug!(pods, connections, "conntrack forgets pods that have gone");
                *self = Self::default();
            }
            Err(error) if error.kind() == io::ErrorKind::Unsupported => *self = Self::default(),
            Err(error) => {
                self.again.note(false);
                if first {
                    tracing::warn!(%error, pods, "connections of pods that have gone stay in conntrack; the agent tries again");
                }
            }
        }
    }
}

/// Encodes the body of `IPCTNL_MSG_CT_DELETE` with the tuple of the first packet.
fn body(original: &Tuple) -> Vec<u8> {
    let (header, tuple) = tuple(original);
    // CTA_TUPLE_ORIG.
    [header.to_vec(), attribute(1 | NESTED, &tuple)].concat()
}

/// Encodes struct nfgenmsg and the content of a tuple attribute (linux/netfilter/nfnetlink_conntrack.h).
pub(super) fn tuple(original: &Tuple) -> ([u8; 4], Vec<u8>) {
    let (family, ip) = match (original.source, original.destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            (libc::AF_INET, [attribute(1, &source.octets()), attribute(2, &destination.octets())].concat())
        }
        (source, destination) => {
            (libc::AF_INET6, [attribute(3, &octets(source)), attribute(4, &octets(destination))].concat())
        }
    };
    let protocol = [
        attribute(1, &[original.protocol]),
        attribute(2, &original.source_port.to_be_bytes()),
        attribute(3, &original.destination_port.to_be_bytes()),
    ]
    .concat();
    let tuple = [attribute(1 | NESTED, &ip), attribute(2 | NESTED, &protocol)].concat();
    let family = u8::try_from(family).unwrap_or_default();
    ([family, 0, 0, 0], tuple)
}

fn octets(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_deletion_is_repeated_until_it_works() {
        let pods: BTreeSet<IpAddr> = ["10.200.1.91".parse().unwrap()].into();
        let mut forgetting = Forgetting::default();
        forgetting.add(pods.clone());
        forgetting.try_with(|_| Err(io::ErrorKind::OutOfMemory.into()));
        forgetting.try_with(|_| panic!("not before a pause"));
        std::thread::sleep(forgetting.again.pause());
        let mut seen = None;
        forgetting.try_with(|gone| {
            seen = Some(gone.clone());
            Ok(1)
        });
        assert_eq!(seen, Some(pods));
        forgetting.try_with(|_| panic!("nothing is left to do"));
    }
}
