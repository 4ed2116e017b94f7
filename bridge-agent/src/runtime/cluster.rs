//! The cluster as the run loop follows it: what it adds to the configuration file is brought into force as if it stood
//! there.

use std::mem;
use std::time::{Duration, Instant};

use super::{Agent, Error, trim_memory};
use crate::config::Config;
use crate::kubernetes::Follower;

/// Memory that reading a large cluster has taken is given back, at most so often.
const TRIM: Duration = Duration::from_secs(1);

/// A cluster that is followed.
pub(super) struct Following {
    follower: Follower,
    /// The configuration file.
    file: Config,
    /// The same with what the cluster adds to it: what is in force.
    config: Config,
    trimmed: Instant,
}

/// Waits until the cluster has changed; for ever, if none is followed.
pub(super) async fn changed(following: Option<&mut Following>) {
    match following {
        Some(following) => following.follower.changed().await,
        None => std::future::pending().await,
    }
}

/// A configuration file with what is known of its cluster, if that is followed.
pub(super) fn with(following: Option<&Following>, file: Config) -> Config {
    match following {
        Some(following) if following.follower.is_for(&file) => following.follower.plan(&file).0.config,
        _ => file,
    }
}

impl Agent {
    /// Brings everything to a configuration file, with what is known of the cluster it names; what packets need, `engines`
    /// does. Nothing is changed if that fails.
    pub(super) fn change_file(
        &mut self,
        file: &Config,
        engines: impl FnOnce(&mut Self, &Config) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let Some(section) = &file.kubernetes else {
            self.change(file, engines)?;
            self.cluster = None;
            self.shared.set_kubernetes(None);
            return Ok(());
        };
        let start = Instant::now();
        let there = self.cluster.as_ref().map(|following| &following.follower);
        let fresh = match there.filter(|follower| follower.is_for(file)) {
            Some(_) => None,
            None => Some(Follower::start(file, section, &self.shared)?),
        };
        let follower = fresh.as_ref().or(there).expect("one is there, or has just been made");
        let (mut planned, version) = follower.plan(file);
        self.change(&planned.config, engines)?;
        let mut follower = match (fresh, self.cluster.take()) {
            (Some(fresh), _) => fresh,
            (None, Some(following)) => following.follower,
            (None, None) => unreachable!("one was there"),
        };
        if follower.synced() {
            self.routing.publish(mem::take(&mut planned.routes));
            self.pool.set_pods(mem::take(&mut planned.pool_pods));
        }
        let config = planned.config.clone();
        follower.done(version, planned, None, start.elapsed());
        self.shared.set_kubernetes(Some(follower.view()));
        self.cluster = Some(Following { follower, file: file.clone(), config, trimmed: Instant::now() });
        Ok(())
    }

    /// Follows a change of the cluster. What cannot be brought into force is tried again, and leaves in force what was.
    pub(super) fn cluster_changed(&mut self) {
        let Some(mut following) = self.cluster.take() else { return };
        let start = Instant::now();
        let (mut planned, version) = following.follower.plan(&following.file);
        self.routing.publish(mem::take(&mut planned.routes));
        self.pool.set_pods(mem::take(&mut planned.pool_pods));
        let mut error = None;
        if planned.config != following.config {
            self.compare(false);
            match self.change(&planned.config, |agent, config| agent.reload_engines(config, None)) {
                Ok(()) => following.config.clone_from(&planned.config),
                Err(failure) => {
                    tracing::error!("what the cluster wants cannot be brought into force: {failure}");
                    error = Some(failure.to_string());
                }
            }
            self.compare(true);
            self.show_enforcement();
        }
        following.follower.done(version, planned, error, start.elapsed());
        if following.trimmed.elapsed() > TRIM {
            trim_memory();
            following.trimmed = Instant::now();
        }
        self.cluster = Some(following);
    }
}
