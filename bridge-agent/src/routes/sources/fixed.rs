//! Static configuration: `routes.static` of the configuration file.
//!
//! ```yaml
//! static:
//!   - {to: 10.200.1.0/24, via: 192.168.31.17}
//!   - {to: 10.200.2.0/24, via: [192.168.31.18, {via: 192.168.31.19, weight: 3}]}      # multipath
//!   - {to: 10.200.3.0/24, via: 192.168.31.18, backup: 192.168.31.19, metric: 50}
//!   - {to: "fd00:200::/56", via: {via: "fe80::17", dev: eth0}}
//!   - {to: 10.200.9.0/24, blackhole: true}
//! ```

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::routes::model::{DesiredRoute, NextHop, SourceKind, Target};

/// One entry of `routes.static`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct StaticRoute {
    /// The network; host bits must be zero.
    pub to: IpNet,
    /// One next hop, or several that are used together.
    #[serde(default, skip_serializing_if = "OneOrMany::is_empty")]
    pub via: OneOrMany<Via>,
    /// Next hops for when none of `via` answers.
    #[serde(default, skip_serializing_if = "OneOrMany::is_empty")]
    pub backup: OneOrMany<Via>,
    /// Instead of the metric of all routes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metric: Option<u32>,
    /// Instead of the table of all routes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub table: Option<u32>,
    /// Packets are dropped in silence; excludes `via`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub blackhole: bool,
}

/// A next hop: an address, or an address and how to use it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Via {
    /// The address alone.
    Address(IpAddr),
    /// With interface or weight.
    Detailed(DetailedVia),
}

/// See [`Via::Detailed`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DetailedVia {
    /// The address.
    pub via: IpAddr,
    /// The interface.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dev: Option<String>,
    /// 1 to 256.
    #[serde(default = "one")]
    pub weight: u16,
}

const fn one() -> u16 {
    1
}

impl From<Via> for NextHop {
    fn from(via: Via) -> Self {
        match via {
            Via::Address(via) => Self::new(via),
            Via::Detailed(DetailedVia { via, dev, weight }) => Self { via, dev, weight },
        }
    }
}

/// A single value stands for a list of one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
    pub fn into_vec(self) -> Vec<T> {
        match self {
            Self::One(one) => vec![one],
            Self::Many(many) => many,
        }
    }
}

/// What is wrong with an entry of `routes.static`, seen without asking the kernel.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum StaticError {
    /// Host bits are set.
    #[error("routes.static: {to} has host bits set; write {}", to.trunc())]
    HostBits {
        /// As written.
        to: IpNet,
    },
    /// Two entries for one network.
    #[error(
        "routes.static: {to} is written twice; write one entry with `via: [FIRST, SECOND]` to use both next hops"
    )]
    Twice {
        /// The network.
        to: IpNet,
    },
    /// Neither next hop nor blackhole, or both.
    #[error("routes.static: {to} needs either `via` or `blackhole: true`")]
    Target {
        /// The network.
        to: IpNet,
    },
    /// A weight no kernel takes.
    #[error("routes.static: {to} via {via} has the weight {weight}; write 1 to 256")]
    Weight {
        /// The network.
        to: IpNet,
        /// The next hop.
        via: IpAddr,
        /// As written.
        weight: u16,
    },
    /// IPv6 through IPv4.
    #[error("routes.static: {to} is IPv6 and {via} is not; write an IPv6 next hop")]
    Family {
        /// The network.
        to: IpNet,
        /// The next hop.
        via: IpAddr,
    },
}

/// The routes of `routes.static`, or the first thing that is wrong with them.
pub fn static_routes(entries: &[StaticRoute]) -> Result<Vec<DesiredRoute>, StaticError> {
    let mut seen = std::collections::BTreeSet::new();
    entries
        .iter()
        .cloned()
        .map(|entry| {
            let StaticRoute { to, via, backup, metric, table, blackhole } = entry;
            if to != to.trunc() {
                return Err(StaticError::HostBits { to });
            }
            if !seen.insert((table, to)) {
                return Err(StaticError::Twice { to });
            }
            let hops =
                |list: OneOrMany<Via>| list.into_vec().into_iter().map(NextHop::from).collect::<Vec<_>>();
            let (via, backup) = (hops(via), hops(backup));
            if via.is_empty() != blackhole || (via.is_empty() && !backup.is_empty()) {
                return Err(StaticError::Target { to });
            }
            for hop in via.iter().chain(&backup) {
                if !(1..=256).contains(&hop.weight) {
                    return Err(StaticError::Weight { to, via: hop.via, weight: hop.weight });
                }
                if matches!((to, hop.via), (IpNet::V6(_), IpAddr::V4(_))) {
                    return Err(StaticError::Family { to, via: hop.via });
                }
            }
            let target = if blackhole { Target::Blackhole } else { Target::Forward { via, backup } };
            Ok(DesiredRoute { to, target, metric, table, source: SourceKind::Static, origin: String::new() })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(yaml: &str) -> Result<Vec<String>, String> {
        let entries: Vec<StaticRoute> = serde_saphyr::from_str(yaml).map_err(|error| error.to_string())?;
        let routes = static_routes(&entries).map_err(|error| error.to_string())?;
        Ok(routes.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn every_form_of_the_documentation_is_read() {
        let yaml = r#"
            - {to: 10.200.1.0/24, via: 192.168.31.17}
            - {to: 10.200.2.0/24, via: [192.168.31.18, {via: 192.168.31.19, weight: 3}]}
            - {to: 10.200.3.0/24, via: 192.168.31.18, backup: 192.168.31.19, metric: 50}
            - {to: "fd00:200::/56", via: {via: "fe80::17", dev: eth0}}
            - {to: 10.200.9.0/24, blackhole: true}
        "#;
        insta::assert_snapshot!(parse(yaml).unwrap().join("\n"), @r"
        10.200.1.0/24 via 192.168.31.17 (static)
        10.200.2.0/24 via 192.168.31.18 via 192.168.31.19 weight 3 (static)
        10.200.3.0/24 via 192.168.31.18 backup 192.168.31.19 (static)
        fd00:200::/56 via fe80::17 dev eth0 (static)
        blackhole 10.200.9.0/24 (static)
        ");
    }

    #[test]
    fn what_cannot_be_meant_is_refused_with_what_to_write() {
        for (yaml, text) in [
            ("- {to: 10.200.1.5/24, via: 192.168.31.17}", "write 10.200.1.0/24"),
            ("- {to: 10.1.0.0/24, via: 192.0.2.1}\n- {to: 10.1.0.0/24, via: 192.0.2.2}", "written twice"),
            ("- {to: 10.1.0.0/24}", "either `via` or `blackhole: true`"),
            ("- {to: 10.1.0.0/24, via: 192.0.2.1, blackhole: true}", "either `via` or `blackhole: true`"),
            ("- {to: 10.1.0.0/24, via: {via: 192.0.2.1, weight: 257}}", "write 1 to 256"),
            ("- {to: 'fd00::/64', via: 192.0.2.1}", "write an IPv6 next hop"),
            ("- {to: 10.1.0.0/24, via: 192.0.2.1, gateway: x}", "gateway"),
        ] {
            let error = parse(yaml).unwrap_err();
            assert!(error.contains(text), "{yaml}: {error}");
        }
    }
}
