//! A second opinion about the verdict: the short run. The long one is `cargo xtask model`. Needs root.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use bridge_common::filter::counters::Reason;
use bridge_lab::model::{PACKETS_PER_CASE, compare};
use rand::random;

/// Cases of each of the two runs.
const CASES: u64 = 8;

#[test]
fn programs_model_and_explain_say_the_same_of_every_packet() -> Result<()> {
    let (fixed, random) = (1, random());
    for seed in [fixed, random] {
        eprintln!("seed {seed}");
        let report = compare(seed, CASES * PACKETS_PER_CASE, |_| ())?;
        eprintln!("{report}");
        for difference in &report.differences {
            eprintln!("\n{difference}");
        }
        ensure!(report.differences.is_empty(), "seed {seed}: model and programs differ");
        // Some steps are no packets: time passes, pods come and go.
        ensure!(report.packets >= CASES * PACKETS_PER_CASE * 99 / 100, "{report}");
        // `explain` cannot be asked about fragments, ICMP errors, handshakes in progress and headers that cannot be read.
        ensure!(report.explained > report.packets / 2, "{report}");
        if seed == fixed {
            // Every other case has the shield. How many packets it may drop depends on the policies that are drawn.
            ensure!(report.shielded > report.packets / 100, "{report}");
            let met: BTreeSet<_> = report.met.keys().map(|(_, reason, _)| *reason).collect();
            // No table is full here.
            let unmet: Vec<_> = Reason::ALL
                .iter()
                .map(|reason| reason.name())
                .filter(|name| *name != Reason::table_full.name() && !met.contains(name))
                .collect();
            ensure!(unmet.is_empty(), "no packet met {unmet:?}\n{report}");
            for verdict in ["allow", "drop", "reject", "audit", "not judged"] {
                let count: u64 =
                    report.met.iter().filter(|((of, ..), _)| *of == verdict).map(|(_, count)| count).sum();
                ensure!(count > report.packets / 100, "{count} packets: {verdict}\n{report}");
            }
        }
    }
    Ok(())
}
