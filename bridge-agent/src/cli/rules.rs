//! `bridge-agent rules`: the active rules with their hits, or in the format of another program.

use std::collections::BTreeMap;

use clap::{Args, Subcommand, ValueEnum};

use super::{Error, Global, print, print_json, table};
use crate::agent;
use crate::config;
use crate::datapath::{self, Maps, RuleCount};
use crate::firewall::{Firewall as _, Hits};
use crate::iptables::{Iptables, render, ruleset::Family};
use crate::model::{Policy, Rule};

/// List the active rules with their hits.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Rules {
    /// Only rules that have decided about a flow
    #[arg(long)]
    hit: bool,
    #[command(subcommand)]
    action: Option<Action>,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Print the rules of the configuration file as another program reads them; needs no privilege
    Render {
        /// For which program
        #[arg(long, value_enum)]
        format: Format,
        /// For IPv6 instead of IPv4
        #[arg(long)]
        ipv6: bool,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Format {
    /// Input of `iptables-restore --noflush`, or with --ipv6 of `ip6tables-restore --noflush`
    Iptables,
}

/// A rule, with the counters of each engine.
#[derive(Debug, serde::Serialize)]
struct Row {
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<u32>,
    name: String,
    direction: String,
    action: String,
    /// Flows that the rule decided about in eBPF; absent without that engine.
    #[serde(skip_serializing_if = "Option::is_none")]
    packets: Option<u64>,
    /// Length of their first packets.
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<u64>,
    /// Packets that the rule matched in iptables; absent without that engine.
    #[serde(skip_serializing_if = "Option::is_none")]
    iptables: Option<Hits>,
}

impl Rules {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        if let Some(Action::Render { format: Format::Iptables, ipv6 }) = self.action {
            return render_iptables(global, ipv6);
        }
        let iptables = iptables_hits(global);
        let mut rows = match (Maps::open(&global.pins()), iptables) {
            (Ok(maps), iptables) => of_ebpf(maps.rule_counts()?, iptables.as_ref()),
            (Err(datapath::Error::NotRunning(_)), Some(hits)) => {
                of_iptables(&config::load(&global.config)?.policy(), &hits)
            }
            (Err(error), _) => return Err(error.into()),
        };
        let was_hit = |row: &Row| {
            row.packets.or(row.iptables.map(|hits| hits.packets)).is_some_and(|packets| packets > 0)
        };
        rows.retain(|row| !self.hit || was_hit(row));
        if global.json {
            return print_json(&rows);
        }
        let (ebpf, iptables) =
            (rows.iter().any(|row| row.packets.is_some()), rows.iter().any(|row| row.iptables.is_some()));
        let mut header = vec!["rule", "direction", "action"];
        header.extend(["new flows", "bytes"].into_iter().filter(|_| ebpf));
        header.extend(iptables.then_some("iptables packets"));
        let mut table = table::table(&header);
        for row in rows {
            let mut cells = vec![row.name, row.direction, row.action];
            cells.extend([row.packets, row.bytes].into_iter().flatten().map(|count| count.to_string()));
            cells.extend(row.iptables.map(|hits| hits.packets.to_string()));
            table.add_row(cells);
        }
        print(&table::render(&table))
    }
}

/// The rules as eBPF has them.
fn of_ebpf(rules: Vec<RuleCount>, iptables: Option<&BTreeMap<String, Hits>>) -> Vec<Row> {
    let hits = |name: &str| iptables.map(|all| all.get(name).copied().unwrap_or_default());
    let row = |rule: RuleCount| Row {
        index: Some(rule.index),
        iptables: hits(&rule.name),
        name: rule.name,
        direction: rule.direction,
        action: rule.action,
        packets: Some(rule.packets),
        bytes: Some(rule.bytes),
    };
    rules.into_iter().map(row).collect()
}

/// The rules of the configuration that stand in iptables.
fn of_iptables(policy: &Policy, hits: &BTreeMap<String, Hits>) -> Vec<Row> {
    let in_force = policy.rules.iter().filter_map(|rule| Some((rule, *hits.get(&rule.name)?)));
    let row = |(rule, hits): (&Rule, Hits)| Row {
        index: None,
        name: rule.name.clone(),
        direction: format!("{:?}", rule.direction).to_lowercase(),
        action: format!("{:?}", rule.action).to_lowercase(),
        packets: None,
        bytes: None,
        iptables: Some(hits),
    };
    in_force.map(row).collect()
}

fn render_iptables(global: &Global, ipv6: bool) -> Result<(), Error> {
    let loaded = config::load(&global.config)?;
    let family = if ipv6 { Family::V6 } else { Family::V4 };
    let options = agent::firewall_settings(&loaded.config).options;
    print(&render::restore_input(&loaded.policy(), &options, family))
}

/// Returns the hits that iptables counted by rule; `None` if it has no rules of bridge. The configuration only names
/// the back end.
fn iptables_hits(global: &Global) -> Option<BTreeMap<String, Hits>> {
    let settings = config::load(&global.config).map(|loaded| agent::firewall_settings(&loaded.config));
    let firewall = Iptables::new(settings.unwrap_or_default()).ok()?;
    firewall.hits().ok().filter(|hits| !hits.is_empty())
}
