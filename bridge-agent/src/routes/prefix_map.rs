//! A map keyed by network, with look-ups of the networks around and inside a network.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;

/// Values by network. Host bits of keys are cleared.
#[derive(Debug, Clone)]
pub(crate) struct PrefixMap<T> {
    // IpNet orders by family, address, prefix length: the networks inside a network follow it without a break.
    nets: BTreeMap<IpNet, T>,
    // Number of networks of each prefix length, so that looking upwards skips unused lengths.
    lengths: [[u32; 129]; 2],
}

impl<T> Default for PrefixMap<T> {
    fn default() -> Self {
        Self { nets: BTreeMap::new(), lengths: [[0; 129]; 2] }
    }
}

impl<T> PrefixMap<T> {
    /// The value of exactly `net`.
    #[must_use]
    pub(crate) fn get(&self, net: IpNet) -> Option<&T> {
        self.nets.get(&net.trunc())
    }

    /// The value of exactly `net`, made if there is none.
    pub(crate) fn or_default(&mut self, net: IpNet) -> &mut T
    where
        T: Default,
    {
        let net = net.trunc();
        let lengths = &mut self.lengths[family(net)];
        self.nets.entry(net).or_insert_with(|| {
            lengths[usize::from(net.prefix_len())] += 1;
            T::default()
        })
    }

    /// Inserts `value` at `net`, and returns the former value.
    pub(crate) fn insert(&mut self, net: IpNet, value: T) -> Option<T> {
        let net = net.trunc();
        let old = self.nets.insert(net, value);
        if old.is_none() {
            self.lengths[family(net)][usize::from(net.prefix_len())] += 1;
        }
        old
    }

    /// The networks that hold all of `net`, itself included, longest prefix first.
    pub(crate) fn covering(&self, net: IpNet) -> impl Iterator<Item = (IpNet, &T)> {
        let lengths = &self.lengths[family(net)];
        (0..=net.prefix_len()).rev().filter(|len| lengths[usize::from(*len)] > 0).filter_map(move |len| {
            let wider = IpNet::new(net.addr(), len).ok()?.trunc();
            self.nets.get_key_value(&wider).map(|(net, value)| (*net, value))
        })
    }

    /// The networks inside `net`, itself included, in order of address.
    pub(crate) fn inside(&self, net: IpNet) -> impl Iterator<Item = (IpNet, &T)> {
        let net = net.trunc();
        self.nets.range(net..=host(net.broadcast())).map(|(net, value)| (*net, value))
    }

    /// Every value.
    pub(crate) fn values_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.nets.values_mut()
    }

    /// Every value, in order of address.
    pub(crate) fn into_values(self) -> impl Iterator<Item = T> {
        self.nets.into_values()
    }

    /// Whether some network shares an address with `net`.
    #[must_use]
    pub(crate) fn overlaps(&self, net: IpNet) -> bool {
        self.covering(net).next().is_some() || self.inside(net).next().is_some()
    }
}

const fn family(net: IpNet) -> usize {
    match net {
        IpNet::V4(_) => 0,
        IpNet::V6(_) => 1,
    }
}

/// The network of a single address: /32 or /128.
#[must_use]
pub(crate) fn host(address: IpAddr) -> IpNet {
    IpNet::from(address)
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;

    fn net() -> impl Strategy<Value = IpNet> {
        // Few distinct addresses, so that networks do hold one another.
        prop_oneof![
            (0u32..8, 24u8..=32).prop_map(|(low, len)| IpNet::new_assert(
                Ipv4Addr::from(0x0a00_0000 | (low << 5)).into(),
                len
            )),
            (0u128..8, 120u8..=128).prop_map(|(low, len)| IpNet::new_assert(
                Ipv6Addr::from((0xfd00 << 112) | (low << 5)).into(),
                len
            )),
            Just("0.0.0.0/0".parse().unwrap()),
            Just("::/0".parse().unwrap()),
        ]
        .prop_map(|net| net.trunc())
    }

    proptest! {
        #[test]
        fn agrees_with_a_walk_through_a_list(nets in prop::collection::vec(net(), 0..40), asked in net()) {
            let mut map = PrefixMap::<()>::default();
            for net in &nets {
                map.insert(*net, ());
            }
            let mut expected: Vec<IpNet> = nets.clone();
            expected.sort();
            expected.dedup();

            let mut covering: Vec<IpNet> = map.covering(asked).map(|(net, ())| net).collect();
            prop_assert!(covering.is_sorted_by(|a, b| a.prefix_len() > b.prefix_len()));
            covering.sort();
            prop_assert_eq!(covering, expected.iter().copied().filter(|net| net.contains(&asked)).collect::<Vec<_>>());

            let inside: Vec<IpNet> = map.inside(asked).map(|(net, ())| net).collect();
            prop_assert_eq!(inside, expected.iter().copied().filter(|net| asked.contains(net)).collect::<Vec<_>>());

            let overlaps = expected.iter().any(|net| net.contains(&asked) || asked.contains(net));
            prop_assert_eq!(map.overlaps(asked), overlaps);
        }
    }
}
