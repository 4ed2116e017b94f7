//! `bridge-agent monitor`: verdicts and route events, live.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use bridge_common::filter::event::verdict;
use clap::{Args, builder::PossibleValuesParser};
use ipnet::IpNet;
use serde::Serialize;

use super::{
    Error, Global, block_on,
    names::{Names, NoNames},
    output::{print, reader_left},
    values,
};
use crate::api::client::{self, Client};
use crate::datapath::{EventReader, Maps, Verdict, VerdictFilter};
use crate::kernel::lock::lock;
use crate::routes::RouteEvent;

/// Show verdicts on packets and route events, live.
///
/// Denied packets always; allowed ones with `enforcement.events.allowed`. Routes, next hops and discovered pods if none of
/// --verdict, --address and --port is given. Comes from the agent; when none runs, verdicts from the kernel itself.
#[derive(Debug, Args)]
pub struct Monitor {
    /// Only this verdict
    #[arg(long, value_parser = PossibleValuesParser::new(verdict::NAMES))]
    verdict: Option<String>,
    /// One side has this address, or is in this network
    #[arg(long, value_name = "ADDRESS", value_parser = values::address)]
    address: Option<IpNet>,
    /// One side has this port
    #[arg(long, value_parser = values::port)]
    port: Option<u16>,
    /// End after N events
    #[arg(long, value_name = "N", value_parser = values::number::<u64>)]
    count: Option<u64>,
    #[command(flatten)]
    names: NoNames,
}

/// Prints verdicts until there were enough.
struct Printer {
    json: bool,
    left: Option<u64>,
    names: Arc<Mutex<Names>>,
}

impl Printer {
    /// Returns whether to go on.
    fn show<T: Serialize>(&mut self, event: &T, text: impl Fn(&T) -> String) -> Result<bool, Error> {
        let line = if self.json {
            let named = lock(&self.names).annotate(event);
            named.map_err(|error| Error::Format(error.to_string()))?.to_string()
        } else {
            text(event)
        };
        print(&format!("{line}\n"))?;
        self.left = self.left.map(|left| left.saturating_sub(1));
        Ok(self.left != Some(0) && !reader_left())
    }
}

impl Monitor {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let filter = VerdictFilter { verdict: self.verdict.clone(), address: self.address, port: self.port };
        block_on(async {
            let names = self.names.followed(global).await;
            let mut printer = Printer { json: global.json, left: self.count, names };
            match Client::connect(&global.agent_socket()).await {
                Ok(mut client) => from_agent(&mut client, &filter, &mut printer).await,
                Err(client::Error::NotRunning { .. }) => {
                    from_kernel(&Maps::open(&global.pins())?, &filter, &mut printer).await
                }
                Err(error) => Err(error.into()),
            }
        })
    }
}

async fn from_agent(client: &mut Client, filter: &VerdictFilter, printer: &mut Printer) -> Result<(), Error> {
    client
        .lines(&format!("/v1/events?{}", query(filter)), |line| {
            if let Ok(verdict) = serde_json::from_slice(line) {
                let names = Arc::clone(&printer.names);
                return printer.show(&verdict, |verdict| text(verdict, &lock(&names)));
            }
            if let Ok(event) = serde_json::from_slice(line) {
                return printer
                    .show(&event, |RouteEvent { time, kind, text }| format!("{time} {kind} {text}"));
            }
            // Neither: it says how many were missed.
            tracing::warn!("too slow: {}", String::from_utf8_lossy(line));
            Ok(true)
        })
        .await
}

/// None of the values needs escaping but the slash and the colon, which a query may hold (RFC 3986, 3.4).
fn query(filter: &VerdictFilter) -> String {
    let pairs = [
        ("verdict", filter.verdict.clone()),
        ("address", filter.address.map(|address| address.to_string())),
        ("port", filter.port.map(|port| port.to_string())),
    ];
    let pairs: Vec<String> =
        pairs.into_iter().filter_map(|(key, value)| Some(format!("{key}={}", value?))).collect();
    pairs.join("&")
}

async fn from_kernel(maps: &Maps, filter: &VerdictFilter, printer: &mut Printer) -> Result<(), Error> {
    tracing::info!("no agent runs: reading from the kernel");
    let mut events = EventReader::new(maps)?;
    let mut go_on = Ok(true);
    while let Ok(true) = go_on {
        let read = events
            .read(maps, |verdict| {
                if matches!(go_on, Ok(true)) && filter.matches(&verdict) {
                    let names = Arc::clone(&printer.names);
                    go_on = printer.show(&verdict, |verdict| text(verdict, &lock(&names)));
                }
            })
            .await;
        read.map_err(|source| Error::Stream { action: "cannot read events", source })?;
    }
    go_on.map(drop)
}

fn text(verdict: &Verdict, names: &Names) -> String {
    let Verdict { time, direction, protocol, interface, reason, length, .. } = verdict;
    let source = names.show(SocketAddr::new(verdict.source, verdict.source_port));
    let destination = names.show(SocketAddr::new(verdict.destination, verdict.destination_port));
    let by = verdict.rule.as_ref().map(|rule| format!(" rule {rule}")).unwrap_or_default();
    let suppressed = match verdict.suppressed {
        0 => String::new(),
        count => format!(" (+{count} not shown)"),
    };
    format!(
        "{time} {:6} {direction:8} {protocol:4} {source} -> {destination} on {interface}, {length} bytes: \
         {reason}{by}{suppressed}",
        verdict.verdict
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_survives_as_a_query() {
        let filter = VerdictFilter {
            verdict: Some("reject".into()),
            address: Some("fd20:1::/64".parse().unwrap()),
            port: Some(22),
        };
        assert_eq!(query(&filter), "verdict=reject&address=fd20:1::/64&port=22");
        assert_eq!(query(&VerdictFilter::default()), "");
    }
}
