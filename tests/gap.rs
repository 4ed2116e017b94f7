//! The gap meter, in short; `cargo xtask gap` is the long run.

use anyhow::{Result, ensure};
use bridge_lab::gap::runs::{self, Effort, Engines};

fn nothing_is_lost_and_nothing_comes_through(engines: Engines) -> Result<()> {
    let effort = Effort { rate: 1000, kills: 3, times: 1, rules: 10_000 };
    let rows = runs::all(engines, effort, |row| eprintln!("{row:?}"))?;
    for row in &rows {
        ensure!(row.is_clean(), "{row:?}");
        ensure!(row.reading.sent > 100 && row.reading.probes > 100, "hardly anything was sent: {row:?}");
    }
    Ok(())
}

#[test]
fn nothing_is_lost_or_leaked_with_ebpf() -> Result<()> {
    nothing_is_lost_and_nothing_comes_through(Engines::Ebpf)
}

#[test]
fn nothing_is_lost_or_leaked_with_ebpf_and_iptables() -> Result<()> {
    nothing_is_lost_and_nothing_comes_through(Engines::EbpfIptables)
}

#[test]
fn nothing_is_lost_or_leaked_with_ebpf_and_nftables() -> Result<()> {
    nothing_is_lost_and_nothing_comes_through(Engines::EbpfNftables)
}

#[test]
fn nothing_is_lost_or_leaked_with_nftables_alone() -> Result<()> {
    nothing_is_lost_and_nothing_comes_through(Engines::Nftables)
}
