//! Static configuration: `routes.static` of the configuration file.

use crate::config::{StaticRoute, Via};
use crate::routes::model::{DesiredRoute, NextHop, SourceKind, Target};

/// The routes that the entries describe.
#[must_use]
pub fn static_routes(entries: &[StaticRoute]) -> Vec<DesiredRoute> {
    let route = |entry: &StaticRoute| {
        let hop = |via: &Via| NextHop {
            via: via.address(),
            dev: via.dev().or(entry.dev.as_ref()).map(|dev| dev.0.clone()),
            weight: match via {
                Via::Address(_) => 1,
                Via::Detailed(detailed) => detailed.weight,
            },
        };
        let target = if entry.blackhole {
            Target::Blackhole
        } else {
            Target::Forward {
                via: entry.via.as_slice().iter().map(hop).collect(),
                backup: entry.backup.as_slice().iter().map(hop).collect(),
            }
        };
        DesiredRoute {
            to: entry.to.net(),
            target,
            metric: entry.metric,
            table: entry.table,
            source: SourceKind::Static,
            origin: String::new(),
        }
    };
    entries.iter().map(route).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_the_documentation_is_read() {
        let yaml = r#"
role: host
routes:
  static:
    - {to: 10.200.1.0/24, via: 192.168.31.17}
    - {to: 10.200.2.0/24, via: [192.168.31.18, {via: 192.168.31.19, weight: 3}]}
    - {to: 10.200.3.0/24, via: 192.168.31.18, backup: 192.168.31.19, metric: 50}
    - {to: "fd00:200::/56", via: {via: "fe80::17", dev: eth0}}
    - {to: "fd00:300::/56", via: ["fe80::17", {via: "fe80::18", dev: eth1}], dev: eth0, table: 7}
    - {to: 10.200.4.0/24, via: "fd31::17"}
    - {to: 10.200.9.0/24, blackhole: true}
"#;
        let config = crate::config::parse(yaml, None).unwrap().config;
        let lines = |config: &crate::config::Config| {
            let routes = static_routes(&config.routes.as_ref().unwrap().fixed);
            routes
                .iter()
                .map(|route| format!("{route} {:?} {:?}", route.metric, route.table))
                .collect::<Vec<_>>()
        };
        insta::assert_snapshot!(lines(&config).join("\n"), @r"
    10.200.1.0/24 via 192.168.31.17 (static) None None
    10.200.2.0/24 via 192.168.31.18 via 192.168.31.19 weight 3 (static) None None
    10.200.3.0/24 via 192.168.31.18 backup 192.168.31.19 (static) Some(50) None
    fd00:200::/56 via fe80::17 dev eth0 (static) None None
    fd00:300::/56 via fe80::17 dev eth0 via fe80::18 dev eth1 (static) None Some(7)
    10.200.4.0/24 via fd31::17 (static) None None
    blackhole 10.200.9.0/24 (static) None None
    ");
        // `check` prints the same configuration.
        let printed = config.effective().to_yaml().unwrap();
        assert_eq!(lines(&crate::config::parse(&printed, None).unwrap().config), lines(&config));
    }
}
