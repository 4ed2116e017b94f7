//! `bridge-agent rules`: the active rules with their hits, or in the format of another program.

use std::collections::BTreeMap;

use clap::{Args, Subcommand, ValueEnum};

use super::{
    Error, Global, get,
    output::{Watch, print, print_json},
    table,
};
use crate::agent::{self, PacketFilterKind};
use crate::config;
use crate::datapath::{self, Maps, RuleCount};
use crate::firewall::{Firewall as _, Hits};
use crate::iptables::{Iptables, render, ruleset::Family};
use crate::model::{Mode, Policy, Rule};
use crate::nftables::{self, Nftables};

/// List the active rules with their hits.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Rules {
    /// Only rules that have decided about a flow
    #[arg(long)]
    hit: bool,
    #[command(flatten)]
    watch: Watch,
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
    /// Input of `nft -f`, for both families
    Nftables,
}

/// A rule, with the counters of each engine.
#[derive(Debug, serde::Serialize)]
struct Row {
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<u32>,
    name: String,
    direction: String,
    action: String,
    /// `audit`: the rule decides nothing, and is counted as if it did.
    mode: Mode,
    /// Flows that the rule decided about in eBPF; absent without that engine.
    #[serde(skip_serializing_if = "Option::is_none")]
    hits: Option<u64>,
    /// Length of their first packets.
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<u64>,
    /// Packets that the rule matched in iptables; absent without that engine.
    #[serde(skip_serializing_if = "Option::is_none")]
    iptables: Option<Hits>,
    /// Packets that the rule matched in nftables; absent without that engine.
    #[serde(skip_serializing_if = "Option::is_none")]
    nftables: Option<Hits>,
}

/// The hits that the packet filter counted by rule.
struct FilterHits {
    kind: PacketFilterKind,
    hits: BTreeMap<String, Hits>,
}

impl FilterHits {
    /// Returns the columns of iptables and of nftables.
    fn columns(&self, hits: Hits) -> [Option<Hits>; 2] {
        match self.kind {
            PacketFilterKind::Iptables => [Some(hits), None],
            PacketFilterKind::Nftables => [None, Some(hits)],
        }
    }
}

impl Rules {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        match self.action {
            Some(Action::Render { format: Format::Iptables, ipv6 }) => return render_iptables(global, ipv6),
            Some(Action::Render { format: Format::Nftables, .. }) => return render_nftables(global),
            None => {}
        }
        self.watch.repeat(|| self.show(global))
    }

    fn show(&self, global: &Global) -> Result<(), Error> {
        let filter = filter_hits(global);
        let mut rows = match (Maps::open(&global.pins()), filter) {
            (Ok(maps), filter) => of_ebpf(maps.rule_counts()?, filter.as_ref()),
            (Err(datapath::Error::NotRunning(_) | datapath::Error::Incomplete { .. }), Some(filter)) => {
                match get(global, "/v1/rules") {
                    Ok(rules) => of_running_filter(rules, &filter),
                    // The file does not have the rules of a cluster.
                    Err(_) => of_filter(&config::load(&global.config)?.policy(), &filter),
                }
            }
            (Err(error), _) => return Err(error.into()),
        };
        let was_hit = |row: &Row| {
            row.hits
                .or(row.iptables.or(row.nftables).map(|hits| hits.packets))
                .is_some_and(|packets| packets > 0)
        };
        rows.retain(|row| !self.hit || was_hit(row));
        if global.json {
            return print_json(&rows);
        }
        let any = |has: fn(&Row) -> bool| rows.iter().any(has);
        let (ebpf, iptables, nftables) = (
            any(|row| row.hits.is_some()),
            any(|row| row.iptables.is_some()),
            any(|row| row.nftables.is_some()),
        );
        let mut header = Vec::from_iter(global.wide().then_some("index"));
        header.extend(["rule", "direction", "action"]);
        header.extend(["hits", "bytes"].into_iter().filter(|_| ebpf));
        header.extend(iptables.then_some("iptables hits"));
        header.extend(nftables.then_some("nftables hits"));
        let mut table = table::table(&header);
        for row in rows {
            let index = row.index.map(|index| index.to_string()).unwrap_or_default();
            let mut cells = Vec::from_iter(global.wide().then_some(index));
            let action = match row.mode {
                Mode::Enforce => row.action,
                Mode::Audit => format!("would {}", row.action),
            };
            cells.extend([row.name, row.direction, action]);
            cells.extend([row.hits, row.bytes].into_iter().flatten().map(|count| count.to_string()));
            cells.extend(row.iptables.or(row.nftables).map(|hits| hits.packets.to_string()));
            table.add_row(cells);
        }
        print(&table::render(&table))
    }
}

/// The rules as eBPF has them.
fn of_ebpf(rules: Vec<RuleCount>, filter: Option<&FilterHits>) -> Vec<Row> {
    let row = |rule: RuleCount| {
        let hits =
            |filter: &FilterHits| filter.columns(filter.hits.get(&rule.name).copied().unwrap_or_default());
        let [iptables, nftables] = filter.map_or([None, None], hits);
        Row {
            index: Some(rule.index),
            name: rule.name,
            direction: rule.direction,
            action: rule.action,
            mode: rule.mode,
            hits: Some(rule.hits),
            bytes: Some(rule.bytes),
            iptables,
            nftables,
        }
    };
    rules.into_iter().map(row).collect()
}

/// The rules as a running agent has them in the packet filter.
fn of_running_filter(rules: Vec<RuleCount>, filter: &FilterHits) -> Vec<Row> {
    let mut rows = of_ebpf(rules, Some(filter));
    for row in &mut rows {
        (row.hits, row.bytes) = (None, None);
    }
    rows
}

/// The rules of the configuration that stand in the packet filter.
fn of_filter(policy: &Policy, filter: &FilterHits) -> Vec<Row> {
    let of = |rules: &[Rule], mode| -> Vec<(Rule, Mode)> {
        rules.iter().map(|rule| (rule.clone(), mode)).collect()
    };
    let rules = [of(&policy.rules, Mode::Enforce), of(&policy.audited, Mode::Audit)].concat();
    let active =
        rules.into_iter().filter_map(|(rule, mode)| Some((*filter.hits.get(&rule.name)?, rule, mode)));
    let row = |(hits, rule, mode): (Hits, Rule, Mode)| {
        let [iptables, nftables] = filter.columns(hits);
        Row {
            index: None,
            name: rule.name,
            direction: format!("{:?}", rule.direction).to_lowercase(),
            action: format!("{:?}", rule.action).to_lowercase(),
            mode,
            hits: None,
            bytes: None,
            iptables,
            nftables,
        }
    };
    active.map(row).collect()
}

fn render_iptables(global: &Global, ipv6: bool) -> Result<(), Error> {
    let loaded = config::load(&global.config)?;
    let family = if ipv6 { Family::V6 } else { Family::V4 };
    let options = agent::firewall_settings(&loaded.config).options;
    let program = if ipv6 { "ip6tables-restore" } else { "iptables-restore" };
    print_rules(global, "iptables", program, &render::restore_input(&loaded.policy(), &options, family))
}

fn render_nftables(global: &Global) -> Result<(), Error> {
    let loaded = config::load(&global.config)?;
    let options = agent::nftables_settings(&loaded.config).options;
    let text = nftables::script(&nftables::render::ruleset(&loaded.policy(), &options));
    print_rules(global, "nftables", "nft", &text)
}

/// Prints rules in the format of another program.
fn print_rules(global: &Global, format: &str, program: &str, text: &str) -> Result<(), Error> {
    if global.json {
        return print_json(
            &serde_json::json!({ "ok": true, "format": format, "program": program, "text": text }),
        );
    }
    print(text)
}

/// Returns the hits of the packet filter that has rules of bridge.
fn filter_hits(global: &Global) -> Option<FilterHits> {
    let of = |kind| move |hits| FilterHits { kind, hits };
    let nftables = || nftables_hits().map(of(PacketFilterKind::Nftables));
    nftables().or_else(|| iptables_hits(global).map(of(PacketFilterKind::Iptables)))
}

/// Returns each packet filter that has rules of bridge, and a description of these.
pub(super) fn enforcing_filters(global: &Global) -> BTreeMap<&'static str, String> {
    let nftables = Nftables::new(nftables::Config::default()).ok();
    let iptables = iptables(global);
    let nftables = nftables.and_then(|firewall| firewall.present().ok().flatten());
    let iptables = iptables.and_then(|firewall| firewall.present().ok().flatten());
    let named = |kind: PacketFilterKind| move |rules| (kind.name(), rules);
    nftables
        .map(named(PacketFilterKind::Nftables))
        .into_iter()
        .chain(iptables.map(named(PacketFilterKind::Iptables)))
        .collect()
}

/// Returns the hits that nftables counted by rule; `None` if there is no table of bridge.
fn nftables_hits() -> Option<BTreeMap<String, Hits>> {
    let firewall = Nftables::new(nftables::Config::default()).ok()?;
    firewall.hits().ok().filter(|hits| !hits.is_empty())
}

/// Returns the hits that iptables counted by rule; `None` if it has no rules of bridge. The configuration only names
/// the back end.
pub(super) fn iptables_hits(global: &Global) -> Option<BTreeMap<String, Hits>> {
    iptables(global)?.hits().ok().filter(|hits| !hits.is_empty())
}

fn iptables(global: &Global) -> Option<Iptables> {
    let settings = config::load(&global.config).map(|loaded| agent::firewall_settings(&loaded.config));
    Iptables::new(settings.unwrap_or_default()).ok()
}
