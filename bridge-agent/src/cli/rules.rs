//! `bridge-agent rules`: the rules in force with their hits, or as another program reads them.

use std::collections::BTreeMap;

use clap::{Args, Subcommand, ValueEnum};

use super::{Error, Global, print, print_json, table};
use crate::config;
use crate::datapath::{self, Maps};
use crate::firewall::iptables::{Iptables, render, ruleset::Family};
use crate::firewall::{Firewall as _, Hits};
use crate::runtime;

/// List the rules in force with their hits.
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

/// A rule, with what each engine counted.
#[derive(Debug, serde::Serialize)]
struct Row {
    #[serde(flatten)]
    rule: datapath::RuleCount,
    /// Packets that the rule matched in iptables; absent without that engine.
    #[serde(skip_serializing_if = "Option::is_none")]
    iptables: Option<Hits>,
}

impl Rules {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        if let Some(Action::Render { format: Format::Iptables, ipv6 }) = self.action {
            return render_iptables(global, ipv6);
        }
        let iptables = iptables_hits();
        let mut rules = Maps::open(&global.pins())?.rule_counts()?;
        rules.retain(|rule| !self.hit || rule.packets > 0);
        let hits = |name: &str| iptables.as_ref().map(|all| all.get(name).copied().unwrap_or_default());
        let rows = rules.into_iter().map(|rule| Row { iptables: hits(&rule.name), rule });
        if global.json {
            return print_json(&rows.collect::<Vec<_>>());
        }
        let mut header = vec!["rule", "direction", "action", "new flows", "bytes"];
        header.extend(iptables.as_ref().map(|_| "iptables packets"));
        let mut table = table::table(&header);
        for Row { rule, iptables } in rows {
            let mut cells = vec![
                rule.name,
                rule.direction,
                rule.action,
                rule.packets.to_string(),
                rule.bytes.to_string(),
            ];
            cells.extend(iptables.map(|hits| hits.packets.to_string()));
            table.add_row(cells);
        }
        print(&table::render(&table))
    }
}

fn render_iptables(global: &Global, ipv6: bool) -> Result<(), Error> {
    let loaded = config::load(&global.config)?;
    let family = if ipv6 { Family::V6 } else { Family::V4 };
    let options = runtime::firewall_settings(&loaded.config).options;
    print(&render::restore_input(&loaded.policy(), &options, family))
}

/// What iptables counted by rule; nothing if it has no rules of bridge.
fn iptables_hits() -> Option<BTreeMap<String, Hits>> {
    let firewall = Iptables::new(crate::firewall::iptables::Config::default()).ok()?;
    firewall.hits().ok().filter(|hits| !hits.is_empty())
}
