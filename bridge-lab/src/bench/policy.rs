//! Time from writing a policy to enforcing it.

use std::time::Instant;

use anyhow::Result;
use bridge_agent::policy;

use super::{Measurement, rules};
use crate::prog::{Node, behaviour};

const RUNS: u32 = 5;

pub(super) fn measure() -> Result<Vec<Measurement>> {
    let mut measurements = Vec::new();
    for count in [1, 1000, 10_000, 100_000] {
        let mut node = Node::new(&rules::policy(0, 1), &behaviour())?;
        let (mut compile, mut switch, mut both) = (Vec::new(), Vec::new(), Vec::new());
        for run in 0..RUNS {
            // Another policy each time, or it would not be written at all.
            let policy = rules::policy(run + 1, count);
            let start = Instant::now();
            let tables = policy::compile(&policy, &[])?;
            compile.push(start.elapsed().as_secs_f64() * 1e3);
            let before = Instant::now();
            node.datapath().publish(&tables, &behaviour(), None)?;
            switch.push(before.elapsed().as_secs_f64() * 1e3);
            both.push(start.elapsed().as_secs_f64() * 1e3);
        }
        measurements.push(Measurement::of(format!("compile, {count} rules"), "ms", compile));
        measurements.push(Measurement::of(format!("write and switch, {count} rules"), "ms", switch));
        let both = Measurement::of(format!("compile, write and switch, {count} rules"), "ms", both);
        measurements.push(if count == 100_000 { both.limit(1000.0) } else { both });
    }
    Ok(measurements)
}
