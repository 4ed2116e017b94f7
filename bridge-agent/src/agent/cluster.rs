//! The cluster as the run loop follows it: its additions to the configuration file are applied as if the file contained
//! them.

use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Agent, Error, following::Following, term::Term, unknown_cluster};
use crate::config::{Config, Role};
use crate::interfaces::Selection;
use crate::kernel::memory;
use crate::kubernetes::Follower;

/// Memory that reading a large cluster has taken is given back, at most so often.
const TRIM: Duration = Duration::from_secs(1);

impl Agent {
    /// Returns the interfaces and routes to follow while the cluster is not known.
    pub(super) fn unknown_cluster(&self) -> Option<Selection> {
        let following = self.cluster.as_ref()?;
        let unknown = following.file.role == Role::Node && !following.follower.knows_cluster();
        unknown.then(|| unknown_cluster::selection(&following.file))
    }

    /// Applies a configuration file with the known state of the cluster that it names, for the lifetime `term`. Nothing is
    /// changed if that fails.
    pub(super) fn change_file(&mut self, file: &Config, term: Term<'_>) -> Result<(), Error> {
        let Some(section) = &file.kubernetes else {
            self.change(file, term)?;
            self.cluster = None;
            self.shared.set_kubernetes(None);
            return Ok(());
        };
        let start = Instant::now();
        let there = self.cluster.as_ref().map(|following| &following.follower);
        let fresh = match there.filter(|follower| follower.is_for(file) && !follower.can_begin()) {
            Some(_) => None,
            None => {
                let (engines, state) = (self.shared.engines(), self.state.lasting());
                let follower = match Follower::start(file, section, engines.clone(), state) {
                    // A reload is refused. Without an agent, the node would be open.
                    Err(error) if self.is_starting() => {
                        tracing::error!(%error, "the cluster cannot be followed yet; the agent enforces, and tries again");
                        Follower::start_later(file, section, engines, state, error)?
                    }
                    follower => follower?,
                };
                Some(follower)
            }
        };
        let (mut planned, version, former) = loop {
            let there = self.cluster.as_ref().map(|following| &following.follower);
            let follower = fresh.as_ref().or(there).expect("one is there, or has just been made");
            let (planned, version) = unknown_cluster::plan(follower, file);
            let former = term.former().map(|former| unknown_cluster::plan(follower, former).0.config);
            let changed = self.change(&planned.config, term.against(former.as_ref()));
            let Err(error) = changed else { break (planned, version, former) };
            // One policy keeps neither the configuration nor the other policies from being applied.
            let there = self.cluster.as_ref().map(|following| &following.follower);
            let follower = fresh.as_ref().or(there).expect("one is there, or has just been made");
            if !follower.exclude(&planned, &error.to_string()) {
                return Err(error);
            }
            tracing::warn!(%error, "the policies cannot be applied together; the agent leaves new ones out");
        };
        let mut follower = match (fresh, self.cluster.take()) {
            (Some(fresh), _) => fresh,
            (None, Some(following)) => following.follower,
            (None, None) => unreachable!("one was there"),
        };
        if planned.synced {
            self.routing.publish(mem::take(&mut planned.routes));
            self.pool.set_pods(mem::take(&mut planned.pool_pods));
        }
        let config = follower.done(version, planned, None, start.elapsed());
        self.shared.set_kubernetes(Some(follower.view()));
        self.cluster =
            Some(Following { follower, file: file.clone(), config, former, trimmed: Instant::now() });
        Ok(())
    }

    /// Follows a change of the cluster. A failed change is tried again and leaves the former state active. While a
    /// configuration is on trial the change reaches that, and the one before it, which may return any time.
    pub(super) fn cluster_changed(&mut self) {
        let Some(mut following) = self.cluster.take() else { return };
        if following.follower.can_begin() {
            self.begin(&mut following);
        }
        let start = Instant::now();
        let (mut planned, version) = unknown_cluster::plan(&following.follower, &following.file);
        let planning = start.elapsed();
        // Until all is known, nothing is withdrawn.
        if planned.synced {
            self.routing.publish(mem::take(&mut planned.routes));
            self.pool.set_pods(mem::take(&mut planned.pool_pods));
        }
        let on_trial = self.trial.as_ref().map(|trial| (Arc::clone(&trial.before), trial.left()));
        let former =
            on_trial.as_ref().map(|(before, _)| unknown_cluster::plan(&following.follower, before).0.config);
        let mut error = None;
        if planned.config != following.config || former != following.former {
            self.compare(false);
            let term = match (&on_trial, &former) {
                (Some((_, left)), Some(former)) => Term::Rest(former, *left),
                _ => Term::Good,
            };
            match self.change(&planned.config, term) {
                Ok(()) => {
                    following.former = former;
                    self.note_deadline();
                }
                Err(failure) => {
                    tracing::error!("cannot apply the state of the cluster: {failure}");
                    error = Some(failure.to_string());
                }
            }
            self.compare_soon();
            self.show_enforcement();
        }
        tracing::debug!(?planning, took = ?start.elapsed(), "followed a change of the cluster");
        let failed = error.is_some();
        let config = following.follower.done(version, planned, error, start.elapsed());
        if !failed {
            following.config = config;
        }
        if following.trimmed.elapsed() > TRIM {
            memory::trim();
            following.trimmed = Instant::now();
        }
        self.cluster = Some(following);
    }
    /// Follows the cluster, after this node had no valid name.
    fn begin(&self, following: &mut Following) {
        let Some(section) = &following.file.kubernetes else { return };
        let (file, engines, state) = (&following.file, self.shared.engines(), self.state.lasting());
        let begun = Follower::start(file, section, engines.clone(), state)
            .or_else(|error| Follower::start_later(file, section, engines, state, error));
        match begun {
            Ok(follower) => {
                tracing::info!("this node has a name in the cluster now, and follows it");
                self.shared.set_kubernetes(Some(follower.view()));
                following.follower = follower;
            }
            Err(error) => {
                tracing::error!(%error, "the cluster cannot be followed yet; the agent tries again")
            }
        }
    }
}
