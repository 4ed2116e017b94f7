//! What the pool is asked to be.

use std::path::PathBuf;

use ipnet::IpNet;

use crate::model::PortRange;

/// What the pool is asked to be; validated by the configuration.
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
        }
    }
}
