//! Random choices that are the same for a seed for ever: a seed that once showed a difference is kept as a test.

use std::net::IpAddr;

use ipnet::IpNet;

/// SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014). Generators of libraries may
/// change their output for a seed from version to version.
#[derive(Clone, Debug)]
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 to `end - 1`; 0 if there is nothing to choose from.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        let end = u64::try_from(end.max(1)).unwrap_or(u64::MAX);
        usize::try_from(self.bits() % end).unwrap_or_default()
    }

    /// From `low` to `high`, both included.
    pub(crate) fn within(&mut self, low: u8, high: u8) -> u8 {
        low + u8::try_from(self.below(usize::from(high - low) + 1)).unwrap_or_default()
    }

    pub(crate) fn percent(&mut self, chance: usize) -> bool {
        self.below(100) < chance
    }

    pub(crate) fn port(&mut self) -> u16 {
        u16::try_from(self.bits() & 0xffff).unwrap_or_default()
    }

    /// # Panics
    /// There is nothing to choose from.
    pub(crate) fn pick<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        &choices[self.below(choices.len())]
    }

    /// An address of `net`, its first and last more often than others.
    pub(crate) fn address(&mut self, net: &IpNet) -> IpAddr {
        match self.below(4) {
            0 => net.network(),
            1 => net.broadcast(),
            _ => offset(net.network(), u128::from(self.bits()) & (size(net) - 1)),
        }
    }

    /// The address before the first or after the last of `net`.
    pub(crate) fn beside(&mut self, net: &IpNet) -> IpAddr {
        if self.percent(50) { offset(net.network(), u128::MAX) } else { offset(net.broadcast(), 1) }
    }
}

/// How many addresses a prefix has; those of a /0 less one.
fn size(net: &IpNet) -> u128 {
    1u128.checked_shl(u32::from(net.max_prefix_len() - net.prefix_len())).unwrap_or(u128::MAX)
}

/// Around the end of the address space.
fn offset(address: IpAddr, by: u128) -> IpAddr {
    match address {
        IpAddr::V4(v4) => {
            let low = u32::try_from(by & u128::from(u32::MAX)).unwrap_or_default();
            IpAddr::from(u32::from(v4).wrapping_add(low).to_be_bytes())
        }
        IpAddr::V6(v6) => IpAddr::from(u128::from(v6).wrapping_add(by).to_be_bytes()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_means_the_same_for_ever() {
        // The first output of the reference implementation for seed 1234567.
        assert_eq!(Dice::new(1_234_567).bits(), 6_457_827_717_110_365_317);
    }

    #[test]
    fn addresses_stay_inside_and_beside_is_outside() {
        let mut dice = Dice::new(1);
        for net in ["10.200.1.64/26", "192.168.31.67/32", "fd31::/64", "fd20::8/125"] {
            let net: IpNet = net.parse().unwrap();
            for _ in 0..200 {
                assert!(net.contains(&dice.address(&net)));
                assert!(!net.contains(&dice.beside(&net)));
            }
        }
    }
}
