//! The scenes of `cargo xtask run`: one after the other on one stage, each with its expected and its observed result.

mod enforcement;
mod port_pool;
mod routing;

use std::fmt::{Display, Write as _};

use anyhow::Result;
use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

use crate::agent::Agent;
use crate::lab::Lab;
use crate::traffic::Attempt;

/// Of the table, in characters: so that it also fits into a README.
const WIDTH: u16 = 120;

/// Where the scenes are played. They build on one another: each finds the state that the earlier ones left.
#[derive(Debug)]
pub struct Stage {
    /// The lab.
    pub lab: Lab,
    /// The agent on the LAN host, once it has been started: the way to the pods is its.
    pub host_agent: Option<Agent>,
    /// The agent on the node, once it has been started.
    pub agent: Option<Agent>,
    pool: Option<port_pool::Pool>,
    held: Option<enforcement::Held>,
}

impl Stage {
    /// Sets the stage for the first scene.
    pub fn set() -> Result<Self> {
        Ok(Self::on(Lab::builder().without_routes().conntrack().build()?))
    }

    /// A lab without an agent.
    pub fn on(lab: Lab) -> Self {
        Self { lab, host_agent: None, agent: None, pool: None, held: None }
    }
}

/// One thing to show.
#[derive(Clone, Copy, Debug)]
pub struct Scene {
    /// Title of the scene.
    pub name: &'static str,
    /// Expected result.
    pub expected: &'static str,
    /// Makes it happen.
    pub run: fn(&mut Stage) -> Result<Seen>,
}

/// Observed result of a scene.
#[derive(Debug)]
pub struct Seen {
    /// In words, with times.
    pub text: String,
    /// Whether the observed result is the expected one.
    pub ok: bool,
}

impl Seen {
    /// Several attempts, each with whether it came out as expected.
    fn attempts<T>(attempts: impl IntoIterator<Item = (impl Display, Attempt<T>, bool)>) -> Self {
        let mut seen = Self { text: String::new(), ok: true };
        for (label, attempt, ok) in attempts {
            let separator = if seen.text.is_empty() { "" } else { "; " };
            write!(seen.text, "{separator}{label} {attempt}").expect("writing to a string");
            seen.ok &= ok;
        }
        seen
    }
}

/// A scene that has been played; its fields are those of `--json`.
#[derive(Debug, Serialize)]
pub struct Played {
    name: &'static str,
    expected: &'static str,
    seen: String,
    /// Whether the scene came out.
    pub ok: bool,
}

/// All scenes, in their order.
pub fn all() -> impl Iterator<Item = Scene> {
    routing::SCENES.iter().chain(enforcement::SCENES).chain(port_pool::SCENES).copied()
}

/// Plays one scene. An error in it is something seen that was not expected.
pub fn play(scene: Scene, stage: &mut Stage) -> Played {
    let Seen { text, ok } =
        (scene.run)(stage).unwrap_or_else(|error| Seen { text: format!("error: {error:#}"), ok: false });
    Played { name: scene.name, expected: scene.expected, seen: text, ok }
}

/// The scenes as a table.
pub fn table(scenes: &[Played]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_HORIZONTAL_ONLY);
    table.set_width(WIDTH).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(["scene", "expected", "seen", ""]);
    for scene in scenes {
        table.add_row([scene.name, scene.expected, &scene.seen, if scene.ok { "ok" } else { "FAILED" }]);
    }
    table
}
