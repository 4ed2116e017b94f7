//! Asks a running agent.

use serde::de::DeserializeOwned;

use super::{error::Error, global::Global};
use crate::{
    api::client::{self, Client},
    state::Status,
};

/// Refuses to go on if an agent runs that would put back the routes that are about to be removed.
pub(super) fn nobody_keeps_routes(global: &Global) -> Result<(), Error> {
    block_on(async {
        match Client::connect(&global.agent_socket()).await {
            Ok(mut agent) => match agent.get::<Status>("/v1/status").await? {
                Status { routes: Some(_), pid, .. } => Err(Error::AgentKeepsRoutes(pid)),
                _ => Ok(()),
            },
            Err(client::Error::NotRunning { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    })
}

/// Asks a running agent once.
pub(super) fn get<T: DeserializeOwned>(global: &Global, path: &str) -> Result<T, Error> {
    block_on(async { Ok(Client::connect(&global.agent_socket()).await?.get(path).await?) })
}

/// Waits for the answer of an agent.
pub(super) fn block_on<T>(work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let failed = |source| Error::Process { action: "cannot start the runtime", source };
    runtime.map_err(failed)?.block_on(work)
}
