//! The same packets through every engine: past faults, and some more. The long run is
//! `cargo xtask parity`. Needs root.

use std::collections::HashSet;

use anyhow::{Result, ensure};
use bridge_lab::parity::{Difference, Nodes, REGRESSIONS};

/// 500 packets each.
const POLICIES: u64 = 60;
const FIRST: u64 = 2000;

#[test]
fn every_engine_lets_the_same_packets_through() -> Result<()> {
    let seeds: Vec<u64> = REGRESSIONS.iter().map(|(seed, _)| *seed).chain(FIRST..FIRST + POLICIES).collect();
    let report = Nodes::new()?.compare(&seeds, |_| ())?;
    eprintln!("{report}");
    for difference in &report.shown {
        eprintln!("\n{difference}");
    }
    ensure!(report.unexplained == 0, "{report}");
    ensure!(report.packets >= 20_000, "{report}");
    ensure!(report.misexplained == 0 && report.explained > report.packets / 4, "{report}");
    let met: HashSet<Difference> = report.intended.keys().copied().collect();
    let unmet: Vec<_> = Difference::ALL.into_iter().filter(|difference| !met.contains(difference)).collect();
    ensure!(unmet.is_empty(), "no packet has met an intended difference: {unmet:?}\n{report}");
    ensure!(report.fast > 20, "hardly any packet took the fast path: {report}");
    ensure!(report.shielded > 1000, "the shield hardly dropped any packet: {report}");
    // A node that swallowed everything would agree with itself.
    ensure!(report.passed > report.packets / 3 && report.passed < report.packets * 2 / 3, "{report}");
    Ok(())
}
