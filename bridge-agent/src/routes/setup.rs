//! What a configuration says about routes.

use std::net::SocketAddr;
use std::path::PathBuf;

use ipnet::IpNet;
use thiserror::Error;

use super::discovery::listen;
use super::discovery::registry::Rules;
use super::discovery::{KeyError, read_key};
use super::health;
use super::model::DesiredRoute;
use super::netlink;
use super::settings::Settings;
use super::sources::{FileError, static_routes};
use crate::config::Config;

/// Where discovered pods outlive a restart: beside the socket of the agent.
const DISCOVERED: &str = "discovered.json";

/// Why routes cannot be looked after.
#[derive(Debug, Error)]
pub enum Error {
    /// The kernel.
    #[error(transparent)]
    Kernel(#[from] netlink::Error),
    /// The key of discovery.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// `cluster.yaml`.
    #[error(transparent)]
    File(#[from] FileError),
    /// The address of discovery.
    #[error(
        "discovery cannot listen on {address}: {error}; check that the address is this host's and that nothing else has the port"
    )]
    Listen {
        /// Where.
        address: SocketAddr,
        #[source]
        error: std::io::Error,
    },
}

/// Everything that decides about routes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Setup {
    /// How routes are written.
    pub settings: Settings,
    /// `routes.static`.
    pub fixed: Vec<DesiredRoute>,
    /// `routes.file`.
    pub file: Option<PathBuf>,
    /// `routes.discovery`.
    pub discovery: Option<listen::Options>,
    /// The pods that discovery has saved, and the rules that they have to satisfy: for commands, which do not listen.
    pub discovered: Option<(PathBuf, Rules)>,
    /// Whether the API server names routes too.
    pub kubernetes: bool,
}

impl Setup {
    /// As [`Setup::from_config`], for commands that show or export routes: without the key of discovery, which they neither need
    /// nor may be allowed to read.
    pub fn offline(config: &Config, state: &std::path::Path) -> Result<Self, Error> {
        let mut config = config.clone();
        let discovery = config.routes.as_mut().and_then(|routes| routes.discovery.take());
        let pods = config.networks.pods.iter().map(|network| network.net()).collect();
        let discovered = discovery.map(|_| (state.join(DISCOVERED), Rules { pods, ..Rules::default() }));
        Ok(Self { discovered, ..Self::from_config(&config, state)? })
    }

    /// What the configuration comes to; reads the key file of discovery, which keeps discovered pods in the directory `state`.
    pub fn from_config(config: &Config, state: &std::path::Path) -> Result<Self, Error> {
        let Some(routes) = &config.routes else { return Ok(Self::default()) };
        let health = routes.health.enabled.then(|| health::Options {
            interval: routes.health.interval.duration(),
            tcp: routes.health.tcp_port,
            timeout: routes.health.timeout.duration(),
            ..health::Options::default()
        });
        let settings = Settings {
            table: routes.table,
            metric: routes.metric,
            on_withdraw: routes.on_withdraw,
            allow_inside: routes.allow_inside.iter().map(|network| network.net()).collect(),
            health,
        };
        let pods: Vec<IpNet> = config.networks.pods.iter().map(|network| network.net()).collect();
        let discovery = routes.discovery.as_ref().map(|discovery| {
            let key = read_key(&discovery.key_file.0, true)?;
            let rules = Rules { pods, ..Rules::default() };
            Ok::<_, Error>(listen::Options {
                listen: discovery.listen.0,
                key,
                rules,
                check: true,
                state: Some(state.join(DISCOVERED)),
            })
        });
        Ok(Self {
            settings,
            fixed: static_routes(&routes.fixed),
            file: routes.file.as_ref().map(|file| file.0.clone()),
            discovery: discovery.transpose()?,
            discovered: None,
            kubernetes: config.kubernetes.is_some(),
        })
    }
}
