//! Settings of the pool.

use std::path::PathBuf;

use ipnet::IpNet;

use crate::{config::Config, model::PortRange};

/// Settings of the pool; validated by the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The ports of the pool.
    pub ports: Vec<PortRange>,
    /// Ports inside [`Settings::ports`] that are never given out.
    pub exclude: Vec<PortRange>,
    /// Connections to these networks use the pool.
    pub destinations: Vec<IpNet>,
    /// Control groups, by their path below the cgroup2 mount, whose connections are bound without their knowing.
    pub cgroups: Vec<PathBuf>,
    /// Most ports that one network namespace may hold at once towards one destination; `None` for no limit.
    pub quota: Option<u32>,
    /// Whether a socket that is bound outside the pool is kept from connecting to a destination of the pool.
    pub strict: bool,
    /// Whether UDP sockets that bind port 0 get a port of the pool, so that they may send without connecting. The
    /// highest eighth of the ports is set aside for them.
    pub bind_udp: bool,
    /// Clients whose connections bridge masquerades itself, with a port of the pool, before any other rule does; empty:
    /// of no client.
    pub masquerade: Vec<IpNet>,
    /// kube-apiserver's `--service-node-port-range`: not given out.
    pub node_ports: Option<PortRange>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            ports: Vec::new(),
            exclude: Vec::new(),
            destinations: Vec::new(),
            cgroups: Vec::new(),
            quota: None,
            strict: true,
            bind_udp: true,
            masquerade: Vec::new(),
            node_ports: None,
        }
    }
}

impl Settings {
    /// Returns the settings of a configuration; `None`: no pool.
    #[must_use]
    pub fn from_config(config: &Config) -> Option<Self> {
        let pool = config.port_pool.as_ref()?;
        let transparent = pool.transparent.iter().flat_map(|transparent| &transparent.cgroups);
        Some(Self {
            ports: pool.available(),
            destinations: config.pool_destinations(),
            cgroups: transparent.map(|cgroup| PathBuf::from(cgroup.as_str())).collect(),
            quota: pool.quota,
            exclude: Vec::new(),
            strict: pool.strict,
            bind_udp: pool.bind_udp,
            masquerade: if pool.masquerade { config.networks.pod_nets() } else { Vec::new() },
            node_ports: config.policy().node_ports.map(|node_ports| node_ports.range),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;

    #[test]
    fn the_configuration_says_what_is_asked_for() {
        let text = "\
role: host
networks: {pods: [10.200.1.0/24], external: [192.168.31.0/24]}
portPool:
  ports: [\"61001-61100\"]
  exclude: [61050]
  transparent: {cgroups: [/system.slice]}
  quota: 7
";
        let settings = Settings::from_config(&config::parse(text, None).unwrap().config).unwrap();
        let range = |first, last| PortRange { first, last };
        assert_eq!(settings.ports, [range(61001, 61049), range(61051, 61100)]);
        assert_eq!(settings.destinations, ["10.200.1.0/24".parse().unwrap()]);
        assert_eq!(settings.cgroups, [PathBuf::from("/system.slice")]);
        assert_eq!((settings.quota, settings.strict), (Some(7), true));
        assert!(settings.bind_udp && settings.masquerade.is_empty());
        let text = format!("{text}  strict: false\n  bindUdp: false\n");
        let other = Settings::from_config(&config::parse(&text, None).unwrap().config).unwrap();
        assert_eq!(other, Settings { strict: false, bind_udp: false, ..settings });
        let node = text.replace("role: host", "role: node")
            + "  masquerade: true\nnodePorts: {range: 30000-32767}\n";
        let node = Settings::from_config(&config::parse(&node, None).unwrap().config).unwrap();
        assert_eq!(node.masquerade, ["10.200.1.0/24".parse().unwrap()]);
        assert_eq!(node.node_ports, Some(range(30000, 32767)));
        let without = text.split("portPool").next().unwrap();
        assert_eq!(Settings::from_config(&config::parse(without, None).unwrap().config), None);
    }
}
