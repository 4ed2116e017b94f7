//! `cargo xtask bench`.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use bridge_tests::bench::{GROUPS, pool};
use clap::Parser;
use comfy_table::{Table, presets};

/// Measure what bridge costs; exit code 1 if something exceeds its limit
#[derive(Parser)]
#[command(bin_name = "cargo xtask bench")]
struct Arguments {
    /// Only these groups of measurements; without: all
    groups: Vec<String>,
    /// Print one JSON object a line instead of a table
    #[arg(long)]
    json: bool,
    /// Where the figures are written to
    #[arg(long, default_value = "target/bench/bench.json")]
    output: PathBuf,
}

fn main() -> Result<ExitCode> {
    let arguments: Vec<_> = std::env::args().collect();
    if let [_, client, job] = &arguments[..]
        && client == pool::CLIENT
    {
        return pool::client(job).map(|()| ExitCode::SUCCESS);
    }
    let arguments = Arguments::parse();
    let known: Vec<_> = GROUPS.iter().map(|(name, _)| *name).collect();
    if let Some(unknown) = arguments.groups.iter().find(|name| !known.contains(&name.as_str())) {
        bail!("there is no group {unknown}: write one of {}", known.join(", "));
    }
    let mut measurements = Vec::new();
    for (name, measure) in GROUPS {
        if arguments.groups.is_empty() || arguments.groups.iter().any(|wanted| wanted == name) {
            eprintln!("measuring: {name}");
            measurements.extend(measure()?);
        }
    }
    if let Some(directory) = arguments.output.parent() {
        fs::create_dir_all(directory)?;
    }
    fs::write(&arguments.output, serde_json::to_string_pretty(&measurements)?)?;
    let mut table = Table::new();
    table.load_preset(presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(["measurement", "median", "least", "most", "unit", "limit", ""]);
    for m in &measurements {
        if arguments.json {
            println!("{}", serde_json::to_string(m)?);
        }
        let number = |value: f64| if value < 10.0 { format!("{value:.2}") } else { format!("{value:.0}") };
        let verdict = m.holds().map_or("", |holds| if holds { "holds" } else { "EXCEEDED" });
        let limit = m.limit.map_or_else(String::new, number);
        let figures = [number(m.value), number(m.least), number(m.most)];
        table.add_row([&m.name, &figures[0], &figures[1], &figures[2], m.unit, &limit, verdict]);
    }
    if !arguments.json {
        println!("{table}");
    }
    let holds = measurements.iter().all(|m| m.holds() != Some(false));
    Ok(if holds { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
