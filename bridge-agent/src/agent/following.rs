//! The cluster that the agent follows, and the configuration with its additions.

use std::time::Instant;

use super::unknown_cluster;
use crate::config::Config;
use crate::kubernetes::Follower;

/// A cluster that is followed.
pub(super) struct Following {
    pub(super) follower: Follower,
    /// The configuration file.
    pub(super) file: Config,
    /// The same with the additions of the cluster: the active configuration.
    pub(super) config: Config,
    /// While `file` is on trial: the configuration that returns, with the additions of the cluster.
    pub(super) former: Option<Config>,
    pub(super) trimmed: Instant,
}

/// Waits until the cluster has changed; for ever, if none is followed.
pub(super) async fn changed(following: Option<&mut Following>) {
    match following {
        Some(following) => following.follower.changed().await,
        None => std::future::pending().await,
    }
}

/// Returns a configuration file with the known state of its cluster, if that is followed.
pub(super) fn with(following: Option<&Following>, file: Config) -> Config {
    match following {
        Some(following) if following.follower.is_for(&file) => {
            unknown_cluster::plan(&following.follower, &file).0.config
        }
        _ => file,
    }
}
