//! Errors of commands: their text, remedy and exit code.

use std::{io, path::PathBuf};

use super::discover;
use crate::{
    agent,
    api::{self, client},
    config::ConfigErrors,
    datapath,
};

/// Exit code of `status` when no agent runs, as that of systemctl.
const NOT_RUNNING: u8 = 3;
/// Exit code of `routes plan --exit-code` when the kernel differs.
const CHANGES_DUE: u8 = 4;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration is not valid.
    #[error(transparent)]
    Config(#[from] ConfigErrors),
    /// The nftables rules could not be read or removed.
    #[error(transparent)]
    Nftables(#[from] crate::nftables::Error),
    /// The iptables rules could not be read or removed.
    #[error(transparent)]
    Iptables(#[from] crate::iptables::Error),
    /// Standard output or input failed.
    #[error("{action}: {source}")]
    Stream {
        /// The action that failed.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// A file cannot be used.
    #[error("{action} {}: {source}", path.display())]
    Named {
        /// The action that failed.
        action: &'static str,
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// This process cannot run as it should.
    #[error("{action}: {source}")]
    Process {
        /// The action that failed.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The agent could not start, or ended.
    #[error(transparent)]
    Agent(#[from] agent::Error),
    /// The API could not be served.
    #[error(transparent)]
    Api(#[from] api::Error),
    /// The packet path is not as it should be.
    #[error(transparent)]
    Datapath(#[from] datapath::Error),
    /// The agent did not answer.
    #[error(transparent)]
    Client(#[from] client::Error),
    /// The page could not be served.
    #[error(transparent)]
    Ui(#[from] crate::ui::Error),
    /// Options of another cluster without the option that asks for one.
    #[error(
        "--kubeconfig, --context, --namespace, --selector and --node choose agents of a cluster; add --kubernetes"
    )]
    NeedsKubernetes,
    /// Routes.
    #[error(transparent)]
    Routes(#[from] crate::routes::Error),
    /// Routes that cannot be said in a format.
    #[error(transparent)]
    Export(#[from] crate::routes::export::ExportError),
    /// The agent has no routes of the cluster yet.
    #[error("the agent has not read the routes of the cluster yet; `bridge-agent status` names the reason")]
    NoClusterRoutes,
    /// Standard input cannot be followed.
    #[error(
        "--watch follows a configuration file, and standard input is none; write it to a file and name that by --config"
    )]
    WatchesStandardInput,
    /// It would undo the removal.
    #[error(
        "the agent (pid {0}) is running and would put the routes back; stop it before (`systemctl stop bridge-agent`)"
    )]
    AgentKeepsRoutes(u32),
    /// Discovery of pods.
    #[error(transparent)]
    Discover(#[from] discover::Failure),
    /// The kernel refused a part.
    #[error("{}", .0.join("\n"))]
    Partly(Vec<String>),
    /// Something of the port pool could not be removed.
    #[error(transparent)]
    Pool(#[from] crate::pool::run::StopError),
    /// A part of the configuration is not applied.
    #[error("not ready: {}", .0.join("\n"))]
    NotReady(Vec<String>),
    /// The range of NodePorts.
    #[error(transparent)]
    NodeportRange(#[from] crate::nodeport_range::Error),
    /// The program could not be run as asked.
    #[error("{0}")]
    Exec(String),
    /// The user did not confirm it.
    #[error("nothing was done")]
    NotDone,
    /// `status` has printed its report: no agent runs.
    #[error("no agent runs")]
    NoAgent,
    /// `routes plan --exit-code` has printed its operations.
    #[error("changes are due")]
    ChangesDue,
    /// Probes did not answer.
    #[error("not confirmed in time, the former configuration is active: {0}")]
    NotConfirmed(String),
    /// A connection that cannot be explained.
    #[error("{0}")]
    Question(String),
    /// Verdicts are not as a file of cases expects.
    #[error("{differing} of {all} cases differ")]
    Expectations {
        /// How many differ.
        differing: usize,
        /// How many there are.
        all: usize,
    },
    /// It failed, and the result on standard output says so.
    #[error("failed")]
    Silent,
    /// A value could not be written in the wanted format.
    #[error("cannot write the result: {0}")]
    Format(String),
}

impl Error {
    /// Returns a remedy, where the message does not name one.
    pub(super) fn help(&self) -> Option<&'static str> {
        match self {
            // These say so.
            Self::Config(_)
            | Self::Iptables(_)
            | Self::Nftables(_)
            | Self::Named { .. }
            | Self::Process { .. }
            | Self::Agent(_)
            | Self::Api(_)
            | Self::Datapath(_)
            | Self::Client(_)
            | Self::Ui(_)
            | Self::NeedsKubernetes
            | Self::Routes(_)
            | Self::Export(_)
            | Self::NoClusterRoutes
            | Self::WatchesStandardInput
            | Self::AgentKeepsRoutes(_)
            | Self::Discover(_)
            | Self::Partly(_)
            | Self::Pool(_)
            | Self::NodeportRange(_)
            | Self::NotReady(_)
            | Self::NotDone
            | Self::NoAgent
            | Self::ChangesDue
            | Self::Exec(_)
            | Self::Question(_)
            | Self::Silent
            | Self::Format(_) => None,
            Self::Expectations { .. } => {
                Some("change the rules or the cases; `bridge-agent explain` has the steps")
            }
            Self::NotConfirmed(_) => {
                Some("check that these answer, and that the configuration lets this node reach them")
            }
            Self::Stream { .. } => Some("check the ends of standard input and output"),
        }
    }

    /// Exit code of the process.
    #[must_use]
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::NoAgent | Self::Client(client::Error::NotRunning { .. }) => NOT_RUNNING,
            Self::ChangesDue => CHANGES_DUE,
            _ => 1,
        }
    }
}
