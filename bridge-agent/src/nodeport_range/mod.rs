//! kube-apiserver's `--service-node-port-range` in its static pod manifest.
//!
//! [`manifest`] finds and changes it in the text (pure), [`conflicts`] finds obstacles to a range (pure), [`listeners`]
//! and [`surroundings`] read this node, [`store`] replaces the file.

pub mod conflicts;
pub mod listeners;
pub mod manifest;
pub mod store;
pub mod surroundings;

use std::{io, path::PathBuf};

use crate::{config::ConfigErrors, model::PortRange};

/// kube-apiserver's default where the flag is absent or empty (`DefaultServiceNodePortRange`,
/// pkg/kubeapiserver/options/options.go).
pub const DEFAULT: PortRange = PortRange { first: 30000, last: 32767 };

/// Why the range could not be read or changed. The manifest is as it was.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The manifest is no YAML.
    #[error(transparent)]
    Syntax(#[from] ConfigErrors),
    /// The manifest is invalid.
    #[error("{path}: {problem}; {remedy}", path = .path.display())]
    Manifest {
        path: PathBuf,
        /// The fault, in one clause.
        problem: String,
        /// The remedy, as an imperative clause.
        remedy: &'static str,
    },
    /// Something on this node has ports of the range.
    #[error("NodePorts cannot be {range}:\n{}", list(.conflicts))]
    Conflicts {
        /// The requested range.
        range: PortRange,
        /// All that speaks against it.
        conflicts: Vec<conflicts::Conflict>,
    },
    /// A file or directory.
    #[error("cannot {action} {path}: {source}; {remedy}", path = .path.display())]
    File {
        /// The action that failed.
        action: &'static str,
        /// The path of the action.
        path: PathBuf,
        /// Error of the kernel.
        source: io::Error,
        /// The remedy.
        remedy: &'static str,
    },
}

fn list(conflicts: &[conflicts::Conflict]) -> String {
    let line = |conflict: &conflicts::Conflict| format!("  {}; {}", conflict.problem, conflict.remedy);
    conflicts.iter().map(line).collect::<Vec<_>>().join("\n")
}
