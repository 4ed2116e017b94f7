//! What the tests of the fast path share.

use anyhow::{Context as _, Result};
use bridge_agent::datapath::{Maps, Pins};
use bridge_common::fast_path::Outcome;
use bridge_tests::agent::Agent;
use bridge_tests::traffic::tcp;
use bridge_tests::wait::eventually;

use crate::support::{DEADLINE, SECOND};

/// Packets of established flows so far, in all directions, that fared so.
pub(crate) fn packets(agent: &Agent, outcome: Outcome) -> Result<u64> {
    let counts = Maps::open(&Pins::new(agent.pins()))?.outcome_counts()?;
    Ok(counts.iter().filter(|count| count.outcome == outcome.name()).map(|count| count.packets).sum())
}

/// Every outcome so far, for those who read of a failure.
pub(crate) fn outcomes(agent: &Agent) -> String {
    let counts =
        Maps::open(&Pins::new(agent.pins())).and_then(|maps| maps.outcome_counts()).unwrap_or_default();
    let seen = counts.iter().filter(|count| count.packets > 0);
    seen.map(|count| format!("{} {}: {}\n", count.direction, count.outcome, count.packets)).collect()
}

/// Round trips until both their packets take the fast path.
pub(crate) fn speed_up(agent: &Agent, connection: &mut tcp::Connection) -> Result<()> {
    let fast = || {
        let before = packets(agent, Outcome::forwarded).ok()?;
        connection.round_trip(SECOND).ok()?;
        (packets(agent, Outcome::forwarded).ok()? >= before + 2).then_some(())
    };
    eventually(DEADLINE, fast).with_context(|| format!("the fast path was not taken:\n{}", outcomes(agent)))
}
