//! `bridge-agent run`: the agent itself.

use clap::Args;

use super::{Error, Global};
use crate::agent::{self, Options};

/// Bring the configuration into force and keep it so, until SIGTERM; what enforces goes on after that.
#[derive(Debug, Args)]
pub struct Run {}

impl Run {
    #[expect(clippy::unused_self, reason = "as every command")]
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let options = Options {
            config: global.config.clone(),
            socket: global.socket.clone(),
            pin_root: global.pin_root.clone(),
        };
        Ok(agent::run(&options)?)
    }
}
