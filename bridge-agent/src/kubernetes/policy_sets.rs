//! The sets of policies that a node has applied or refused, in a size that does not grow with their texts. Pure.

use std::collections::BTreeSet;

use sha2::{Digest as _, Sha256};

use super::cluster::{Cluster, Policy};
use super::resources::RefusedPolicy;

/// Identifies the policies that a node has applied or refused.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PolicySets {
    /// Hash of those of the cluster.
    pub(super) cluster: String,
    /// Hash of those of namespaces; empty where they have no effect.
    pub(super) namespaces: String,
    /// The refused ones among both, as [`encode`] writes them.
    pub(super) refused: String,
}

impl PolicySets {
    /// `namespaces`: policies of namespaces have an effect.
    pub(super) fn new(cluster: &Cluster, namespaces: bool, refused: &[RefusedPolicy]) -> Self {
        let of_namespaces = cluster.namespace_policies.iter().filter(|_| namespaces);
        let refused: BTreeSet<&str> = refused.iter().map(|policy| policy.name.as_str()).collect();
        let names = cluster.policies.iter().chain(of_namespaces.clone()).map(|(name, _)| name);
        Self {
            refused: encode(names.map(|name| refused.contains(name))),
            cluster: hash(cluster.policies.iter()),
            namespaces: if namespaces { hash(of_namespaces) } else { String::new() },
        }
    }
}

/// Hashes names, UIDs and generations of policies. Agents of all versions come to the same hash.
pub(super) fn hash<'p>(policies: impl Iterator<Item = (&'p str, &'p Policy)>) -> String {
    let mut hasher = Sha256::new();
    for (name, policy) in policies {
        hasher.update(name);
        hasher.update([0]);
        hasher.update(&*policy.uid);
        hasher.update([0]);
        hasher.update(policy.generation.to_be_bytes());
    }
    hasher.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

/// Writes four bits in a hexadecimal digit, the first bit the highest.
fn encode(bits: impl Iterator<Item = bool>) -> String {
    let mut text = String::new();
    let (mut digit, mut count) = (0_u32, 0);
    for bit in bits {
        (digit, count) = (digit << 1 | u32::from(bit), count + 1);
        if count == 4 {
            text.extend(char::from_digit(digit, 16));
            (digit, count) = (0, 0);
        }
    }
    if count > 0 {
        text.extend(char::from_digit(digit << (4 - count), 16));
    }
    text
}

/// Whether bit number `index` is set. A text that is too short has no more set bits.
pub(super) fn is_set(text: &str, index: usize) -> bool {
    let digit = text.as_bytes().get(index / 4).and_then(|byte| char::from(*byte).to_digit(16));
    digit.is_some_and(|digit| digit >> (3 - index % 4) & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_bit_is_read_where_it_was_written() {
        for length in 0..40_usize {
            for set in 0..length {
                let text = encode((0..length).map(|index| index == set));
                assert_eq!(text.len(), length.div_ceil(4));
                let found: Vec<usize> = (0..length + 9).filter(|index| is_set(&text, *index)).collect();
                assert_eq!(found, [set], "{text}");
            }
        }
        assert_eq!(encode([true, false, false, true, true].into_iter()), "98");
        assert!(!is_set("zz", 0));
    }
}
