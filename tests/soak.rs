//! The soak, in short; `cargo xtask soak` is the long run.

use std::time::Duration;

use anyhow::{Result, ensure};
use bridge_lab::soak;

#[test]
fn a_minute_of_everything_at_once_fails_in_nothing_and_leaves_nothing() -> Result<()> {
    let outcome = soak::run(Duration::from_secs(60))?;
    ensure!(outcome.is_clean(), "{outcome:#?}");
    Ok(())
}
