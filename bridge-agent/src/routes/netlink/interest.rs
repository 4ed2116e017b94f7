//! Which routes of the host a plan can depend on. A host may carry the routes of the whole internet; bridge does
//! not read them into its memory, nor wake up when one of them changes.

use std::borrow::Borrow;
use std::collections::BTreeSet;

use crate::routes::model::{DesiredRoute, KernelRoute, TABLE_LOCAL, TABLE_MAIN, Target};
use crate::routes::prefix_map::{PrefixMap, host};
use crate::routes::settings::Settings;

/// The networks and next hops that are wanted, and the tables they live in.
#[derive(Clone, Debug, Default)]
pub struct Interest {
    networks: PrefixMap<()>,
    tables: BTreeSet<u32>,
}

impl Interest {
    /// What planning `desired` needs to see.
    #[must_use]
    pub fn of<R: Borrow<DesiredRoute>>(desired: &[R], settings: &Settings) -> Self {
        let mut interest =
            Self { networks: PrefixMap::default(), tables: [TABLE_MAIN, TABLE_LOCAL, settings.table].into() };
        for route in desired.iter().map(Borrow::borrow) {
            interest.networks.insert(route.to, ());
            interest.tables.extend(route.table);
            if let Target::Forward { via, backup } = &route.target {
                for hop in via.iter().chain(backup) {
                    interest.networks.insert(host(hop.via), ());
                }
            }
        }
        interest
    }

    /// Whether the route can change a plan.
    #[must_use]
    pub fn matters(&self, route: &KernelRoute) -> bool {
        route.is_own()
            || self.tables.contains(&route.key.table)
                && (route.key.to.prefix_len() == 0
                    || route.is_connected()
                    || self.networks.overlaps(route.key.to))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routes::model::{KernelHop, PROTOCOL, RouteKey, RouteKind, SourceKind};

    #[test]
    fn only_what_can_change_a_plan_matters() {
        let wanted = DesiredRoute::forward(
            "10.200.1.0/24".parse().unwrap(),
            "192.168.31.17".parse().unwrap(),
            SourceKind::Static,
            "",
        );
        let interest = Interest::of(&[wanted], &Settings::default());
        let route = |to: &str, table, protocol, via: Option<&str>| KernelRoute {
            key: RouteKey { table, to: to.parse().unwrap(), tos: 0, metric: 0 },
            protocol,
            kind: RouteKind::Unicast,
            hops: vec![KernelHop { via: via.map(|via| via.parse().unwrap()), ifindex: 1, weight: 1 }],
            altered: false,
        };
        let gateway = Some("192.168.31.1");
        for (matters, route) in [
            (true, route("10.200.0.0/16", 254, 4, gateway)),
            (true, route("10.200.1.9/32", 254, 4, gateway)),
            (true, route("192.168.31.16/28", 254, 4, gateway)),
            (true, route("0.0.0.0/0", 254, 4, gateway)),
            (true, route("172.16.0.0/16", 254, 2, None)),
            (true, route("203.0.113.0/24", 7, PROTOCOL, gateway)),
            (false, route("203.0.113.0/24", 254, 4, gateway)),
            (false, route("10.200.1.0/24", 7, 4, gateway)),
        ] {
            assert_eq!(interest.matters(&route), matters, "{route:?}");
        }
    }
}
