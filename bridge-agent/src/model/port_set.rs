//! A set of ports.

use std::fmt;

use super::PortRange;

/// A set of ports.
#[derive(Clone, PartialEq, Eq)]
pub struct PortSet(Box<[u64; 1024]>);

impl Default for PortSet {
    fn default() -> Self {
        Self(Box::new([0; 1024]))
    }
}

impl fmt::Debug for PortSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.ranges().iter().map(ToString::to_string)).finish()
    }
}

/// As the kernel's sysctls have them: `8080,61001-61100`.
impl fmt::Display for PortSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ranges: Vec<_> = self.ranges().iter().map(ToString::to_string).collect();
        f.write_str(&ranges.join(","))
    }
}

impl FromIterator<PortRange> for PortSet {
    fn from_iter<T: IntoIterator<Item = PortRange>>(ranges: T) -> Self {
        let mut set = Self::default();
        for range in ranges {
            set.insert(range);
        }
        set
    }
}

impl PortSet {
    /// Adds every port of a range.
    pub fn insert(&mut self, range: PortRange) {
        for port in range.first..=range.last {
            self.0[usize::from(port >> 6)] |= 1 << (port & 63);
        }
    }

    /// Removes every port of another set.
    pub fn remove_all(&mut self, other: &Self) {
        for (word, gone) in self.0.iter_mut().zip(other.0.iter()) {
            *word &= !gone;
        }
    }

    /// Keeps the ports that are in another set as well.
    pub fn keep_all(&mut self, other: &Self) {
        for (word, kept) in self.0.iter_mut().zip(other.0.iter()) {
            *word &= kept;
        }
    }

    /// Whether a port is in the set.
    #[must_use]
    pub fn contains(&self, port: u16) -> bool {
        self.0[usize::from(port >> 6)] & (1 << (port & 63)) != 0
    }

    /// How many ports there are.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.0.iter().map(|word| word.count_ones()).sum()
    }

    /// Whether there is no port.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|&word| word == 0)
    }

    /// The ports in ascending order.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = u16> + '_ {
        (0..=u16::MAX).filter(|&port| self.contains(port))
    }

    /// 64 ports, from `64 * word` on; bit 0 is the lowest.
    #[must_use]
    pub fn word(&self, word: usize) -> u64 {
        self.0[word]
    }

    /// The ports as the fewest ranges, ascending.
    #[must_use]
    pub fn ranges(&self) -> Vec<PortRange> {
        let mut ranges: Vec<PortRange> = Vec::new();
        for port in self.iter() {
            match ranges.last_mut() {
                Some(range) if u32::from(range.last) + 1 == u32::from(port) => range.last = port,
                _ => ranges.push(PortRange { first: port, last: port }),
            }
        }
        ranges
    }
}

/// Reads the ranges of `net.ipv4.ip_local_reserved_ports`, as [`PortSet`] prints them.
#[must_use]
pub fn parse_ranges(text: &str) -> Vec<PortRange> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(PortRange { first: first.parse().ok()?, last: last.parse().ok()? })
    };
    text.trim().split(',').filter_map(range).collect()
}

/// Reads `net.ipv4.ip_local_port_range`: two numbers.
#[must_use]
pub fn parse_ephemeral(text: &str) -> Option<PortRange> {
    let mut ends = text.split_ascii_whitespace().map(str::parse);
    let (Some(Ok(first)), Some(Ok(last))) = (ends.next(), ends.next()) else { return None };
    Some(PortRange { first, last })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: u16, last: u16) -> PortRange {
        PortRange { first, last }
    }

    #[test]
    fn both_ends_belong_to_a_range_also_at_the_edges_of_all_ports() {
        let set: PortSet = [range(0, 0), range(63, 64), range(65535, 65535)].into_iter().collect();
        assert_eq!(set.iter().collect::<Vec<_>>(), [0, 63, 64, 65535]);
        assert_eq!(set.ranges(), [range(0, 0), range(63, 64), range(65535, 65535)]);
        assert_eq!(set.len(), 4);
    }

    #[test]
    fn what_is_removed_leaves_a_hole() {
        let mut set: PortSet = [range(61001, 61100)].into_iter().collect();
        set.remove_all(&[range(61050, 61050), range(1, 10)].into_iter().collect());
        assert_eq!(set.ranges(), [range(61001, 61049), range(61051, 61100)]);
    }
}
