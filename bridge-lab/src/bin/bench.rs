//! `cargo xtask bench`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use bridge_lab::bench::{
    GROUPS, Limit, Measurement,
    forward::{Comparison, Part, Work},
    kube, pool,
};
use clap::Parser;
use comfy_table::{Table, presets};

/// Measure the costs of bridge, and compare it with the usual alternatives; exit code 1 if a limit is missed
#[derive(Parser)]
#[command(bin_name = "cargo xtask bench")]
struct Arguments {
    /// Only these groups of measurements; without: all
    groups: Vec<String>,
    /// Shorter looks and fewer rules in the comparison
    #[arg(long)]
    quick: bool,
    /// Show the comparison in README.md and docs/benchmark.md, too; from the folder of the repository
    #[arg(long, conflicts_with = "part")]
    publish: bool,
    #[command(flatten)]
    part: Part,
    /// Only the costs of a large cluster: 5,000 nodes and 50,000 pods in a real API server
    #[arg(long)]
    kube: bool,
    /// Print one JSON object a line instead of tables
    #[arg(long)]
    json: bool,
    /// Where bench.json, and of the comparison table.md and plot.svg, are written to
    #[arg(long, default_value = "target/bench")]
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
    let known: Vec<_> =
        Work::ALL.map(Work::name).into_iter().chain(GROUPS.iter().map(|(name, _)| *name)).collect();
    if let Some(unknown) = arguments.groups.iter().find(|name| !known.contains(&name.as_str())) {
        bail!("there is no group {unknown}: write one of {}", known.join(", "));
    }
    let wanted = |name| arguments.groups.is_empty() || arguments.groups.iter().any(|wanted| wanted == name);
    let output = &arguments.output;
    fs::create_dir_all(output).with_context(|| format!("make {}", output.display()))?;

    let mut comparisons = Vec::new();
    // New flows are a part of forwarding, and measured by themselves only on request.
    let is_wanted = |work: Work| wanted(work.name()) && !(work == Work::New && arguments.groups.is_empty());
    for work in Work::ALL.into_iter().filter(|work| !arguments.kube && is_wanted(*work)) {
        comparisons.push(Comparison::run(work, arguments.quick, &arguments.part)?);
    }
    let mut measurements = Vec::new();
    let cluster = [kube::GROUP];
    for (name, measure) in if arguments.kube { &cluster[..] } else { GROUPS } {
        if arguments.kube || wanted(name) {
            eprintln!("measuring: {name}");
            measurements.extend(measure()?);
        }
    }

    let mut records = Vec::new();
    let mut limits = Vec::new();
    for comparison in &comparisons {
        comparison.write(output)?;
        if arguments.publish {
            comparison.publish(Path::new("."))?;
        }
        for record in comparison.records() {
            records.push(serde_json::to_value(record)?);
        }
        records.extend(comparison.besides());
        limits.extend(comparison.limits());
    }
    for measurement in &measurements {
        records.push(serde_json::to_value(measurement)?);
    }
    limits.extend(measurements.iter().filter_map(Measurement::promise));
    let file = output.join("bench.json");
    fs::write(&file, serde_json::to_string_pretty(&records)?)
        .with_context(|| format!("write {}", file.display()))?;

    if arguments.json {
        for record in &records {
            println!("{record}");
        }
    } else {
        for comparison in &comparisons {
            println!("{}", comparison.markdown());
        }
        if !measurements.is_empty() {
            println!("{}\n", table(&measurements));
        }
        for limit in &limits {
            println!("{}", limit.line());
        }
    }
    let missed = limits.iter().any(|limit| Limit::holds(limit) == Some(false));
    Ok(if missed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn table(measurements: &[Measurement]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(["measurement", "median", "least", "most", "unit"]);
    for m in measurements {
        let number = |value: f64| if value < 10.0 { format!("{value:.2}") } else { format!("{value:.0}") };
        let figures = [m.value, m.least, m.most].map(number);
        table.add_row([&m.name, &figures[0], &figures[1], &figures[2], m.unit]);
    }
    table
}
