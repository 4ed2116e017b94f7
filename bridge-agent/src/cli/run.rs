//! `bridge-agent run`: the agent itself, and the API beside it.

use std::{io, thread, time::Duration};

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use super::{Error, Global, block_on};
use crate::{
    agent::{Agent, Options},
    api,
    datapath::Pins,
    kernel::{capabilities, memory},
};

/// Run the agent until SIGTERM; enforcement stays active afterwards.
#[derive(Debug, Args)]
#[command(
    after_help = "At boot, saved rules are active before the agent is: those of iptables are loaded by the
unit of iptables-services or netfilter-persistent, those of nftables by
bridge-nftables.service."
)]
pub struct Run {}

impl Run {
    #[expect(clippy::unused_self, reason = "as every command")]
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let options = Options {
            config: global.config.clone(),
            socket: global.socket.clone(),
            pin_root: global.pin_root.clone(),
            state: global.state_directory(),
        };
        memory::limit_arenas();
        memory::raise_descriptor_limit();
        let pins = Pins::new(&options.pin_root);
        let takes_over = pins.exist_of_any_version() && !pins.exist();
        let failed =
            |source| Error::Process { action: "cannot drop capabilities that are not needed", source };
        // Before a second thread exists: capabilities belong to threads.
        capabilities::give_up(takes_over).map_err(failed)?;
        end_in_time().map_err(|source| Error::Process { action: "cannot listen for signals", source })?;
        block_on(serve(&options))
    }
}

/// Time from SIGTERM or SIGINT to the end of the process, whatever the agent is doing.
const TIME_TO_END: Duration = Duration::from_millis(1500);

/// Time for the last line of the log.
const TIME_TO_LOG: Duration = Duration::from_millis(100);

/// Ends the process when it does not end by itself in time after a signal. The kernel then keeps the last policy that was
/// complete, as after SIGKILL: each engine is switched in one step.
fn end_in_time() -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut terminate, mut interrupt) = {
        let _inside = runtime.enter();
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?)
    };
    let wait = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tokio::time::sleep(TIME_TO_END).await;
        // The reader of the log may have stopped.
        let warn = || {
            tracing::warn!("the agent ends in the middle of its work; the policy of before stays enforced")
        };
        if thread::Builder::new().spawn(warn).is_ok() {
            tokio::time::sleep(TIME_TO_LOG).await;
        }
        // SAFETY: it runs nothing of this process any more: neither destructors nor a flush, which could wait for the log.
        unsafe { libc::_exit(0) };
    };
    thread::Builder::new().name("signals".to_owned()).spawn(move || runtime.block_on(wait)).map(drop)
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
