//! Names beside addresses, in tables, lines and JSON.

use std::{
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use clap::Args;
use ipnet::IpNet;
use serde::Serialize;
use serde_json::Value;

use super::{Error, Global, block_on};
use crate::{
    api::{NameList, client::Client},
    config,
    kernel::lock::lock,
};

/// Time between two requests for the names, in output that goes on.
const REFRESH: Duration = Duration::from_secs(5);

/// `--no-names`.
#[derive(Clone, Copy, Debug, Default, Args)]
pub(super) struct NoNames {
    /// Show addresses only: no names of pods, nor those of `names` in the configuration
    #[arg(long)]
    no_names: bool,
}

/// Names of addresses.
#[derive(Debug, Default)]
pub(super) struct Names {
    list: NameList,
    /// Configured ones, the longest prefix first.
    configured: Vec<(IpNet, String)>,
}

impl NoNames {
    /// Asks the agent for names; without one, the configuration has some.
    pub(super) fn names(self, global: &Global) -> Names {
        block_on(async { Ok::<_, Error>(self.fetch(&global.agent_socket(), &global.config).await) })
            .unwrap_or_default()
    }

    /// As [`Self::names`], inside a runtime, and again after a while.
    pub(super) async fn followed(self, global: &Global) -> Arc<Mutex<Names>> {
        let (socket, config) = (global.agent_socket(), global.config.clone());
        let names = Arc::new(Mutex::new(self.fetch(&socket, &config).await));
        let shared = Arc::clone(&names);
        if !self.no_names {
            tokio::spawn(async move {
                loop {
                    tokio::time::sleep(REFRESH).await;
                    let fresh = self.fetch(&socket, &config).await;
                    *lock(&shared) = fresh;
                }
            });
        }
        names
    }

    async fn fetch(self, socket: &Path, file: &Path) -> Names {
        if self.no_names {
            return Names::default();
        }
        let asked = async { Client::connect(socket).await?.get::<NameList>("/v1/names").await };
        let list = asked.await.unwrap_or_else(|_| {
            let configured = config::load(file).map(|loaded| loaded.config.names).unwrap_or_default();
            NameList { configured, ..NameList::default() }
        });
        Names::new(list)
    }
}

impl Names {
    pub(super) fn new(list: NameList) -> Self {
        let network = |(key, name): (&String, &String)| {
            let net = key.parse::<IpNet>().or_else(|_| key.parse::<IpAddr>().map(IpNet::from)).ok()?;
            Some((net, name.clone()))
        };
        let mut configured: Vec<_> = list.configured.iter().filter_map(network).collect();
        configured.sort_by_key(|(net, _)| std::cmp::Reverse(net.prefix_len()));
        Self { list, configured }
    }

    /// The name of an address: that of its pod, else the configured one with the longest prefix.
    pub(super) fn get(&self, address: IpAddr) -> Option<&str> {
        let configured = || self.configured.iter().find(|(net, _)| net.contains(&address));
        self.list.pods.get(&address).or_else(|| configured().map(|(_, name)| name)).map(String::as_str)
    }

    /// The name of a pod by its UID.
    pub(super) fn pod(&self, uid: &str) -> Option<&str> {
        self.list.uids.get(uid).map(String::as_str)
    }

    /// An address with its port, and its name if it has one.
    pub(super) fn show(&self, at: SocketAddr) -> String {
        match self.get(at.ip()) {
            Some(name) => format!("{at} ({name})"),
            None => at.to_string(),
        }
    }

    /// JSON of an object with the fields `source` and `destination`, beside which it gets `sourceName` and `destinationName`.
    pub(super) fn annotate(&self, object: &impl Serialize) -> Result<Value, serde_json::Error> {
        let mut value = serde_json::to_value(object)?;
        for (field, named) in [("source", "sourceName"), ("destination", "destinationName")] {
            let address = value[field].as_str().and_then(|text| {
                text.parse::<IpAddr>().or_else(|_| text.parse::<SocketAddr>().map(|at| at.ip())).ok()
            });
            if let (Some(name), Some(fields)) =
                (address.and_then(|address| self.get(address)), value.as_object_mut())
            {
                fields.insert(named.to_owned(), name.into());
            }
        }
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> Names {
        let configured =
            [("192.168.31.67", "plc-7"), ("192.168.31.0/24", "plant"), ("fd31::/64", "plant-v6")];
        let configured = configured.map(|(key, name)| (key.to_owned(), name.to_owned())).into();
        let pods = [("10.200.1.91".parse().unwrap(), "shop/warehouse".to_owned())].into();
        Names::new(NameList { configured, pods, ..NameList::default() })
    }

    #[test]
    fn the_longest_prefix_names_an_address() {
        let names = names();
        for (address, name) in [
            ("192.168.31.67", Some("plc-7")),
            ("192.168.31.68", Some("plant")),
            ("fd31::9", Some("plant-v6")),
            ("10.200.1.91", Some("shop/warehouse")),
            ("10.200.1.92", None),
        ] {
            assert_eq!(names.get(address.parse().unwrap()), name, "{address}");
        }
        assert_eq!(names.show("192.168.31.67:502".parse().unwrap()), "192.168.31.67:502 (plc-7)");
    }

    #[test]
    fn json_gets_names_beside_addresses() {
        let flow =
            serde_json::json!({ "source": "10.200.1.91", "destination": "192.0.2.1", "sourcePort": 1 });
        let named = names().annotate(&flow).unwrap();
        assert_eq!(named["sourceName"], "shop/warehouse");
        assert_eq!(named.get("destinationName"), None, "{named}");
    }
}
