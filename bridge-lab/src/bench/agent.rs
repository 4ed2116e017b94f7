//! The agent itself: how soon it enforces, how much memory it keeps.

use std::fs;
use std::time::Instant;

use anyhow::{Context as _, Result};

use super::{Measurement, rules};
use crate::agent::Agent;
use crate::lab::Lab;

const RUNS: usize = 5;

pub(super) fn measure() -> Result<Vec<Measurement>> {
    let mut measurements = Vec::new();
    for (count, enforces_within, resident) in [(1, Some(300.0), None), (10_000, None, Some(20.0 * 1024.0))] {
        let yaml = rules::configuration(count);
        let (mut fresh, mut again, mut memory) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..RUNS {
            let lab = Lab::builder().build()?;
            let start = Instant::now();
            let mut agent = Agent::start(&lab, lab.b(), &yaml)?;
            fresh.push(start.elapsed().as_secs_f64() * 1e3);
            memory.push(resident_kib(agent.pid(), "VmRSS")?);
            let start = Instant::now();
            agent.restart()?;
            again.push(start.elapsed().as_secs_f64() * 1e3);
        }
        let fresh = Measurement::of(format!("start to enforcement, {count} rules"), "ms", fresh);
        measurements.push(enforces_within.map_or(fresh.clone(), |limit| fresh.limit(limit)));
        measurements.push(Measurement::of(format!("restart to readiness, {count} rules"), "ms", again));
        let memory = Measurement::of(format!("resident memory, {count} rules"), "KiB", memory);
        measurements.push(resident.map_or(memory.clone(), |limit| memory.limit(limit)));
    }
    Ok(measurements)
}

/// `VmRSS`, `RssAnon` or `VmHWM` of a process (proc(5)).
pub(crate) fn resident_kib(pid: u32, field: &str) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
        .with_context(|| field.to_owned())?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}
