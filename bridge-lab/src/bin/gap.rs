//! `cargo xtask gap`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use bridge_lab::gap::runs::{self, Effort, Engines, Row};
use clap::Parser;
use comfy_table::{Table, presets};

/// Send numbered packets through a node while its agent is killed, upgraded, reloaded and removed; exit code 1 if one
/// was lost, or one that no rule allows came through
#[derive(Parser)]
#[command(bin_name = "cargo xtask gap")]
struct Arguments {
    /// Packets of allowed flows in a second, each way, and as many that no rule allows
    #[arg(long, default_value_t = 10_000)]
    rate: u32,
    /// How often the agent is killed and started
    #[arg(long, default_value_t = 100)]
    kills: u32,
    /// How often everything else happens
    #[arg(long, default_value_t = 5)]
    times: u32,
    /// Rules of the policy that is reloaded
    #[arg(long, default_value_t = 10_000)]
    rules: u32,
    /// Only upgrade from this bridge-agent, with no connection tracking on the node
    #[arg(long, value_name = "PROGRAM")]
    from: Option<PathBuf>,
    /// Print a JSON object for each row instead of the table
    #[arg(long)]
    json: bool,
}

fn main() -> Result<ExitCode> {
    let Arguments { rate, kills, times, rules, from, json } = Arguments::parse();
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    table.set_header([
        "event",
        "engines",
        "times",
        "packets",
        "lost",
        "lost for, ms",
        "probes",
        "leaked",
        "longest silence, ms",
        "took at most, ms",
    ]);
    let mut clean = true;
    for engines in Engines::ALL {
        let show = |row: &Row| match serde_json::to_string(row) {
            Ok(line) if json => println!("{line}"),
            _ => eprintln!(
                "{} ({}): {} lost, {} leaked",
                row.event, row.engines, row.reading.lost, row.reading.leaked
            ),
        };
        let effort = Effort { rate, kills, times, rules };
        let rows = match &from {
            Some(from) => vec![runs::upgrade(from, engines, effort)?],
            None => runs::all(engines, effort, show)?,
        };
        for row in rows {
            clean &= row.is_clean();
            let r = &row.reading;
            let number = |value: f64| format!("{value:.1}");
            table.add_row([
                row.event.clone(),
                row.engines.to_owned(),
                row.times.to_string(),
                r.sent.to_string(),
                r.lost.to_string(),
                number(r.lost_for_ms),
                r.probes.to_string(),
                r.leaked.to_string(),
                number(r.silence_ms),
                number(r.took_ms),
            ]);
        }
    }
    if !json {
        println!("{table}");
    }
    Ok(if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
