//! The packet path as a part of a transaction: compiled before anything is written, and switched last.

use std::{path::PathBuf, sync::Arc};

use super::{
    desired::{Error as EnforcerError, Prepared},
    enforcer::{Before, Enforcer},
    error::Error,
    transaction::{Change, Next, Part},
};
use crate::{
    config::{Config, Engine, Role},
    datapath::{self, EventReader, Pins},
    kernel::backoff::Backoff,
    state::Shared,
};

/// Whether a configuration wants eBPF to judge packets.
pub(super) fn is_wanted(config: &Config) -> bool {
    config.role == Role::Node && config.enforcement.engines.contains(&Engine::Ebpf)
}

/// The packet path, if it is wanted.
pub(super) struct PacketPath {
    pub(super) enforcer: Option<Enforcer>,
    pub(super) events: Option<EventReader>,
    pins: Pins,
    /// State of this boot.
    state: PathBuf,
    shared: Shared,
    /// Events could not be read.
    events_again: Backoff,
    /// Programs or maps that are no longer wanted could not be removed.
    left: Backoff,
}

/// Changes that a commit has made.
enum Done {
    Nothing,
    Started,
    Changed(Box<Before>),
}

struct PathChange<'a> {
    path: &'a mut PacketPath,
    next: Next<'a>,
    prepared: Option<Prepared>,
    done: Done,
}

impl PacketPath {
    /// Nothing is enforced yet by this process.
    pub(super) fn new(pins: Pins, state: PathBuf, shared: Shared) -> Self {
        let (events_again, left) = (Backoff::default(), Backoff::default());
        Self { enforcer: None, events: None, pins, state, shared, events_again, left }
    }

    /// Begins to read events; tried again later if that fails.
    fn open_events(&mut self) {
        let Some(enforcer) = &self.enforcer else { return };
        let opened = EventReader::new(enforcer.maps());
        self.events_again.note(opened.is_ok());
        match opened {
            Ok(events) => self.events = Some(events),
            Err(error) => tracing::warn!(%error, "events cannot be read; the agent tries again"),
        }
    }

    /// Stops reading events until [`PacketPath::check`].
    pub(super) fn close_events(&mut self) {
        self.events = None;
        self.events_again.note(false);
    }

    /// Polls for changes that the kernel sends no notification for, and repeats what has failed and is due.
    pub(super) fn check(&mut self) {
        if self.events_again.is_due() {
            self.open_events();
        }
        if self.left.is_due() {
            self.remove();
        }
        if let Some(enforcer) = &mut self.enforcer {
            enforcer.check();
        }
    }

    /// Removes every program, map and policy.
    fn remove(&mut self) {
        self.events = None;
        self.events_again = Backoff::default();
        self.shared.set_maps(None);
        let result = match self.enforcer.take() {
            Some(enforcer) => enforcer.take_down(&self.pins),
            None => {
                datapath::down(&self.pins, &crate::pool::pins::is_of_a_pool).1.map_err(EnforcerError::from)
            }
        };
        self.left.note(result.is_ok());
        match result {
            Ok(()) => tracing::info!("removed the eBPF enforcement of an earlier configuration"),
            Err(error) => tracing::error!(%error, "eBPF programs are left; the agent tries again"),
        }
    }
}

impl Part for PacketPath {
    fn prepare<'a>(&'a mut self, next: Next<'a>) -> Result<Box<dyn Change + 'a>, Error> {
        let wanted = is_wanted(next.config);
        let prepared = wanted.then(|| Prepared::new(next.config, next.term.former())).transpose()?;
        let works_here = wanted && self.pins.root().exists() || self.pins.exist_of_any_version();
        if self.enforcer.is_none() && works_here {
            // Another agent that works here is not to lose its rules before that shows.
            drop(self.pins.lock().map_err(EnforcerError::from)?);
        }
        Ok(Box::new(PathChange { path: self, next, prepared, done: Done::Nothing }))
    }
}

impl Change for PathChange<'_> {
    fn commit(&mut self) -> Result<(), Error> {
        let Some(prepared) = self.prepared.take() else { return Ok(()) };
        let path = &mut *self.path;
        if let Some(enforcer) = &mut path.enforcer {
            crate::fault::point("reload:iptables");
            self.done = Done::Changed(Box::new(enforcer.commit(prepared, self.next.term)?));
            return Ok(());
        }
        let enforcer = Enforcer::start(&path.pins, &path.state, self.next.config, prepared, self.next.term)?;
        path.shared.set_maps(Some(Arc::clone(enforcer.maps())));
        path.enforcer = Some(enforcer);
        path.left = Backoff::default();
        path.open_events();
        self.done = Done::Started;
        Ok(())
    }

    fn rollback(&mut self) {
        match (std::mem::replace(&mut self.done, Done::Nothing), &mut self.path.enforcer) {
            (Done::Changed(before), Some(enforcer)) => enforcer.rollback(*before),
            (Done::Started, Some(enforcer)) if !enforcer.adopted() => self.path.remove(),
            _ => {}
        }
    }

    fn finish(self: Box<Self>) {
        let Self { path, next, .. } = *self;
        if !is_wanted(next.config) && (path.enforcer.is_some() || path.pins.exist_of_any_version()) {
            path.remove();
        }
    }
}
