//! Attacks, in short; `cargo xtask attack` is the long run.

use anyhow::{Result, ensure};
use bridge_lab::attack::{self, Attack};

#[test]
fn connections_outlive_attacks_and_new_ones_succeed() -> Result<()> {
    let rows = attack::run("ebpf", &Attack::ALL, 100_000, 30_000, |row| eprintln!("{row:?}"))?;
    for row in &rows {
        ensure!(row.holds(), "{row:?}");
        let [before, after] = row.memory_kib;
        ensure!(after < before + 4096.0, "memory grows: {row:?}");
        ensure!(row.processor < 0.5, "the agent is kept busy: {row:?}");
    }
    // 100,000 SYNs are more than the table of half-open flows holds: it is full, and says so.
    let (entries, room) = rows[0].half_open.unwrap_or_default();
    ensure!(entries * 10 > room * 8, "no pressure is reported: {:?}", rows[0]);
    Ok(())
}
