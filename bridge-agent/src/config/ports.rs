//! Ports: a number, a `"first-last"` text, or a list of them.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Deserializer, SeqAccess, Visitor};
use serde::{Deserialize, Serialize, Serializer};
use serde_saphyr::FlowSeq;

use super::leaf::{Leaf, Problem, has_leading_zero};
use super::report::{Path, Report};
use crate::model::PortRange;

/// The texts that [`PortItem`] accepts, but for ranges whose ends are out of order.
pub(crate) const PATTERN: &str = "^([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])\
    (-([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]))?$";

/// One port or one range of ports, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortItem(pub PortRange);

impl Leaf for PortItem {
    const FORMAT: &'static str = "port-range";
    const EXAMPLE: &'static str = "60001-60100";

    fn parse(text: &str) -> Result<Self, Problem> {
        match text.split_once('-') {
            None => port(text, text).map(|port| Self(PortRange { first: port, last: port })),
            Some((first_text, last_text)) => {
                let (first, last) = (port(first_text, text)?, port(last_text, text)?);
                if first > last {
                    return Err(Problem::new(
                        format!("port range `{text}` ends before it begins"),
                        format!("write \"{last}-{first}\""),
                    ));
                }
                Ok(Self(PortRange { first, last }))
            }
        }
    }
}

/// Reads one port, 1 to 65535.
///
/// # Errors
/// The fault of `text`, and its remedy.
pub(crate) fn one_port(text: &str) -> Result<u16, Problem> {
    match text.split_once('-') {
        Some((first, _)) if !first.is_empty() => {
            Err(Problem::new(format!("`{text}` is not one port"), "write a number from 1 to 65535"))
        }
        _ => port(text, text),
    }
}

/// One port out of `whole`, which the message quotes.
fn port(text: &str, whole: &str) -> Result<u16, Problem> {
    let trimmed = text.trim();
    if has_leading_zero(text) && text.bytes().all(|byte| byte.is_ascii_digit()) {
        let shortest = text.trim_start_matches('0');
        let help = match shortest {
            "" => "write ports from 1 to 65535".to_owned(),
            _ => format!("write {shortest} if it is decimal"),
        };
        let message = format!("`{text}` in `{whole}` has a leading zero, which some readers take for octal");
        return Err(Problem::new(message, help));
    }
    let number: u64 = trimmed
        .parse()
        .ok()
        .filter(|_| text == trimmed && !text.starts_with('+'))
        .ok_or_else(|| not_a_port(whole))?;
    match u16::try_from(number) {
        Ok(0) => Err(Problem::new(
            format!("port 0 in `{whole}` is reserved and never used on the wire"),
            "write ports from 1 to 65535",
        )),
        Ok(port) => Ok(port),
        Err(_) => Err(Problem::new(
            format!("port {number} in `{whole}` is above 65535"),
            "write ports from 1 to 65535",
        )),
    }
}

fn not_a_port(whole: &str) -> Problem {
    if let Some(digits) = whole.strip_prefix("0x").or_else(|| whole.strip_prefix("0X"))
        && let Ok(port) = u16::from_str_radix(digits, 16)
    {
        return Problem::new(format!("`{whole}` is hexadecimal"), format!("write {port}, which is decimal"));
    }
    // 40_002 is one number to YAML 1.1 and to Rust.
    if whole.contains('_')
        && let Ok(port) = whole.replace('_', "").parse::<u16>()
        && port != 0
    {
        return Problem::new(format!("`{whole}` has underscores"), format!("write {port}"));
    }
    // Other tools accept "60001 - 60100", "60001:60100" and "60001..60100".
    let numbers: Vec<&str> =
        whole.split(|c: char| !c.is_ascii_digit()).filter(|part| !part.is_empty()).collect();
    let help = match numbers.as_slice() {
        [first, last] if is_range(whole, first, last) => format!("write \"{first}-{last}\""),
        [_, _, ..] => "write a list, such as [40002, \"60001-60100\"]".into(),
        _ => "write a number such as 40002, or a range such as \"60001-60100\", both ends included".into(),
    };
    Problem::new(format!("`{whole}` is not a port or a range of ports"), help)
}

/// Whether a text means the range from `first` to `last` in the notation of another tool. Any other text gets no remedy that
/// names a range: it could open more ports than were meant.
fn is_range(whole: &str, first: &str, last: &str) -> bool {
    let between = whole.strip_prefix(first).and_then(|rest| rest.strip_suffix(last)).map(str::trim);
    let ordered = |a: &str, b: &str| Some(a.parse::<u16>().ok()? <= b.parse::<u16>().ok()?);
    matches!(between, Some("-" | ":" | ".." | "..." | "..=" | "\u{2013}" | "to"))
        && ordered(first, last) == Some(true)
}

impl fmt::Display for PortItem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Serialize for PortItem {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.0.first == self.0.last {
            serializer.serialize_u16(self.0.first)
        } else {
            serializer.collect_str(&self.0)
        }
    }
}

struct ItemVisitor;

impl Visitor<'_> for ItemVisitor {
    type Value = PortItem;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a port or a \"first-last\" range")
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<PortItem, E> {
        self.visit_str(&number.to_string())
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<PortItem, E> {
        self.visit_str(&number.to_string())
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<PortItem, E> {
        PortItem::parse(text).map_err(E::custom)
    }
}

impl<'de> Deserialize<'de> for PortItem {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ItemVisitor)
    }
}

impl JsonSchema for PortItem {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "PortItem".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "anyOf": [
                {"type": "integer", "minimum": 1, "maximum": u16::MAX},
                {"type": "string", "pattern": PATTERN},
            ],
            "format": Self::FORMAT,
        })
    }
}

/// Ports: a number, a `"first-last"` range with both ends included, or a list of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ports(pub Vec<PortItem>);

impl Ports {
    /// The ranges in the order they were written.
    pub fn ranges(&self) -> impl Iterator<Item = PortRange> + '_ {
        self.0.iter().map(|item| item.0)
    }

    /// The ranges, sorted, adjacent ones joined.
    #[must_use]
    pub fn normalised(&self) -> Vec<PortRange> {
        PortRange::join(&self.ranges().collect::<Vec<_>>())
    }

    /// How many ports there are, 0 to 65535, if no two ranges overlap.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.normalised().iter().map(PortRange::count).sum()
    }

    /// Reports an empty list, and ranges of the list that overlap.
    pub(crate) fn check(&self, path: &Path<'_>, report: &mut Report<'_>) {
        if self.0.is_empty() && report.intact(path) {
            let help = "name at least one port, or remove the key";
            report.error(path, Problem::new("the list of ports is empty", help));
        }
        let mut sorted: Vec<(PortRange, usize)> =
            self.ranges().enumerate().map(|(index, range)| (range, index)).collect();
        sorted.sort_unstable();
        // The widest so far, not merely the neighbour: 1-100, 2-3, 50-60 overlap twice.
        let mut widest: Option<(PortRange, usize)> = None;
        for (range, index) in sorted {
            if let Some((other, other_index)) = widest
                && range.first <= other.last
            {
                let (late, early) =
                    if index > other_index { ((range, index), other) } else { ((other, other_index), range) };
                report.error(&path.index(late.1), overlap(late.0, early));
            }
            if widest.is_none_or(|(other, _)| range.last > other.last) {
                widest = Some((range, index));
            }
        }
    }
}

fn overlap(late: PortRange, early: PortRange) -> Problem {
    if late == early {
        return Problem::new(format!("{late} is in this list twice"), "remove one of them");
    }
    let joined = PortRange { first: late.first.min(early.first), last: late.last.max(early.last) };
    Problem::new(
        format!("{late} overlaps {early} in the same list"),
        format!("write \"{joined}\" for both, or make them disjoint"),
    )
}

impl Serialize for Ports {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        FlowSeq(&self.0).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Ports {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PortsVisitor;

        impl<'de> Visitor<'de> for PortsVisitor {
            type Value = Ports;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a port, a \"first-last\" range, or a list of them")
            }

            fn visit_i64<E: de::Error>(self, number: i64) -> Result<Ports, E> {
                ItemVisitor.visit_i64(number).map(|item| Ports(vec![item]))
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<Ports, E> {
                ItemVisitor.visit_u64(number).map(|item| Ports(vec![item]))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Ports, E> {
                ItemVisitor.visit_str(text).map(|item| Ports(vec![item]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Ports, A::Error> {
                let mut items = Vec::with_capacity(list.size_hint().unwrap_or(0).min(1024));
                while let Some(item) = list.next_element()? {
                    items.push(item);
                }
                Ok(Ports(items))
            }
        }

        deserializer.deserialize_any(PortsVisitor)
    }
}

impl JsonSchema for Ports {
    fn schema_name() -> Cow<'static, str> {
        "Ports".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let item = PortItem::json_schema(generator);
        json_schema!({
            "description": "A port, a \"first-last\" range with both ends included, or a list of them",
            "anyOf": [item, {"type": "array", "items": item}],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: u16, last: u16) -> PortRange {
        PortRange { first, last }
    }

    #[test]
    fn both_ends_are_kept() {
        assert_eq!(PortItem::parse("60001-60100"), Ok(PortItem(range(60001, 60100))));
        assert_eq!(PortItem::parse("1-65535"), Ok(PortItem(range(1, 65535))));
        assert_eq!(PortItem::parse("40002"), Ok(PortItem(range(40002, 40002))));
        assert_eq!(PortItem::parse("7-7").unwrap().to_string(), "7");
    }

    #[test]
    fn each_mistake_has_its_remedy() {
        let help = |text: &str| PortItem::parse(text).unwrap_err().help;
        assert_eq!(help("60100-60001"), "write \"60001-60100\"");
        assert_eq!(help("60001:60100"), "write \"60001-60100\"");
        assert_eq!(help("60001 - 60100"), "write \"60001-60100\"");
        assert_eq!(help("1_000"), "write 1000");
        // No remedy names a range that was not meant.
        for text in ["1e3", "80.443", "8080/80", "443 x 80", "5--6", "80:443:8"] {
            assert_eq!(help(text), "write a list, such as [40002, \"60001-60100\"]", "{text}");
        }
        assert_eq!(help("80,443"), "write a list, such as [40002, \"60001-60100\"]");
        assert_eq!(help("0"), "write ports from 1 to 65535");
        assert_eq!(help("0-100"), "write ports from 1 to 65535");
        assert_eq!(help("65536"), "write ports from 1 to 65535");
        assert_eq!(help("99999999999999999999"), help("http"));
        for bad in ["", "-", "-5", "5-", "+5", "5-+6", "5-6-7", "٣", "1e3", "0x50"] {
            assert!(PortItem::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn numbers_are_decimal_without_leading_zeros() {
        let help = |text: &str| PortItem::parse(text).unwrap_err().help;
        assert_eq!(help("010"), "write 10 if it is decimal");
        assert_eq!(help("0080-90"), "write 80 if it is decimal");
        assert_eq!(help("80-090"), "write 90 if it is decimal");
        assert_eq!(help("00"), "write ports from 1 to 65535");
        assert_eq!(help("0x50"), "write 80, which is decimal");
        assert_eq!(help("0Xffff"), "write 65535, which is decimal");
    }

    #[test]
    fn the_pattern_accepts_exactly_the_ports() {
        let pattern = regex::Regex::new(PATTERN).unwrap();
        for port in 0..=70_000_u32 {
            assert_eq!(pattern.is_match(&port.to_string()), (1..=65_535).contains(&port), "{port}");
        }
        for bad in ["010", "0", "1-", "-1", "1--2", "1-2-3", " 1", "1 ", "65536-1", "1-65536", "0x50"] {
            assert!(!pattern.is_match(bad), "{bad}");
        }
        assert!(pattern.is_match("60001-60100"));
    }

    #[test]
    fn normalising_joins_neighbours() {
        let ports = Ports(vec![
            PortItem(range(200, 300)),
            PortItem(range(100, 199)),
            PortItem(range(65535, 65535)),
            PortItem(range(302, 302)),
        ]);
        assert_eq!(ports.normalised(), [range(100, 300), range(302, 302), range(65535, 65535)]);
        assert_eq!(ports.count(), 203);
    }

    #[test]
    fn scalar_and_list_read_alike() {
        let read = |json: &str| serde_json::from_str::<Ports>(json).unwrap();
        assert_eq!(read("80"), read("[80]"));
        assert_eq!(read("\"80-90\""), read("[\"80-90\"]"));
        assert_eq!(serde_json::to_string(&read("[80, \"81-82\"]")).unwrap(), "[80,\"81-82\"]");
    }
}
