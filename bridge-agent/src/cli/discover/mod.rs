//! `bridge-agent discover`: behind which node a pod is.

mod failure;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand};
use ipnet::IpNet;
use serde_json::json;
use tokio::sync::broadcast::{self, error::RecvError};

pub(super) use self::failure::Failure;
use super::{
    Error, Global, block_on,
    output::{print, print_json, show},
    time, values,
};
use crate::api::client::{self, Client};
use crate::config;
use crate::routes::discovery::listen;
use crate::routes::discovery::message::Status;
use crate::routes::discovery::probe::{self, probe};
use crate::routes::discovery::read_key;
use crate::routes::discovery::registry::Rules;
use crate::routes::discovery::sniff::Sniffer;
use crate::routes::{Service, Setup, SourceKind};

/// Learn behind which node a pod is.
#[derive(Debug, Args)]
pub struct Discover {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// On the host: take announcements of pods and add a route to each, until interrupted
    Listen(Listen),
    /// In the pod: announce it to a host; needs no privileges
    Probe(Probe),
    /// On the host: show the source addresses of connections to a port
    Sniff(Sniff),
}

#[derive(Debug, Args)]
struct Listen {
    /// Address and port; left out, `routes.discovery.listen` of the configuration
    #[arg(long, value_name = "ADDRESS:PORT", requires = "key_file", value_parser = values::socket_address)]
    listen: Option<SocketAddr>,
    /// The file with the key; the same as in the pods
    #[arg(long, value_name = "FILE", requires = "listen")]
    key_file: Option<PathBuf>,
    /// Believe only pods of this network; may be repeated; left out, `networks.pods` of the configuration
    #[arg(long, value_name = "NETWORK", value_parser = values::network)]
    pods: Vec<IpNet>,
    /// Do not connect back: trust every holder of the key
    #[arg(long)]
    no_check: bool,
}

#[derive(Debug, Args)]
struct Probe {
    /// The host that listens, by name or address
    #[arg(value_name = "HOST:PORT")]
    host: String,
    /// The file with the key; the same as on the host
    #[arg(long, value_name = "FILE", default_value = "/etc/bridge/discovery.key")]
    key_file: PathBuf,
    /// The pod's own address; left out, the one the connection leaves from
    #[arg(long)]
    address: Option<IpAddr>,
    /// Where to wait for the host to connect back; 0 is any free port
    #[arg(long, value_name = "PORT", default_value_t = 0)]
    check_port: u16,
    /// How long the host remembers it
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = time)]
    lifetime: Duration,
    /// A name for people; left out, the name of the host this runs on, which in a pod is the pod's
    #[arg(long)]
    name: Option<String>,
    /// Announce again after this time, such as 60s, until interrupted
    #[arg(long, value_name = "TIME", value_parser = time)]
    every: Option<Duration>,
    /// How long one announcement may take
    #[arg(long, value_name = "TIME", default_value = "15s", value_parser = time)]
    timeout: Duration,
}

#[derive(Debug, Args)]
struct Sniff {
    /// The TCP port that a client in a pod connects to; nothing needs to listen on it
    #[arg(long, value_parser = values::port)]
    port: u16,
    /// End after NUMBER connections
    #[arg(long, value_name = "NUMBER", value_parser = values::number::<u64>)]
    count: Option<u64>,
    /// End after this time, such as 20s
    #[arg(long = "for", value_name = "TIME", value_parser = time)]
    duration: Option<Duration>,
}

impl Discover {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        block_on(async {
            match &self.action {
                Action::Listen(command) => command.run(global).await,
                Action::Probe(command) => command.run(global).await,
                Action::Sniff(command) => command.run(global).await,
            }
        })
    }
}

/// Until SIGINT or SIGTERM.
async fn interrupted() {
    use tokio::signal::unix::{SignalKind, signal};
    match signal(SignalKind::terminate()) {
        Ok(mut terminate) => tokio::select! {
            _ = tokio::signal::ctrl_c() => {}
            _ = terminate.recv() => {}
        },
        Err(_) => _ = tokio::signal::ctrl_c().await,
    }
}

impl Listen {
    async fn run(&self, global: &Global) -> Result<(), Error> {
        match Client::connect(&global.agent_socket()).await {
            Err(client::Error::NotRunning { .. }) => {}
            Ok(_) => return Err(Failure::AgentRuns.into()),
            Err(error) => return Err(error.into()),
        }
        let events = broadcast::Sender::new(1024);
        let mut received = events.subscribe();
        let mut service =
            Service::start(self.setup(&global.config, &global.state_directory().boot())?, events)?;
        let end = interrupted();
        tokio::pin!(end);
        loop {
            tokio::select! {
                () = &mut end => break,
                event = received.recv() => match event {
                    Ok(event) if global.json => print_json(&event)?,
                    Ok(event) => {
                        print(&format!("{} {} {}\n", event.time, event.kind, event.text))?;
                    }
                    Err(RecvError::Lagged(_)) => {}
                    Err(RecvError::Closed) => break,
                },
            }
        }
        // No process would be left to let them expire.
        service.retire(SourceKind::Discovery);
        service.compared().await;
        Ok(())
    }

    /// The whole setup of the configuration, if there is one: routes of its other sources stay as they are.
    fn setup(&self, path: &Path, state: &Path) -> Result<Setup, Error> {
        let mut setup = if path.exists() || self.listen.is_none() {
            Setup::from_config(&config::load_regular(path)?.config, state)?
        } else {
            Setup::default()
        };
        if let (Some(listen), Some(key_file)) = (self.listen, &self.key_file) {
            let key = read_key(key_file, true).map_err(Failure::from)?;
            let rules = setup.discovery.take().map_or_else(Rules::default, |options| options.rules);
            setup.discovery = Some(listen::Options { listen, key, rules, check: true, state: None });
        }
        let Some(discovery) = &mut setup.discovery else {
            return Err(Failure::NotConfigured(path.into()).into());
        };
        discovery.check &= !self.no_check;
        if !self.pods.is_empty() {
            discovery.rules.pods.clone_from(&self.pods);
        }
        Ok(setup)
    }
}

impl Probe {
    async fn run(&self, global: &Global) -> Result<(), Error> {
        let key = read_key(&self.key_file, false).map_err(Failure::from)?;
        let mut failed = false;
        loop {
            let announced = self.once(&key, global).await;
            match (announced, self.every) {
                (outcome, None) => return outcome,
                (Ok(()), Some(_)) => failed = false,
                (Err(error), Some(_)) => {
                    // Once, until it works again.
                    if !std::mem::replace(&mut failed, true) {
                        show(&error, global.json);
                    }
                }
            }
            let pause = self.every.unwrap_or(Duration::from_secs(1));
            tokio::select! {
                () = interrupted() => return Ok(()),
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    async fn once(&self, key: &crate::routes::discovery::message::Key, global: &Global) -> Result<(), Error> {
        let host = self.resolve().await?;
        let options = probe::Options {
            host,
            key: key.clone(),
            address: self.address,
            check_port: self.check_port,
            lifetime: self.lifetime,
            name: self
                .name
                .clone()
                .unwrap_or_else(|| rustix::system::uname().nodename().to_string_lossy().into_owned()),
            timeout: self.timeout,
        };
        let answer = probe(&options).await.map_err(Failure::from)?;
        if answer.status == Status::Refused {
            return Err(Failure::Refused { host, text: answer.text }.into());
        }
        if global.json {
            return print_json(
                &json!({ "ok": true, "host": host, "egress": answer.egress, "lifetime": answer.lifetime, "route": answer.text }),
            );
        }
        let egress =
            answer.egress.map_or_else(|| "an unknown address".to_owned(), |egress| egress.to_string());
        print(&format!(
            "{host} sees this pod as {egress} and reaches it for {} s by: {}\n",
            answer.lifetime, answer.text
        ))
    }

    async fn resolve(&self) -> Result<SocketAddr, Failure> {
        let failed = |reason: String| Failure::Name { name: self.host.clone(), reason };
        if self.host.ends_with(":0") {
            return Err(failed("a port is from 1 to 65535".to_owned()));
        }
        let mut found =
            tokio::net::lookup_host(&self.host).await.map_err(|error| failed(error.to_string()))?;
        // Of a host with both, the family of the address that is announced.
        let fits = |address: &SocketAddr| self.address.is_none_or(|own| own.is_ipv4() == address.is_ipv4());
        found.find(fits).ok_or_else(|| failed("no address of the right family".to_owned()))
    }
}

impl Sniff {
    async fn run(&self, global: &Global) -> Result<(), Error> {
        let mut sniffer = Sniffer::open(self.port).map_err(Failure::Sniff)?;
        let mut seen = BTreeMap::<IpAddr, u64>::new();
        let end = async {
            match self.duration {
                Some(duration) => tokio::time::sleep(duration).await,
                None => interrupted().await,
            }
        };
        tokio::pin!(end);
        while self.count.is_none_or(|count| seen.values().sum::<u64>() < count) {
            tokio::select! {
                () = &mut end => break,
                attempt = sniffer.next() => {
                    let attempt = attempt.map_err(Failure::Sniff)?;
                    *seen.entry(attempt.from.ip()).or_default() += 1;
                    if !global.json {
                        print(&format!("{} -> {}\n", attempt.from, attempt.to))?;
                    }
                }
            }
        }
        if global.json {
            let list: Vec<_> = seen
                .iter()
                .map(|(egress, connections)| json!({ "egress": egress, "connections": connections }))
                .collect();
            return print_json(&list);
        }
        let mut text = String::new();
        for (egress, connections) in seen {
            text.push_str(&format!("{egress}: {connections} connections\n"));
        }
        print(&text)
    }
}
