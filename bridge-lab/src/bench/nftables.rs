//! The nftables engine: rules written, changed, read and repaired, and the memory that they take in the kernel.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bridge_agent::firewall::Firewall as _;
use bridge_agent::model::Policy;
use bridge_agent::nftables::watch::Guard;
use bridge_agent::nftables::{Config, Nftables, save};

use super::{Measurement, rules};
use crate::netns::Ns;
use crate::wait::eventually;

const RUNS: u32 = 5;
const RULES: u32 = 10_000;
/// A repair that takes longer has failed.
const DEADLINE: Duration = Duration::from_secs(20);

fn driver() -> Result<Nftables> {
    let saving = save::Saving { enabled: false, ..Default::default() };
    Ok(Nftables::new(Config { saving, ..Config::default() })?)
}

pub(super) fn measure() -> Result<Vec<Measurement>> {
    Ns::new().enter(|| {
        let policy = rules::policy(0, RULES);
        let mut measurements = vec![written(&policy)?, memory(&policy)?];
        measurements.extend(changed(&policy)?);
        measurements.push(repaired(&policy)?);
        Ok(measurements)
    })
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

fn nft(arguments: &[&str]) -> Result<()> {
    let status = Command::new("nft").args(arguments).status().context("start nft")?;
    ensure!(status.success(), "nft {}: {status}", arguments.join(" "));
    Ok(())
}

/// Writes the table where there is none.
fn written(policy: &Policy) -> Result<Measurement> {
    let mut runs = Vec::new();
    for _ in 0..RUNS {
        nft(&["flush", "ruleset"])?;
        let mut firewall = driver()?;
        let start = Instant::now();
        firewall.converge(policy)?;
        runs.push(milliseconds(start));
    }
    Ok(Measurement::of(format!("nftables: write {RULES} rules"), "ms", runs).limit(2000.0))
}

/// Changes the ports of one rule, and reads the counters of all.
fn changed(policy: &Policy) -> Result<[Measurement; 2]> {
    let mut firewall = driver()?;
    firewall.converge(policy)?;
    let (mut next, mut changes, mut reads) = (policy.clone(), Vec::new(), Vec::new());
    for run in 0..RUNS {
        let rule = next.rules.get_mut(4711 + run as usize * 7).context("a rule")?;
        for range in &mut rule.ports {
            (range.first, range.last) = (range.first ^ 1, range.last | 1);
        }
        let start = Instant::now();
        firewall.converge(&next)?;
        changes.push(milliseconds(start));
        let start = Instant::now();
        ensure!(firewall.hits()?.len() > RULES as usize / 2, "the counters cannot be read");
        reads.push(milliseconds(start));
    }
    Ok([
        Measurement::of(format!("nftables: change one of {RULES} rules"), "ms", changes).limit(100.0),
        Measurement::of(format!("nftables: read the counters of {RULES} rules"), "ms", reads),
    ])
}

/// Repairs the table after `nft flush ruleset`.
fn repaired(policy: &Policy) -> Result<Measurement> {
    let guard = Guard::start(driver()?, policy.clone(), None)?;
    let mut runs = Vec::new();
    for run in 0..RUNS {
        let start = Instant::now();
        nft(&["flush", "ruleset"])?;
        let repaired = || (guard.status().repairs > run.into()).then_some(());
        eventually(DEADLINE, repaired).with_context(|| format!("no repair: {:?}", guard.status()))?;
        runs.push(milliseconds(start));
    }
    drop(guard.teardown());
    Ok(Measurement::of(format!("nftables: repair of {RULES} rules"), "ms", runs).limit(1000.0))
}

/// Slabs that cannot be reclaimed, with large blocks, and memory of vmalloc and of each CPU: in KiB.
fn kernel_memory() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo").context("/proc/meminfo")?;
    let field = |name: &str| -> Result<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let number = line.and_then(|line| line.split_whitespace().next()).with_context(|| name.to_owned())?;
        Ok(number.parse()?)
    };
    Ok(field("SUnreclaim")? + field("VmallocUsed")? + field("Percpu")?)
}

/// The memory of several tables, each in a namespace of its own, per table.
fn memory(policy: &Policy) -> Result<Measurement> {
    const TABLES: u32 = 8;
    let mut runs = Vec::new();
    for _ in 0..3 {
        let namespaces: Vec<Ns> = (0..TABLES).map(|_| Ns::new()).collect();
        let before = kernel_memory()?;
        for namespace in &namespaces {
            namespace.enter(|| driver()?.converge(policy).map_err(anyhow::Error::from))?;
        }
        let taken = kernel_memory()?.saturating_sub(before);
        runs.push(taken as f64 / f64::from(TABLES) / 1024.0);
    }
    Ok(Measurement::of(format!("nftables: memory of {RULES} rules"), "MiB", runs))
}
