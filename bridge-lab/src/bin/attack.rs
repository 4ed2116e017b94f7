//! `cargo xtask attack`.

use std::process::ExitCode;

use anyhow::Result;
use bridge_lab::attack::{self, Attack, Row};
use clap::Parser;
use comfy_table::{Table, presets};

/// Attack a node from the LAN and count the legitimate connections that suffer, with eBPF and, beside it, with iptables
/// and the kernel's connection tracking; exit code 1 if eBPF does not hold
#[derive(Parser)]
#[command(bin_name = "cargo xtask attack")]
struct Arguments {
    /// Packets of each attack
    #[arg(long, default_value_t = 5_000_000)]
    packets: u32,
    /// Only attacks whose name contains this
    #[arg(long, default_value = "")]
    only: String,
    /// Maximum rate, in packets per second
    #[arg(long, default_value_t = 200_000)]
    rate: u32,
}

fn main() -> Result<ExitCode> {
    let Arguments { packets, only, rate } = Arguments::parse();
    let attacks: Vec<_> = Attack::ALL.into_iter().filter(|attack| attack.name().contains(&only)).collect();
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    table.set_header([
        "attack",
        "engine",
        "packets",
        "per second",
        "established alive",
        "new succeeded",
        "agent KiB before, after",
        "agent CPU",
        "half-open entries",
    ]);
    let mut holds = true;
    for engines in ["ebpf", "iptables"] {
        let show =
            |row: &Row| eprintln!("{} ({}): {} of {} new", row.attack, row.engines, row.succeeded, row.tried);
        for row in attack::run(engines, &attacks, packets, rate, show)? {
            holds &= engines != "ebpf" || row.holds();
            table.add_row([
                row.attack.to_owned(),
                row.engines.to_owned(),
                row.packets.to_string(),
                format!("{:.0}", row.rate),
                format!("{} of {}", row.alive, row.established),
                format!("{} of {}", row.succeeded, row.tried),
                format!("{:.0}, {:.0}", row.memory_kib[0], row.memory_kib[1]),
                format!("{:.1} %", row.processor * 100.0),
                row.half_open.map_or_else(|| "-".into(), |(entries, room)| format!("{entries} of {room}")),
            ]);
        }
    }
    println!("{table}");
    Ok(if holds { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
