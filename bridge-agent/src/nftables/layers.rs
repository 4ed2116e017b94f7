//! Rules as boxes that do not overlap, so that one lookup finds the rule that decides: pure.
//!
//! A verdict map with ranges holds each packet at most once. Rules may overlap; among those that match a packet a deny wins,
//! then the first. So boxes are put into layers that are looked up one after the other: a box comes behind every box of
//! higher precedence that it overlaps. Most policies need one or two layers.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::model::PortRange;

/// The packets of one prefix on each side, and of ranges of protocols and ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cube {
    pub(super) external: IpNet,
    pub(super) pods: IpNet,
    /// First and last IP protocol.
    pub(super) protocols: (u8, u8),
    pub(super) source_ports: PortRange,
    pub(super) ports: PortRange,
}

impl Cube {
    fn overlaps(&self, other: &Self) -> bool {
        let nested = |a: IpNet, b: IpNet| a.contains(&b) || b.contains(&a);
        let ranges = |a: PortRange, b: PortRange| a.first <= b.last && b.first <= a.last;
        self.protocols.0 <= other.protocols.1
            && other.protocols.0 <= self.protocols.1
            && ranges(self.ports, other.ports)
            && ranges(self.source_ports, other.source_ports)
            && nested(self.external, other.external)
            && nested(self.pods, other.pods)
    }

    /// Whether no packet of `other` is outside.
    fn covers(&self, other: &Self) -> bool {
        let ranges = |a: PortRange, b: PortRange| a.first <= b.first && b.last <= a.last;
        self.protocols.0 <= other.protocols.0
            && other.protocols.1 <= self.protocols.1
            && ranges(self.ports, other.ports)
            && ranges(self.source_ports, other.source_ports)
            && self.external.contains(&other.external)
            && self.pods.contains(&other.pods)
    }
}

/// Returns the layer of each box, in order of precedence; `None` for one that an earlier one covers.
pub(super) fn assign(cubes: &[Cube]) -> Vec<Option<usize>> {
    let mut index = Index::new(cubes);
    let mut layers: Vec<Option<usize>> = Vec::with_capacity(cubes.len());
    for (number, cube) in cubes.iter().enumerate() {
        let mut layer = Some(0);
        index.near(cube, |other| {
            if cubes[other].covers(cube) {
                layer = None;
            } else if let (Some(own), Some(of_other)) = (layer, layers[other])
                && of_other >= own
                && cubes[other].overlaps(cube)
            {
                layer = Some(of_other + 1);
            }
        });
        layers.push(layer);
        if layer.is_some() {
            index.add(number, cube);
        }
    }
    layers
}

/// Lengths of the prefixes of both sides.
type Lengths = (u8, u8);
/// Two prefixes overlap if the shorter of them begins the longer one: boxes of given lengths are found by what is left
/// of their prefixes at shorter lengths.
type Place = (Lengths, IpAddr, u8, IpAddr, u8);

/// Finds boxes whose prefixes overlap on both sides.
struct Index {
    lengths: BTreeSet<Lengths>,
    /// By place, boxes by their first port.
    places: HashMap<Place, Bucket>,
}

#[derive(Default)]
struct Bucket {
    /// By first port.
    boxes: BTreeMap<(u16, usize), ()>,
    /// The most ports of any of them, but for one.
    span: u16,
}

impl Index {
    fn new(cubes: &[Cube]) -> Self {
        Self { lengths: cubes.iter().map(lengths).collect(), places: HashMap::new() }
    }

    fn add(&mut self, number: usize, cube: &Cube) {
        let own = lengths(cube);
        let cut: BTreeSet<Lengths> =
            self.lengths.iter().map(|other| (own.0.min(other.0), own.1.min(other.1))).collect();
        for at in cut {
            let bucket = self.places.entry(place(own, cube, at)).or_default();
            bucket.boxes.insert((cube.ports.first, number), ());
            bucket.span = bucket.span.max(cube.ports.last - cube.ports.first);
        }
    }

    /// Visits every box whose prefixes and ports may overlap.
    fn near(&self, cube: &Cube, mut visit: impl FnMut(usize)) {
        let own = lengths(cube);
        for &other in &self.lengths {
            let at = (own.0.min(other.0), own.1.min(other.1));
            let Some(bucket) = self.places.get(&place(other, cube, at)) else { continue };
            let first = cube.ports.first.saturating_sub(bucket.span);
            for ((_, number), ()) in bucket.boxes.range((first, 0)..=(cube.ports.last, usize::MAX)) {
                visit(*number);
            }
        }
    }
}

fn lengths(cube: &Cube) -> Lengths {
    (cube.external.prefix_len(), cube.pods.prefix_len())
}

fn place(of: Lengths, cube: &Cube, at: Lengths) -> Place {
    let cut = |net: IpNet, length| IpNet::new(net.addr(), length).map_or(net.addr(), |net| net.network());
    (of, cut(cube.external, at.0), at.0, cut(cube.pods, at.1), at.1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range() -> impl Strategy<Value = PortRange> {
        (0u16..6, 0u16..6).prop_map(|(a, b)| PortRange { first: a.min(b), last: a.max(b) })
    }

    fn net() -> impl Strategy<Value = IpNet> {
        (0u8..4, 28u8..=32).prop_map(|(last, length)| {
            IpNet::new(IpAddr::from([10, 0, 0, last * 4]), length).unwrap().trunc()
        })
    }

    fn cube() -> impl Strategy<Value = Cube> {
        (net(), net(), 0u8..3, 0u8..3, range(), range()).prop_map(
            |(external, pods, a, b, source_ports, ports)| Cube {
                external,
                pods,
                protocols: (a.min(b), a.max(b)),
                source_ports,
                ports,
            },
        )
    }

    proptest! {
        #[test]
        fn no_two_boxes_of_a_layer_overlap_and_the_first_match_has_precedence(
            cubes in prop::collection::vec(cube(), 1..40)
        ) {
            let layers = assign(&cubes);
            for (i, a) in cubes.iter().enumerate() {
                for (j, b) in cubes.iter().enumerate().skip(i + 1) {
                    if let (Some(first), Some(second)) = (layers[i], layers[j]) {
                        prop_assert!(!a.overlaps(b) || first < second, "{i} and {j}");
                    }
                }
                let hidden = cubes[..i].iter().any(|earlier| earlier.covers(a));
                prop_assert_eq!(layers[i].is_none(), hidden);
            }
        }
    }

    #[test]
    fn boxes_that_do_not_overlap_share_a_layer() {
        let cube = |host: u8, port: u16| Cube {
            external: IpNet::from(IpAddr::from([192, 168, 31, host])),
            pods: "10.200.1.0/24".parse().unwrap(),
            protocols: (6, 6),
            source_ports: PortRange::ALL,
            ports: PortRange { first: port, last: port },
        };
        let cubes: Vec<Cube> = (0..200).map(|number| cube(number, u16::from(number % 3))).collect();
        assert!(assign(&cubes).iter().all(|layer| *layer == Some(0)));
    }
}
