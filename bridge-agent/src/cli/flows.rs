//! `bridge-agent flows`: the flow table, read from its pins.

use std::net::SocketAddr;

use bridge_common::filter::flow::state;
use clap::{Args, builder::PossibleValuesParser};
use ipnet::IpNet;

use super::{
    Error, Global,
    names::NoNames,
    output::{Watch, confirmed, print, print_json},
    table, values,
};
use crate::datapath::{FlowFilter, FlowView, Maps, protocol_of};

/// List the flows that are known, or forget some.
#[derive(Debug, Args)]
pub struct Flows {
    /// One side has this address, or is in this network
    #[arg(long, value_name = "ADDRESS", value_parser = values::address)]
    address: Option<IpNet>,
    /// One side has this port
    #[arg(long, value_parser = values::port)]
    port: Option<u16>,
    /// In this state
    #[arg(long, value_parser = PossibleValuesParser::new(&state::NAMES[1..]))]
    state: Option<String>,
    /// Of this protocol: tcp, udp, sctp, icmp, icmpv6, or a number
    #[arg(long, value_parser = protocol)]
    protocol: Option<String>,
    /// Forget the flows: their next packets are judged by the active rules. Without a filter: all
    #[arg(long)]
    delete: bool,
    /// With --delete: list the flows to forget, and forget none
    #[arg(long, requires = "delete")]
    dry_run: bool,
    /// With --delete: do not ask on a terminal before forgetting all flows
    #[arg(long, requires = "delete")]
    yes: bool,
    #[command(flatten)]
    watch: Watch,
    #[command(flatten)]
    names: NoNames,
}

/// A protocol as flows show it.
fn protocol(text: &str) -> Result<String, String> {
    protocol_of(text)
        .ok_or_else(|| "write tcp, udp, sctp, icmp, icmpv6, or a number from 0 to 255".to_owned())
}

impl Flows {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let filter = FlowFilter {
            address: self.address,
            port: self.port,
            state: self.state.clone(),
            protocol: self.protocol.clone(),
        };
        if self.delete && !self.dry_run {
            let maps = Maps::open(&global.pins())?;
            if !self.yes && filter == FlowFilter::default() {
                confirmed("Forget all flows? Established connections are judged by the active rules again.")?;
            }
            let deleted = maps.delete_flows(&filter)?;
            return if global.json {
                print_json(&serde_json::json!({ "ok": true, "deleted": deleted }))
            } else {
                print(&format!("Forgot {deleted} flows.\n"))
            };
        }
        self.watch.repeat(|| list(global, &filter, self.names))
    }
}

/// Prints the flows that match.
fn list(global: &Global, filter: &FlowFilter, names: NoNames) -> Result<(), Error> {
    let maps = Maps::open(&global.pins())?;
    let mut flows = Vec::new();
    maps.for_each_flow(filter, |flow| flows.push(flow))?;
    flows.sort_by_key(|flow| {
        (flow.source, flow.source_port, flow.destination, flow.destination_port, flow.protocol.clone())
    });
    let names = names.names(global);
    if global.json {
        let named = flows.iter().map(|flow| names.annotate(flow)).collect::<Result<Vec<_>, _>>();
        let named = named.map_err(|error| Error::Format(error.to_string()))?;
        return print_json(&serde_json::json!({ "total": named.len(), "flows": named }));
    }
    let mut columns =
        vec!["proto", "source", "destination", "direction", "state", "idle", "age", "fast path", "rule"];
    if global.wide() {
        columns.extend(["generation", "audit", "seeded"]);
    }
    let mut table = table::table(&columns);
    for flow in &flows {
        let mut row = vec![
            flow.protocol.clone(),
            names.show(SocketAddr::new(flow.source, flow.source_port)),
            names.show(SocketAddr::new(flow.destination, flow.destination_port)),
            flow.direction.clone(),
            flow.state.clone(),
            format!("{}s", flow.idle_seconds),
            format!("{}s", flow.age_seconds),
            flow.fast_path.clone(),
            origin(flow),
        ];
        if global.wide() {
            row.extend([flow.generation.to_string(), flow.audit.to_string(), flow.seeded.to_string()]);
        }
        table.add_row(row);
    }
    print(&table::render(&table))
}

/// Why the flow is there.
fn origin(flow: &FlowView) -> String {
    match &flow.rule {
        _ if flow.seeded => "(from conntrack)".to_owned(),
        Some(rule) if flow.audit => format!("{rule} (audit)"),
        None if flow.audit => "(audit)".to_owned(),
        Some(rule) => rule.clone(),
        None => format!("(policy {})", flow.generation),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_protocol_is_a_name_or_a_number() {
        for (text, shown) in [("tcp", "tcp"), ("TCP", "tcp"), ("6", "tcp"), ("58", "icmpv6"), ("47", "47")] {
            assert_eq!(protocol(text).as_deref(), Ok(shown));
        }
        for wrong in ["tcpp", "", "256", "-1", "icmp6"] {
            assert!(protocol(wrong).unwrap_err().contains("write tcp, udp"), "{wrong}");
        }
    }
}
