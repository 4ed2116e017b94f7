//! The API server without a run loop.

use std::{path::PathBuf, thread};

use bridge_agent::{api::Server, config, state::Shared};
use tempfile::TempDir;
use tokio::{runtime, sync::oneshot};

/// A server in a thread of its own, until it is dropped.
pub(crate) struct Served {
    /// Its socket.
    pub(crate) socket: PathBuf,
    _directory: TempDir,
    _stop: oneshot::Sender<()>,
}

/// Serves `shared`, and runs `beside` in the same runtime.
pub(crate) fn serve(
    api: &config::Api,
    shared: Shared,
    beside: impl Future<Output: Send + 'static> + Send + 'static,
) -> Served {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("agent.sock");
    let (stop, stopped) = oneshot::channel::<()>();
    let runtime = runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let server = {
        let _inside = runtime.enter();
        Server::bind(&socket, api).unwrap()
    };
    runtime.spawn(beside);
    runtime.spawn(server.serve(shared));
    thread::spawn(move || runtime.block_on(stopped));
    Served { socket, _directory: directory, _stop: stop }
}
