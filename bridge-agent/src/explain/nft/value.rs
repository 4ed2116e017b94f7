//! Values of expressions on a packet, and patterns that they are compared with.

use std::net::IpAddr;

use serde_json::Value as Json;

use super::ruleset::{Place, Ruleset, statement};
use crate::{
    iptables::walk::{Packet, State},
    model::PortRange,
};

const ICMP: u64 = 1;
const TCP: u64 = 6;
const UDP: u64 = 17;
const ICMPV6: u64 = 58;
const SCTP: u64 = 132;
/// Bits of a SYN, of its answer, and of later segments, in the flags of TCP.
const SYN: u64 = 2;
const ACK: u64 = 0x10;
const SYN_ACK: u64 = 0x12;
/// Bits of `ct state`.
const INVALID: u64 = 1;
const ESTABLISHED: u64 = 2;
const NEW: u64 = 8;
/// Bit of `dnat` in `ct status`.
const DNAT: u64 = 0x20;
/// Types of addresses in a FIB: `unicast`, `local`.
const UNICAST: u64 = 1;
const LOCAL: u64 = 2;

/// The value of an expression.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Value {
    Number(u64),
    Address(IpAddr),
    Text(String),
    /// One of these numbers.
    Among(u64, u64),
    /// A number that is not 0.
    NotZero,
    Concat(Vec<Self>),
    /// The packet has no such field: the rule does not match.
    Absent,
    Unknown,
}

impl Value {
    fn of_ports(ports: PortRange) -> Self {
        match (ports.first.into(), ports.last.into()) {
            (first, last) if first == last => Self::Number(first),
            (first, last) => Self::Among(first, last),
        }
    }
}

/// A packet at a hook.
pub(super) struct At<'a> {
    pub(super) packet: &'a Packet,
    pub(super) original_port: u16,
    pub(super) translated: bool,
    pub(super) input: Option<&'a str>,
    pub(super) output: Option<&'a str>,
    /// `None`: not known.
    pub(super) mark: Option<u64>,
    pub(super) tracked: Tracked,
}

/// A packet as connection tracking has it; `None`: not known.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tracked {
    /// Bits of `ct state`.
    pub(super) state: Option<u64>,
    /// The mark of the connection.
    pub(super) mark: Option<u64>,
}

impl Tracked {
    /// Ahead of connection tracking.
    pub(super) const NOT_YET: Self = Self { state: Some(INVALID), mark: None };
    pub(super) const UNTRACKED: Option<u64> = Some(64);

    pub(super) const fn new(packet: &Packet) -> Self {
        let state = match packet.state {
            _ if !packet.is_tracked() => Some(INVALID),
            State::New => Some(NEW),
            State::Reply | State::Following => Some(ESTABLISHED),
            State::Untracked => Self::UNTRACKED,
            State::Unknown => None,
        };
        Self { state, mark: Some(0) }
    }
}

impl At<'_> {
    fn protocol(&self) -> u64 {
        self.packet.protocol.into()
    }

    /// Returns the value of an expression.
    pub(super) fn value(&self, expression: &Json) -> Value {
        let Some((kind, inner)) = statement(expression) else {
            return constant(expression);
        };
        let text = |key: &str| inner[key].as_str().unwrap_or_default();
        match kind.as_str() {
            "payload" => self.payload(text("protocol"), text("field")),
            "meta" => self.meta(text("key")),
            "ct" => self.conntrack(text("key"), inner["dir"].as_str()),
            "fib" => self.fib(text("result"), &inner["flags"]),
            "concat" => {
                let parts = inner.as_array().map(Vec::as_slice).unwrap_or_default();
                Value::Concat(parts.iter().map(|part| self.value(part)).collect())
            }
            "&" | "|" | "^" | "<<" | ">>" => self.arithmetic(kind, inner),
            "sctp chunk" if self.protocol() != SCTP => Value::Absent,
            // The first packet of an association is an INIT.
            "sctp chunk" if matches!(self.packet.state, State::Reply | State::Following) => Value::Unknown,
            "sctp chunk" => Value::Number((text("name") == "init").into()),
            _ => Value::Unknown,
        }
    }

    fn payload(&self, protocol: &str, field: &str) -> Value {
        let Packet { source, destination, source_ports, destination_port, icmp_type, .. } = *self.packet;
        let number = self.protocol();
        let of = match protocol {
            "ip" => source.is_ipv4(),
            "ip6" => source.is_ipv6(),
            "tcp" => number == TCP,
            "udp" => number == UDP,
            "sctp" => number == SCTP,
            "th" => matches!(number, TCP | UDP | SCTP),
            "icmp" => number == ICMP && source.is_ipv4(),
            "icmpv6" => number == ICMPV6 && source.is_ipv6(),
            _ => return Value::Unknown,
        };
        if !of {
            // Without ports, `th` reads other octets.
            return if protocol == "th" { Value::Unknown } else { Value::Absent };
        }
        match field {
            "saddr" => Value::Address(source),
            "daddr" => Value::Address(destination),
            "protocol" | "nexthdr" => Value::Number(number),
            "sport" => Value::of_ports(source_ports),
            "dport" => Value::Number(destination_port.into()),
            "flags" if protocol == "tcp" => Value::Number(match self.packet.state {
                State::Reply => SYN_ACK,
                State::Following => ACK,
                _ => SYN,
            }),
            "type" => Value::Number(icmp_type.into()),
            _ => Value::Unknown,
        }
    }

    fn meta(&self, key: &str) -> Value {
        let name = |name: Option<&str>| name.map_or(Value::Unknown, |name| Value::Text(name.to_owned()));
        match key {
            "l4proto" => Value::Number(self.protocol()),
            "nfproto" => Value::Number(if self.packet.source.is_ipv4() { 2 } else { 10 }),
            "mark" => self.mark.map_or(Value::Unknown, Value::Number),
            "iifname" | "iif" => name(self.input),
            "oifname" | "oif" => name(self.output),
            _ => Value::Unknown,
        }
    }

    fn conntrack(&self, key: &str, direction: Option<&str>) -> Value {
        match (key, direction) {
            ("state", _) => self.tracked.state.map_or(Value::Unknown, Value::Number),
            ("status", _) => Value::Number(if self.translated { DNAT } else { 0 }),
            ("direction", _) => Value::Number((self.packet.state == State::Reply).into()),
            ("mark", _) => self.tracked.mark.map_or(Value::Unknown, Value::Number),
            (_, Some(_)) if self.packet.state == State::Reply => Value::Unknown,
            ("proto-dst", Some("original")) => Value::Number(self.original_port.into()),
            ("proto-src", Some("original")) => Value::of_ports(self.packet.source_ports),
            ("protocol" | "l4proto", _) => Value::Number(self.protocol()),
            _ => Value::Unknown,
        }
    }

    fn fib(&self, result: &str, flags: &Json) -> Value {
        let has = |flag: &str| flags.as_array().is_some_and(|flags| flags.iter().any(|one| one == flag));
        match result {
            "type" if has("daddr") => Value::Number(if self.packet.to_node { LOCAL } else { UNICAST }),
            "type" if has("saddr") => Value::Number(if self.packet.from_node { LOCAL } else { UNICAST }),
            // A route leads back: the question is about a packet of its own sender.
            "oif" if has("saddr") && has("iif") => Value::NotZero,
            _ => Value::Unknown,
        }
    }

    fn arithmetic(&self, operator: &str, operands: &Json) -> Value {
        let mut operands = operands.as_array().into_iter().flatten().map(|one| self.value(one));
        let mut result = match operands.next() {
            Some(Value::Number(first)) => first,
            Some(Value::Absent) => return Value::Absent,
            _ => return Value::Unknown,
        };
        for operand in operands {
            let Value::Number(operand) = operand else { return Value::Unknown };
            let shift = u32::try_from(operand).unwrap_or(u32::MAX);
            result = match operator {
                "&" => result & operand,
                "|" => result | operand,
                "^" => result ^ operand,
                "<<" => result.checked_shl(shift).unwrap_or_default(),
                _ => result.checked_shr(shift).unwrap_or_default(),
            };
        }
        Value::Number(result)
    }
}

/// Returns the value of a constant; a list of flags is their sum.
fn constant(json: &Json) -> Value {
    match json {
        Json::Bool(value) => Value::Number((*value).into()),
        Json::Number(number) => number.as_u64().map_or(Value::Unknown, Value::Number),
        Json::String(text) => match (text.parse(), text.parse()) {
            (Ok(number), _) => Value::Number(number),
            (_, Ok(address)) => Value::Address(address),
            _ => Value::Text(text.clone()),
        },
        Json::Array(flags) => {
            let bits = flags.iter().map(|flag| match constant(flag) {
                Value::Number(bit) => Some(bit),
                _ => None,
            });
            bits.sum::<Option<u64>>().map_or(Value::Unknown, Value::Number)
        }
        _ => Value::Unknown,
    }
}

impl Ruleset {
    /// Whether a comparison holds. `place`: the chain that it is in.
    pub(super) fn holds(&self, at: &At<'_>, comparison: &Json, place: &Place) -> Option<bool> {
        let left = at.value(&comparison["left"]);
        if left == Value::Absent {
            return Some(false);
        }
        let right = &comparison["right"];
        let is = || self.fits(&left, right, place);
        match comparison["op"].as_str()? {
            "==" => is(),
            "!=" => is().map(|holds| !holds),
            "in" => match (&left, constant(right)) {
                (Value::Number(left), Value::Number(bits)) => Some(left & bits != 0),
                _ => is(),
            },
            order @ ("<" | ">" | "<=" | ">=") => match (&left, constant(right)) {
                (Value::Number(left), Value::Number(right)) => Some(match order {
                    "<" => *left < right,
                    ">" => *left > right,
                    "<=" => *left <= right,
                    _ => *left >= right,
                }),
                _ => None,
            },
            _ => None,
        }
    }

    /// Whether a value is, or is in, a pattern.
    pub(super) fn fits(&self, value: &Value, pattern: &Json, place: &Place) -> Option<bool> {
        if *value == Value::Unknown {
            return None;
        }
        if let Some(name) = pattern.as_str().and_then(|text| text.strip_prefix('@')) {
            let (family, table, _) = place;
            let set = self.elements.get(&(family.clone(), table.clone(), name.to_owned()))?;
            return self.is_in(value, set, place);
        }
        let Some((kind, inner)) = statement(pattern) else {
            return equals(value, &constant(pattern));
        };
        match kind.as_str() {
            "elem" => self.fits(value, &inner["val"], place),
            "set" => self.is_in(value, inner.as_array()?, place),
            "prefix" => {
                let (Value::Address(address), Value::Address(network)) = (value, constant(&inner["addr"]))
                else {
                    return None;
                };
                let length = u8::try_from(inner["len"].as_u64()?).ok()?;
                Some(ipnet::IpNet::new(network, length).ok()?.contains(address))
            }
            "range" => match (value, constant(&inner[0]), constant(&inner[1])) {
                (Value::Number(value), Value::Number(first), Value::Number(last)) => {
                    Some((first..=last).contains(value))
                }
                (Value::Among(low, high), Value::Number(first), Value::Number(last)) => {
                    match (first <= *low && *high <= last, *high < first || last < *low) {
                        (true, _) => Some(true),
                        (_, apart) => apart.then_some(false),
                    }
                }
                (Value::Address(value), Value::Address(first), Value::Address(last)) => {
                    Some(value.is_ipv4() == first.is_ipv4() && (first..=last).contains(value))
                }
                _ => None,
            },
            "concat" => {
                let Value::Concat(values) = value else { return None };
                let parts = inner.as_array().filter(|parts| parts.len() == values.len())?;
                let each = values.iter().zip(parts).map(|(value, part)| self.fits(value, part, place));
                all(each)
            }
            _ => None,
        }
    }

    fn is_in(&self, value: &Value, elements: &[Json], place: &Place) -> Option<bool> {
        let mut unknown = false;
        for element in elements {
            match self.fits(value, element, place) {
                Some(true) => return Some(true),
                Some(false) => {}
                None => unknown = true,
            }
        }
        (!unknown).then_some(false)
    }
}

fn all(mut conditions: impl Iterator<Item = Option<bool>>) -> Option<bool> {
    conditions
        .try_fold(Some(true), |so_far, one| match one {
            // One that fails decides.
            Some(false) => Err(()),
            Some(true) => Ok(so_far),
            None => Ok(None),
        })
        .unwrap_or(Some(false))
}

fn equals(value: &Value, other: &Value) -> Option<bool> {
    match (value, other) {
        (Value::NotZero, Value::Number(0)) => Some(false),
        (Value::Among(first, last), Value::Number(one)) if (first..=last).contains(&one) => None,
        (Value::NotZero | Value::Unknown | Value::Concat(_), _) | (_, Value::Unknown) => None,
        (Value::Text(name), Value::Text(pattern)) => {
            Some(pattern.strip_suffix('*').map_or(name == pattern, |prefix| name.starts_with(prefix)))
        }
        (Value::Number(a), Value::Number(b)) => Some(a == b),
        (Value::Address(a), Value::Address(b)) => Some(a == b),
        // A name that this interpreter does not translate.
        (Value::Number(_), Value::Text(_)) => None,
        _ => Some(false),
    }
}
