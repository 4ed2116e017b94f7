//! What `cargo xtask run --once` shows.

use anyhow::{Result, ensure};
use bridge_tests::scenes::{Stage, all, play, table};

#[test]
fn every_scene_comes_out() -> Result<()> {
    let mut stage = Stage::set()?;
    let played: Vec<_> = all().map(|scene| play(scene, &mut stage)).collect();
    ensure!(!played.is_empty() && played.iter().all(|scene| scene.ok), "\n{}", table(&played));
    Ok(())
}
