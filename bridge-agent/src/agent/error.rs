//! Errors of the agent.

use std::io;

use super::{desired, packet_filter};
use crate::{config::ConfigErrors, kernel::state_directory::UnusableState, kubernetes, pool, routes};

/// Why the agent ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration is not valid.
    #[error(transparent)]
    Config(#[from] ConfigErrors),
    /// The packet path is not as it should be.
    #[error(transparent)]
    Enforcer(#[from] desired::Error),
    /// The rules of the packet filter are not as they should be.
    #[error(transparent)]
    Firewall(#[from] packet_filter::Error),
    /// The routes cannot be looked after.
    #[error(transparent)]
    Routes(#[from] routes::Error),
    /// The port pool is not as it should be.
    #[error(transparent)]
    Pool(#[from] pool::run::StartError),
    /// The state directory.
    #[error(transparent)]
    State(#[from] UnusableState),
    /// The cluster cannot be followed.
    #[error(transparent)]
    Kubernetes(#[from] kubernetes::Error),
    /// Something that the loop itself needs.
    #[error("{action}: {source}")]
    Io {
        /// The action that failed.
        action: &'static str,
        /// Error of the kernel.
        source: io::Error,
    },
}
