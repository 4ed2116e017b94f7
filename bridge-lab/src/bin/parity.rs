//! `cargo xtask parity`.

use std::process::ExitCode;

use anyhow::Result;
use bridge_lab::parity::{Nodes, PACKETS_PER_POLICY};
use clap::Parser;

/// Send the same random packets through eBPF, eBPF behind the shield, iptables and nftables; exit code 1 if they differ without a reason
#[derive(Parser)]
#[command(bin_name = "cargo xtask parity")]
struct Arguments {
    /// How many packets; a policy is drawn for each 500 of them
    #[arg(long, default_value_t = 1_000_000)]
    packets: usize,
    /// Seed of the first policy and its packets; the others have the numbers after it
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

fn main() -> Result<ExitCode> {
    let Arguments { packets, seed } = Arguments::parse();
    let policies = u64::try_from(packets.div_ceil(PACKETS_PER_POLICY))?;
    let seeds: Vec<u64> = (0..policies).map(|number| seed.wrapping_add(number)).collect();
    let mut shown = 0;
    let report = Nodes::new()?.compare(&seeds, |report| {
        for difference in &report.shown[shown..] {
            println!("{difference}\n");
        }
        shown = report.shown.len();
        if report.policies % 100 == 0 {
            eprintln!(
                "{} policies, {} packets, {:.0} per second",
                report.policies,
                report.packets,
                report.rate()
            );
        }
    })?;
    println!("seed {seed}\n{report}");
    Ok(if report.unexplained == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
