//! The agents that a page shows.

use std::path::PathBuf;

use crate::kubectl::Access;

/// The agents that a page shows.
#[derive(Clone, Debug)]
pub enum Source {
    /// The agent of this machine.
    Socket(PathBuf),
    /// The agents of a cluster.
    Cluster(Access),
}
