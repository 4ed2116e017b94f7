//! The cluster as the run loop follows it: what it adds to the configuration file is brought into force as if it stood
//! there.

use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Agent, Error, enforcer::Term};
use crate::config::Config;
use crate::kernel::memory;
use crate::kubernetes::Follower;

/// Memory that reading a large cluster has taken is given back, at most so often.
const TRIM: Duration = Duration::from_secs(1);

/// Brings what packets need to a configuration.
pub(super) type Engines = fn(&mut Agent, &Config, Term<'_>) -> Result<(), Error>;

/// A cluster that is followed.
pub(super) struct Following {
    follower: Follower,
    /// The configuration file.
    file: Config,
    /// The same with what the cluster adds to it: what is in force.
    config: Config,
    /// While `file` is on trial: the configuration that comes back, with what the cluster adds to it.
    former: Option<Config>,
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
    /// Brings everything to a configuration file, with what is known of the cluster it names, for as long as `term` says; what
    /// packets need, `engines` does. Nothing is changed if that fails.
    pub(super) fn change_file(
        &mut self,
        file: &Config,
        term: Term<'_>,
        engines: Engines,
    ) -> Result<(), Error> {
        let Some(section) = &file.kubernetes else {
            self.change(file, |agent, config| engines(agent, config, term))?;
            self.cluster = None;
            self.shared.set_kubernetes(None);
            return Ok(());
        };
        let start = Instant::now();
        let there = self.cluster.as_ref().map(|following| &following.follower);
        let fresh = match there.filter(|follower| follower.is_for(file)) {
            Some(_) => None,
            None => Some(Follower::start(file, section, self.shared.engines(), self.state.lasting())?),
        };
        let follower = fresh.as_ref().or(there).expect("one is there, or has just been made");
        let (mut planned, version) = follower.plan(file);
        let former = term.former().map(|former| follower.plan(former).0.config);
        self.change(&planned.config, |agent, config| engines(agent, config, term.against(former.as_ref())))?;
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
        self.cluster =
            Some(Following { follower, file: file.clone(), config, former, trimmed: Instant::now() });
        Ok(())
    }

    /// Follows a change of the cluster. What cannot be brought into force is tried again, and leaves in force what was. While
    /// a configuration is on trial the change reaches that, and the one before it, which may come back any time.
    pub(super) fn cluster_changed(&mut self) {
        let Some(mut following) = self.cluster.take() else { return };
        let start = Instant::now();
        let (mut planned, version) = following.follower.plan(&following.file);
        self.routing.publish(mem::take(&mut planned.routes));
        self.pool.set_pods(mem::take(&mut planned.pool_pods));
        let on_trial = self.trial.as_ref().map(|trial| (Arc::clone(&trial.before), trial.left()));
        let former = on_trial.as_ref().map(|(before, _)| following.follower.plan(before).0.config);
        let mut error = None;
        if planned.config != following.config || former != following.former {
            self.compare(false);
            let term = match (&on_trial, &former) {
                (Some((_, left)), Some(former)) => Term::Rest(former, *left),
                _ => Term::Good,
            };
            match self.change(&planned.config, |agent, config| agent.reload_engines(config, term)) {
                Ok(()) => {
                    following.config.clone_from(&planned.config);
                    following.former = former;
                    self.note_deadline();
                }
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
            memory::trim();
            following.trimmed = Instant::now();
        }
        self.cluster = Some(following);
    }
}
