//! Every known way past the default deny, with each engine and both. `cargo xtask mediation` prints the table. Needs root.

use anyhow::{Result, ensure};
use bridge_lab::mediation::{ATTEMPTS, Row, Setting};

/// Attempts that do not hold yet: engines, name. An entry that begins to hold fails the test, and is to be removed.
const NOT_YET: &[(&str, &str)] = &[];

fn play(engines: &'static str) -> Result<()> {
    let mut wrong = Vec::new();
    for attempt in ATTEMPTS {
        let known = NOT_YET.contains(&(engines, attempt.name));
        let mut rows = Vec::new();
        for &rp_filter in attempt.rp_filters {
            rows.push(attempt.play(Setting { engines, rp_filter })?);
        }
        match (rows.iter().all(Row::holds), known) {
            (true, false) | (false, true) => {}
            (true, true) => wrong.push(format!("{} holds now: remove it from the list", attempt.name)),
            (false, false) => wrong.push(format!("{}: {rows:#?}", attempt.name)),
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
fn no_attempt_passes_nftables() -> Result<()> {
    play("nftables")
}

#[test]
fn no_attempt_passes_ebpf_and_iptables() -> Result<()> {
    play("ebpf, iptables")
}

#[test]
fn no_attempt_passes_ebpf_and_nftables() -> Result<()> {
    play("ebpf, nftables")
}

#[test]
fn the_list_names_attempts() {
    for (engines, name) in NOT_YET {
        assert!(Setting::ENGINES.contains(engines), "{engines}");
        assert!(ATTEMPTS.iter().any(|attempt| attempt.name == *name), "{name}");
    }
}
