//! `routes.static`: a network and the way to it.
//!
//! ```yaml
//! static:
//!   - {to: 10.200.1.0/24, via: 192.168.31.17}
//!   - {to: 10.200.2.0/24, via: [192.168.31.18, {via: 192.168.31.19, weight: 3}]}      # multipath
//!   - {to: 10.200.3.0/24, via: 192.168.31.18, backup: 192.168.31.19, metric: 50}
//!   - {to: "fd00:200::/56", via: "fe80::17", dev: eth0}
//!   - {to: 10.200.9.0/24, blackhole: true}
//! ```

use std::collections::HashMap;
use std::fmt;
use std::marker::PhantomData;
use std::net::IpAddr;

use ipnet::IpNet;
use schemars::JsonSchema;
use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer, StrDeserializer};
use serde::de::{Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

use super::interface::InterfaceName;
use super::leaf::{Problem, is_of_a_group};
use super::network::Network;
use super::report::{Path, Report};
use super::special::never_routed;

/// `RT_TABLE_LOCAL` of `linux/rtnetlink.h`: the host's own, broadcast and multicast addresses.
pub const TABLE_LOCAL: u32 = 255;

/// A route that is always wanted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct StaticRoute {
    /// The destination, usually the pod network of one node.
    pub to: Network,
    /// The next hop, usually the address of that node; or several, which are used together.
    #[serde(default, skip_serializing_if = "OneOrMany::is_empty")]
    pub via: OneOrMany<Via>,
    /// The next hops for when none of `via` answers.
    #[serde(default, skip_serializing_if = "OneOrMany::is_empty")]
    pub backup: OneOrMany<Via>,
    /// The interface to leave by, of all next hops that name none. Left out: the one that the next hop is reached by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dev: Option<InterfaceName>,
    /// The metric. Left out: `routes.metric`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metric: Option<u32>,
    /// The routing table. Left out: `routes.table`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub table: Option<u32>,
    /// Packets are dropped in silence, instead of following the default route. Takes the place of `via`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub blackhole: bool,
}

/// A next hop: an address, or an address and how to use it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum Via {
    /// The address alone.
    Address(IpAddr),
    /// With interface or weight.
    Detailed(DetailedVia),
}

/// A next hop and how to use it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DetailedVia {
    /// Address of the next hop.
    pub via: IpAddr,
    /// The interface.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dev: Option<InterfaceName>,
    /// Its share of the flows among several next hops.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 256))]
    pub weight: u16,
}

const fn one() -> u16 {
    1
}

/// A single value stands for a list of one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum OneOrMany<T> {
    /// One.
    One(T),
    /// A list.
    Many(Vec<T>),
}

impl<T> Default for OneOrMany<T> {
    fn default() -> Self {
        Self::Many(Vec::new())
    }
}

impl<T> OneOrMany<T> {
    /// Whether there is nothing.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        matches!(self, Self::Many(list) if list.is_empty())
    }

    /// All of them.
    #[must_use]
    pub const fn as_slice(&self) -> &[T] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(many) => many.as_slice(),
        }
    }
}

/// By the form of the value: serde's own `untagged` would lose that `weight` is a number.
impl<'de> Deserialize<'de> for Via {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Form;

        impl<'de> Visitor<'de> for Form {
            type Value = Via;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an address, or a mapping with `via`")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Via, E> {
                text.parse().map(Via::Address).map_err(E::custom)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Via, A::Error> {
                DetailedVia::deserialize(MapAccessDeserializer::new(map)).map(Via::Detailed)
            }
        }

        deserializer.deserialize_any(Form)
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for OneOrMany<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Form<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Form<T> {
            type Value = OneOrMany<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("one value, or a list")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<OneOrMany<T>, E> {
                T::deserialize(StrDeserializer::new(text)).map(OneOrMany::One)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<OneOrMany<T>, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(OneOrMany::One)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<OneOrMany<T>, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(list)).map(OneOrMany::Many)
            }
        }

        deserializer.deserialize_any(Form(PhantomData))
    }
}

impl Via {
    #[must_use]
    pub const fn address(&self) -> IpAddr {
        match self {
            Self::Address(via) | Self::Detailed(DetailedVia { via, .. }) => *via,
        }
    }

    /// The interface, if it names one.
    #[must_use]
    pub const fn dev(&self) -> Option<&InterfaceName> {
        match self {
            Self::Address(_) => None,
            Self::Detailed(detailed) => detailed.dev.as_ref(),
        }
    }
}

/// Holds all entries against each other; `table` is that of an entry that names none.
pub(super) fn check(routes: &[StaticRoute], table: u32, list: &Path<'_>, report: &mut Report<'_>) {
    let mut seen = HashMap::new();
    for (index, route) in routes.iter().enumerate() {
        let at = list.index(index);
        route.check(&at, report);
        if let Some(first) = seen.insert((route.to.net(), route.table.unwrap_or(table)), index) {
            let place = report.place(&list.index(first));
            let to = route.to;
            report.error(
                &at.key("to"),
                Problem::new(
                    format!("{to} already has a route at {place}"),
                    "write one entry with `via: [FIRST, SECOND]` to use both next hops, or with `backup: SECOND`",
                ),
            );
        }
    }
}

impl StaticRoute {
    fn check(&self, path: &Path<'_>, report: &mut Report<'_>) {
        let to = self.to.net();
        if to.prefix_len() == 0 {
            report.error(
                &path.key("to"),
                Problem::new(
                    format!("{to} would take over the default route"),
                    "write the networks of the pods",
                ),
            );
        } else if let Some(special) = never_routed(&to) {
            let message = format!("{to} has addresses to which no route leads: {special}");
            report.error(&path.key("to"), Problem::new(message, "write the networks of the pods"));
        }
        if let Some(table) = self.table {
            check_table(table, &path.key("table"), report);
        }
        if self.blackhole && !(self.via.is_empty() && self.backup.is_empty()) {
            report.error(
                path,
                Problem::new(
                    format!("{to} has both a next hop and `blackhole`"),
                    "write `via` to forward its packets, or `blackhole: true` to drop them",
                ),
            );
        } else if !self.blackhole && self.via.is_empty() && report.intact(path) {
            report.error(
                path,
                Problem::new(
                    format!("{to} has no next hop"),
                    "add `via`, such as `via: 192.168.31.17`, or `blackhole: true` to drop its packets",
                ),
            );
        }
        let mut seen = Vec::new();
        for (key, hops) in [("via", &self.via), ("backup", &self.backup)] {
            let list = path.key(key);
            for (index, hop) in hops.as_slice().iter().enumerate() {
                let at = list.index(index);
                let inner = at.key("via");
                let at = if matches!(hop, Via::Detailed(_)) { &inner } else { &at };
                if let Some(problem) = self.problem(hop, &seen) {
                    report.error(at, problem);
                }
                seen.push((hop.address(), hop.dev()));
            }
        }
    }

    /// Returns the fault of a next hop, compared with those before it.
    fn problem(&self, hop: &Via, before: &[(IpAddr, Option<&InterfaceName>)]) -> Option<Problem> {
        const NODE: &str = "write the address that the node has on the LAN";
        let (to, via) = (self.to.net(), hop.address());
        let link_local = matches!(via, IpAddr::V6(v6) if v6.is_unicast_link_local());
        let (message, help) = if via.is_loopback() || via.is_unspecified() || is_of_a_group(via) {
            (format!("{via} cannot be a next hop"), NODE)
        } else if via.to_canonical() != via {
            (format!("{via} is an IPv4 address in the form of IPv6, which never is on the wire"), NODE)
        } else if via.is_ipv4() && matches!(to, IpNet::V6(_)) {
            (format!("{to} is IPv6, and the next hop {via} is not"), "write an IPv6 next hop")
        } else if to.prefix_len() > 0 && to.contains(&via) {
            (format!("the next hop {via} is itself inside {to}, so the route would lead to itself"), NODE)
        } else if link_local && hop.dev().or(self.dev.as_ref()).is_none() {
            (format!("the link-local address {via} exists on every link"), "add `dev` with the interface")
        } else if before.contains(&(via, hop.dev())) {
            (format!("the next hop {via} is written twice"), "write each once, with a `weight` if need be")
        } else {
            return None;
        };
        Some(Problem::new(message, help))
    }
}

pub(super) fn check_table(table: u32, path: &Path<'_>, report: &mut Report<'_>) {
    if table == TABLE_LOCAL {
        report.error(
            path,
            Problem::new(
                "table 255 holds the kernel's own local addresses",
                "write 254 for the main table, or a table of your own",
            ),
        );
    }
}
