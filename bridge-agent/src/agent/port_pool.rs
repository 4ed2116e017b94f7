//! The port pool as the run loop keeps it: started, changed and withdrawn with the configuration.

use std::{fs, path::Path};

use tokio::{sync::watch, task::JoinHandle};

use super::{
    error::Error,
    transaction::{Change, Next, Part},
};
use crate::{
    datapath::object,
    kernel::{
        backoff::Backoff,
        state_directory::{self, StateDirectory},
    },
    pool::{
        Settings,
        pods::OptedIn,
        record,
        run::{self, Places, Started},
    },
    state::Shared,
};

/// Returns the places of the pool's pins and of its notes for a restart after a crash, which belong to this boot.
pub(crate) fn places(pin_root: &Path, state: &StateDirectory) -> Places {
    Places { pins: pin_root.to_owned(), state: state.boot() }
}

/// The pool, if one is wanted.
pub(super) struct PortPool {
    places: Places,
    shared: Shared,
    running: Option<Running>,
    pods: watch::Sender<OptedIn>,
    /// Something of a pool that is no longer wanted could not be removed.
    left: Backoff,
}

struct Running {
    started: Started,
    keeper: JoinHandle<()>,
    /// Whether its hooks were there before.
    adopted: bool,
}

impl PortPool {
    /// No pool yet.
    pub(super) fn new(places: Places, shared: Shared) -> Self {
        Self { places, shared, running: None, pods: watch::channel(None).0, left: Backoff::default() }
    }

    /// Takes over the note of reserved ports that an agent before version 0.2 has written beside its socket; otherwise they
    /// would count as ports of another program.
    pub(super) fn take_over(&self, socket: &Path) {
        let (old, new) = (socket.with_file_name(record::NAME), self.places.state.join(record::NAME));
        if !new.exists()
            && state_directory::open(&old).is_ok()
            && let Err(error) = fs::copy(&old, new).and_then(|_| fs::remove_file(&old))
        {
            tracing::warn!(%error, file = %old.display(), "cannot take over the note of reserved ports");
        }
    }

    /// Says which pods of this node take part in the pool because they say so; see [`crate::pool::pods::opted_in`].
    /// Costs nothing if nothing has changed.
    pub(super) fn set_pods(&self, pods: std::collections::BTreeSet<String>) {
        let pods = Some(pods);
        self.pods.send_if_modified(|known| {
            let changed = *known != pods;
            *known = pods;
            changed
        });
    }

    /// Removes the remains of a pool that is no longer wanted, if it is time for another attempt.
    pub(super) fn try_again(&mut self) {
        if self.running.is_none() && self.left.is_due() {
            self.withdraw();
        }
    }

    fn withdraw(&mut self) {
        self.shared.set_pool(None);
        let result = match self.running.take() {
            Some(running) => {
                running.keeper.abort();
                running.started.withdraw()
            }
            None => run::stop(&self.places),
        };
        let done = result.is_ok();
        match result {
            Ok(()) => tracing::info!("port pool withdrawn"),
            Err(error) => {
                tracing::error!(%error, "something of the port pool is left; the agent tries again")
            }
        }
        self.left.note(done);
    }
}

/// A change of the pool.
struct PoolChange<'a> {
    pool: &'a mut PortPool,
    wanted: Option<Settings>,
    /// Settings of the pool before, if there was one.
    before: Option<Settings>,
    /// Whether pods of a cluster may opt in.
    has_cluster: bool,
}

impl Part for PortPool {
    fn prepare<'a>(&'a mut self, next: Next<'a>) -> Result<Box<dyn Change + 'a>, Error> {
        let wanted = Settings::from_config(next.config);
        let before = self.running.as_ref().map(|running| running.started.settings().clone());
        let has_cluster = next.config.kubernetes.is_some();
        Ok(Box::new(PoolChange { pool: self, wanted, before, has_cluster }))
    }
}

impl Change for PoolChange<'_> {
    /// Starts a pool, or changes the present one.
    fn commit(&mut self) -> Result<(), Error> {
        let pool = &mut *self.pool;
        match (&mut pool.running, &self.wanted) {
            (Some(running), Some(settings)) => running.started.change(settings)?,
            (None, Some(settings)) => {
                let adopted = pool.places.is_pinned();
                let mut started = run::start(object::POOL, settings, &pool.places)?;
                pool.shared.set_pool(Some(started.service.clone()));
                pool.left = Backoff::default();
                let keeper = tokio::spawn(started.keep(pool.pods.subscribe()));
                pool.running = Some(Running { started, keeper, adopted });
            }
            (_, None) => {}
        }
        Ok(())
    }

    fn rollback(&mut self) {
        let pool = &mut *self.pool;
        match (&mut pool.running, &self.before) {
            (Some(running), Some(settings)) => {
                if let Err(error) = running.started.change(settings) {
                    tracing::error!(%error, "the port pool has the ports of the configuration that was refused");
                }
            }
            (Some(running), None) if !running.adopted => pool.withdraw(),
            // An agent before this one left it: it goes on as it did before.
            (running, _) => {
                if let Some(running) = running.take() {
                    running.keeper.abort();
                }
                pool.shared.set_pool(None);
            }
        }
    }

    /// Takes the pool away if the configuration asks for none; also one of an earlier agent.
    fn finish(self: Box<Self>) {
        let pool = self.pool;
        if !self.has_cluster {
            // No later message will name them.
            pool.set_pods(Default::default());
        }
        if self.wanted.is_none() && (pool.running.is_some() || pool.places.is_pinned()) {
            pool.withdraw();
        }
    }
}
