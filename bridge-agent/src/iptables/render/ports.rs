//! Port lists as `multiport` takes them.

use std::fmt::Write as _;

use crate::model::PortRange;

/// The size of one `multiport` match (`XT_MULTI_PORTS` in `linux/netfilter/xt_multiport.h`); a range takes two.
const SLOTS: usize = 15;

/// Splits a port list into as few lists as fit a `multiport` match each, covering exactly the same ports.
///
/// Overlapping and adjacent ranges are joined first. A list that covers every port (as the empty one does) needs
/// no match at all: the result is empty.
pub(super) fn split(ports: &[PortRange]) -> Vec<Vec<PortRange>> {
    let joined = PortRange::join(ports);
    if joined.is_empty() || joined == [PortRange::ALL] {
        return Vec::new();
    }
    let mut lists = vec![Vec::new()];
    let mut free = SLOTS;
    for range in joined {
        if slots(range) > free {
            lists.push(Vec::new());
            free = SLOTS;
        }
        free -= slots(range);
        if let Some(list) = lists.last_mut() {
            list.push(range);
        }
    }
    lists
}

const fn slots(range: PortRange) -> usize {
    if range.first == range.last { 1 } else { 2 }
}

/// Every combination of a source list and a destination list as the text of its `multiport` matches; a single
/// empty text when neither constrains anything.
pub(super) fn matches(source: &[PortRange], destination: &[PortRange]) -> Vec<String> {
    let texts = |ports: &[PortRange], option: &str| -> Vec<String> {
        let lists = split(ports);
        if lists.is_empty() {
            return vec![String::new()];
        }
        lists.iter().map(|list| multiport(option, list)).collect()
    };
    let destinations = texts(destination, "--dports");
    texts(source, "--sports")
        .iter()
        .flat_map(|s| destinations.iter().map(move |d| format!("{s}{d}")))
        .collect()
}

/// Returns the number of texts that [`matches`] makes.
pub(super) fn count(source: &[PortRange], destination: &[PortRange]) -> usize {
    split(source).len().max(1).saturating_mul(split(destination).len().max(1))
}

/// ` -m multiport --dports 80,8000:8100`, with the leading blank.
fn multiport(option: &str, list: &[PortRange]) -> String {
    let mut text = format!(" -m multiport {option} ");
    for (index, range) in list.iter().enumerate() {
        let comma = if index == 0 { "" } else { "," };
        let written = if range.first == range.last {
            write!(text, "{comma}{}", range.first)
        } else {
            write!(text, "{comma}{}:{}", range.first, range.last)
        };
        debug_assert!(written.is_ok(), "writing to a String does not fail");
    }
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range() -> impl Strategy<Value = PortRange> {
        // Short ranges and single ports near one another, so that adjacency and overlap happen often.
        prop_oneof![
            (0u16..200, 0u16..6).prop_map(|(first, length)| PortRange { first, last: first + length }),
            (any::<u16>(), any::<u16>()).prop_map(|(a, b)| PortRange { first: a.min(b), last: a.max(b) }),
            (65500u16..=65535).prop_map(|port| PortRange { first: port, last: port }),
        ]
    }

    fn set(ranges: impl IntoIterator<Item = PortRange>) -> Vec<bool> {
        let mut ports = vec![false; 1 << 16];
        for range in ranges {
            for port in range.first..=range.last {
                ports[usize::from(port)] = true;
            }
        }
        ports
    }

    proptest! {
        #[test]
        fn the_parts_cover_the_same_ports_and_fit(ports in prop::collection::vec(range(), 1..60)) {
            let lists = split(&ports);
            if lists.is_empty() {
                prop_assert!(set(ports).iter().all(|covered| *covered));
            } else {
                prop_assert!(lists.iter().all(|list| list.iter().map(|r| slots(*r)).sum::<usize>() <= SLOTS));
                prop_assert!(lists.iter().all(|list| !list.is_empty()));
                prop_assert_eq!(set(lists.into_iter().flatten()), set(ports));
            }
        }

        #[test]
        fn no_more_parts_than_needed(ports in prop::collection::vec(range(), 1..60)) {
            // A list is closed only if the next range did not fit: at most one slot of it is left free.
            let lists = split(&ports);
            for list in lists.iter().rev().skip(1) {
                prop_assert!(list.iter().map(|r| slots(*r)).sum::<usize>() >= SLOTS - 1);
            }
        }
    }

    #[test]
    fn a_range_takes_two_slots() {
        let ports: Vec<_> = (0..8).map(|i| PortRange { first: i * 10, last: i * 10 + 1 }).collect();
        let lists = split(&ports);
        assert_eq!(lists.iter().map(Vec::len).collect::<Vec<_>>(), [7, 1]);
    }

    #[test]
    fn both_ends_of_the_port_space_are_kept() {
        let ports = [PortRange { first: 0, last: 0 }, PortRange { first: 65535, last: 65535 }];
        assert_eq!(matches(&[], &ports), [" -m multiport --dports 0,65535"]);
        assert_eq!(matches(&[PortRange::ALL], &[]), [""]);
    }

    #[test]
    fn source_and_destination_lists_multiply() {
        let sixteen: Vec<_> = (0..16).map(|i| PortRange { first: i * 2, last: i * 2 }).collect();
        assert_eq!(matches(&sixteen, &sixteen).len(), 4);
        assert_eq!(count(&sixteen, &sixteen), 4);
    }
}
