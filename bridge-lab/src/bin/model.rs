//! `cargo xtask model`.

use std::process::ExitCode;

use anyhow::Result;
use bridge_lab::model::compare;
use clap::Parser;

/// Send random packets through the eBPF programs and through a plain model of the documents; exit code 1 if they
/// differ
#[derive(Parser)]
#[command(bin_name = "cargo xtask model")]
struct Arguments {
    /// How many packets, in whole cases: a pair of policies is drawn for each 20,000 of them
    #[arg(long, default_value_t = 10_000_000)]
    packets: u64,
    /// Seed of the first case; the others have the numbers after it
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

fn main() -> Result<ExitCode> {
    let Arguments { packets, seed } = Arguments::parse();
    let report = compare(seed, packets, |sent| {
        if sent % 1_000_000 < 21_000 {
            eprintln!("{sent} packets");
        }
    })?;
    for difference in &report.differences {
        println!("{difference}\n");
    }
    println!("seed {seed}\n{report}");
    Ok(if report.differences.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
