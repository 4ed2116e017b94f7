//! `bridge-agent run`: the agent itself, and the API beside it.

use clap::Args;

use super::{Error, Global, block_on};
use crate::{
    agent::{Agent, Options},
    api,
    datapath::Pins,
    kernel::{capabilities, memory},
};

/// Run the agent until SIGTERM; enforcement stays active afterwards.
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
        memory::limit_arenas();
        memory::raise_descriptor_limit();
        let pins = Pins::new(&options.pin_root);
        let takes_over = pins.exist_of_any_version() && !pins.exist();
        let failed = |source| Error::Process { what: "cannot drop capabilities that are not needed", source };
        capabilities::give_up(takes_over).map_err(failed)?;
        block_on(serve(&options))
    }
}

async fn serve(options: &Options) -> Result<(), Error> {
    let mut agent = Agent::open(options)?;
    // Before the agent changes anything: a socket that is in use stops this agent without a trace.
    let server = api::Server::bind(agent.socket(), agent.api())?;
    agent.start()?;
    let served = server.start(agent.shared())?;
    agent.run().await?;
    drop(served);
    tracing::info!("the agent stopped; enforcement and routes stay");
    Ok(())
}
