//! `bridge-agent down`: remove every trace.

use clap::Args;

use super::{Error, Global, print, print_json};
use crate::datapath;

/// Stop enforcing: remove every program, map and policy of bridge.
#[derive(Debug, Args)]
pub struct Down {}

impl Down {
    #[expect(clippy::unused_self, reason = "as every command")]
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let (removed, result) = datapath::down(&global.pins());
        result?;
        if global.json {
            return print_json(&serde_json::json!({ "ok": true, "removed": removed }));
        }
        match removed.attachments + removed.maps {
            0 => print("There was nothing to remove.\n"),
            _ => {
                print(&format!("Detached {} programs, removed {} maps.\n", removed.attachments, removed.maps))
            }
        }
    }
}
