//! Requests of API clients to the run loop, and its answers.

use std::{
    error::Error as StdError,
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::probe::Probe;
use crate::config::ConfigErrors;

/// Shortest trial.
pub const MIN_TRIAL: Duration = Duration::from_secs(1);
/// Longest trial.
pub const MAX_TRIAL: Duration = Duration::from_secs(24 * 3600);
/// Most probes of a trial.
pub const MAX_PROBES: usize = 16;

/// A request to the run loop, with the channel for its answer.
#[derive(Debug)]
pub enum Request {
    /// Read the configuration file again.
    Reload(oneshot::Sender<Result<(), ReloadError>>),
    /// Apply a configuration, for good or on trial.
    Apply(Box<ApplyRequest>, oneshot::Sender<Result<Applied, ApplyError>>),
    /// Make the configuration on trial permanent.
    Confirm(oneshot::Sender<Result<Applied, ApplyError>>),
    /// Go back to the configuration before the trial.
    Revert(oneshot::Sender<Result<Applied, ApplyError>>),
    /// Every probe of the trial has answered.
    ProbesAnswered,
}

/// A configuration to apply.
#[derive(Clone, Debug)]
pub struct ApplyRequest {
    /// The text of a configuration.
    pub config: String,
    /// Roll back after this time, unless it is confirmed.
    pub confirm: Option<Duration>,
    /// Probes that confirm the trial when all have answered.
    pub probes: Vec<Probe>,
}

/// The answer to a request that succeeded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Applied {
    /// Number of the active policy, if eBPF enforces.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generation: Option<u32>,
    /// When the former configuration comes back, unless this one is confirmed; RFC 3339, UTC. Left out: never.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deadline: Option<String>,
    /// Parts of the configuration that are valid, but probably not intended.
    pub warnings: Vec<String>,
}

/// An error of a layer above this module, which only its text leaves.
type Cause = Box<dyn StdError + Send + Sync>;

/// Why the configuration file was not applied again.
#[derive(Debug, thiserror::Error)]
pub enum ReloadError {
    /// The file is not valid.
    #[error(transparent)]
    Config(#[from] ConfigErrors),
    /// A trial is running.
    #[error(
        "a configuration is on trial for {0} s more, and the file is read when that is over: confirm it (`bridge-agent \
         confirm`), revert it (`bridge-agent revert`), or wait"
    )]
    OnTrial(u64),
    /// It could not be applied; the former configuration is still active.
    #[error(transparent)]
    Refused(Cause),
}

/// Why a configuration was not applied, confirmed or reverted.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// It is not valid.
    #[error(transparent)]
    Config(#[from] ConfigErrors),
    /// It could not be applied; the former one is still active.
    #[error("the former configuration is still active: {0}")]
    Refused(#[source] Cause),
    /// The kernel side could not confirm it.
    #[error(transparent)]
    Kernel(Cause),
    /// Another one is on trial.
    #[error(
        "a configuration is on trial for {0} s more: confirm it (`bridge-agent confirm`), revert it (`bridge-agent \
         revert`), or wait"
    )]
    OnTrial(u64),
    /// None is on trial.
    #[error(
        "no configuration waits for confirmation: its time may be over (see `bridge-agent status`); apply it again"
    )]
    NoTrial,
    /// The former configuration could not be restored.
    #[error(
        "the configuration before the trial is not wholly active again yet, and the agent retries until it is (see \
         `bridge-agent status`): {0}"
    )]
    NotReverted(String),
    /// There is no configuration to go back to.
    #[error(
        "{} differs from the active configuration, as the last reload failed or is still to be done: correct it first, \
         so that there is a configuration to go back to, or apply without --confirm", .0.display()
    )]
    FileNotActive(PathBuf),
    /// Without the agent, the kernel could not undo the change.
    #[error(
        "{0} differs from the active configuration, and the kernel cannot undo that by itself: apply it without --confirm"
    )]
    NoWayBack(&'static str),
    /// Another program has written the file during the trial.
    #[error(
        "another program changed {} during the trial: restore it, then confirm; or let the trial run out, and apply \
         again", .0.display()
    )]
    FileChanged(PathBuf),
    /// It cannot become the configuration file.
    #[error(
        "{0}; if another program provides this file (a ConfigMap, configuration management), change it there"
    )]
    Write(#[from] WriteError),
}

/// A file that could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {}: {source}", path.display())]
pub struct WriteError {
    pub path: PathBuf,
    pub source: io::Error,
}

impl WriteError {
    /// Adds the path to an error; for `map_err`.
    pub(crate) fn at(path: &Path) -> impl FnOnce(io::Error) -> Self {
        |source| Self { path: path.to_owned(), source }
    }
}
