//! Every known way past the default deny, with each engine and both. `cargo xtask mediation` prints the table. Needs root.

use anyhow::{Result, ensure};
use bridge_lab::mediation::{ATTEMPTS, Row, Setting};

fn play(engines: &'static str) -> Result<()> {
    let mut wrong = Vec::new();
    for attempt in ATTEMPTS {
        let mut rows = Vec::new();
        for &rp_filter in attempt.rp_filters {
            rows.push(attempt.play(Setting { engines, rp_filter })?);
        }
        if !rows.iter().all(Row::holds) {
            wrong.push(format!("{}: {rows:#?}", attempt.name));
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

#[test]
fn no_attempt_passes_ebpf() -> Result<()> {
    play("ebpf")
}

#[test]
fn no_attempt_passes_iptables() -> Result<()> {
    play("iptables")
}

#[test]
fn no_attempt_passes_both_engines() -> Result<()> {
    play("ebpf, iptables")
}
