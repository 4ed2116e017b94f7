//! The shapes of elements: which parts of a packet a box compares.
//!
//! Each part of a key costs a comparison with every element, so boxes that leave a part open are in maps without it. Boxes without
//! prefixes and ranges are in maps of their own, which find an element by a hash, however many there are.

use super::parts::{Section, text};
use crate::model::{Direction, PortRange};
use crate::nftables::layers::Cube;

/// Protocols with ports.
const WITH_PORTS: &str = "{ 6, 17, 132 }";

/// The parts that boxes of a map compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Shape {
    /// `None`: every protocol with ports, or every one without.
    protocol: Option<u8>,
    /// Among the protocols with ports.
    ports: bool,
    external: bool,
    pods: bool,
    /// Whether the external prefix is a single address: networks are few, and a look among few is cheap.
    host: bool,
    /// Whether the key has the protocol.
    with_protocol: bool,
    source_port: bool,
    port: bool,
    /// Whether every part is a single address or port.
    pub(super) exact: bool,
}

impl Shape {
    /// Returns the shape of a box; `ports`: of a protocol with ports.
    pub(super) fn of(cube: &Cube, ports: bool) -> Self {
        let (first, last) = cube.protocols;
        let protocol = (first == last).then_some(first);
        let (mut external, pods) = (cube.external.prefix_len() > 0, cube.pods.prefix_len() > 0);
        let (source_port, port) = (cube.source_ports != PortRange::ALL, cube.ports != PortRange::ALL);
        let parts = [external, pods, source_port, port].into_iter().filter(|part| *part).count();
        // Sets of a single interval are kept in another way by the kernel, which is slower, and to add to them, too.
        let with_protocol = parts < 2;
        external |= parts == 0;
        let single = |range: PortRange| range.first == range.last;
        let whole = |net: &ipnet::IpNet| net.prefix_len() == net.max_prefix_len();
        let exact = (!external || whole(&cube.external))
            && (!pods || whole(&cube.pods))
            && (!with_protocol || protocol.is_some())
            && (!source_port || single(cube.source_ports))
            && (!port || single(cube.ports));
        let host = external && whole(&cube.external);
        Self { protocol, ports, external, pods, host, with_protocol, source_port, port, exact }
    }

    /// Returns the part of the map's name that distinguishes it from those of other shapes.
    pub(super) fn name(&self) -> String {
        let mut name = match (self.protocol, self.ports) {
            (Some(6), true) => "tcp".to_owned(),
            (Some(17), true) => "udp".to_owned(),
            (Some(132), true) => "sctp".to_owned(),
            (None, true) => "ports".to_owned(),
            (Some(1 | 58), false) => "icmp".to_owned(),
            (Some(number), _) => number.to_string(),
            (None, false) => "other".to_owned(),
        };
        name.push('-');
        let letters = [
            (self.external, if self.host { 'h' } else { 'e' }),
            (self.pods, 'p'),
            (self.source_port, 's'),
            (self.port, 'd'),
            (self.exact, 'x'),
        ];
        name.extend(letters.into_iter().filter(|(has, _)| *has).map(|(_, letter)| letter));
        name
    }

    /// Returns the match on the protocol before the lookup.
    pub(super) fn protocols(&self) -> String {
        match (self.protocol, self.ports) {
            (Some(number), _) => format!("meta l4proto {number} "),
            (None, true) => format!("meta l4proto {WITH_PORTS} "),
            (None, false) => format!("meta l4proto != {WITH_PORTS} "),
        }
    }

    fn parts<T>(&self, [external, pods, protocol, source_port, port]: [T; 5]) -> Vec<T> {
        let parts = [
            (self.external, external),
            (self.pods, pods),
            (self.with_protocol, protocol),
            (self.source_port, source_port),
            (self.port, port),
        ];
        parts.into_iter().filter(|(has, _)| *has).map(|(_, part)| part).collect()
    }

    /// Returns the expressions of the key.
    pub(super) fn key(&self, section: &Section<'_>) -> String {
        let protocol = section.family.protocol();
        let (external, pods) = match section.direction {
            Direction::Inbound => ("saddr", "daddr"),
            Direction::Outbound => ("daddr", "saddr"),
        };
        let [external, pods] = [external, pods].map(|side| format!("{protocol} {side}"));
        self.parts([external, pods, "meta l4proto".into(), "th sport".into(), "th dport".into()]).join(" . ")
    }

    /// Returns the key of a box of this shape.
    pub(super) fn element(&self, cube: &Cube) -> String {
        let (first, last) = cube.protocols;
        let protocol = if first == last { first.to_string() } else { format!("{first}-{last}") };
        self.parts([
            text(&cube.external),
            text(&cube.pods),
            protocol,
            cube.source_ports.to_string(),
            cube.ports.to_string(),
        ])
        .join(" . ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cube(external: &str, pods: &str, ports: PortRange) -> Cube {
        Cube {
            external: external.parse().unwrap(),
            pods: pods.parse().unwrap(),
            protocols: (6, 6),
            source_ports: PortRange::ALL,
            ports,
        }
    }

    #[test]
    fn a_key_has_the_parts_that_a_box_compares_and_two_at_least() {
        let port = PortRange { first: 80, last: 80 };
        let range = PortRange { first: 80, last: 90 };
        for (cube, name, element) in [
            (cube("1.2.3.4/32", "0.0.0.0/0", port), "tcp-hdx", "1.2.3.4 . 80"),
            (cube("1.2.3.0/24", "0.0.0.0/0", port), "tcp-ed", "1.2.3.0/24 . 80"),
            (cube("1.2.3.4/32", "10.0.0.1/32", range), "tcp-hpd", "1.2.3.4 . 10.0.0.1 . 80-90"),
            (cube("0.0.0.0/0", "0.0.0.0/0", port), "tcp-dx", "6 . 80"),
            (cube("0.0.0.0/0", "0.0.0.0/0", PortRange::ALL), "tcp-e", "0.0.0.0/0 . 6"),
        ] {
            let shape = Shape::of(&cube, true);
            assert_eq!((shape.name().as_str(), shape.element(&cube).as_str()), (name, element));
        }
    }
}
