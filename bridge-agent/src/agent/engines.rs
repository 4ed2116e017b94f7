//! Both engines as one: everything is compiled before anything is written, and a change takes effect in both or in neither.

use std::sync::Arc;

use super::{
    Agent, Error,
    desired::{Error as EnforcerError, Prepared},
    enforcer::Enforcer,
    packet_filter::{self, Leftovers, PacketFilter},
    term::Term,
};
use crate::{
    config::{Config, Engine, Role},
    datapath::{self, EventReader},
    kernel::backoff::Backoff,
};

pub(super) fn wants_ebpf(config: &Config) -> bool {
    config.role == Role::Node && config.enforcement.engines.contains(&Engine::Ebpf)
}

/// Compiles `config` for every engine that it wants, and writes nothing.
fn prepare(config: &Config, term: Term<'_>) -> Result<Option<Prepared>, Error> {
    // Counting is cheap: a policy that is too large for iptables is refused before eBPF compiles it.
    packet_filter::check(config)?;
    let former = term.former();
    if let Some(former) = former {
        packet_filter::check(former)?;
    }
    Ok(wants_ebpf(config).then(|| Prepared::new(config, former)).transpose()?)
}

impl Agent {
    /// Brings every engine up. A start that fails leaves nothing that was not there before.
    pub(super) fn start_engines(&mut self, config: &Config, term: Term<'_>) -> Result<(), Error> {
        let prepared = prepare(config, term)?;
        if wants_ebpf(config) && self.pins.root().exists() {
            // Another agent that works here is not to lose its iptables rules before that shows.
            drop(self.pins.lock().map_err(EnforcerError::from)?);
        }
        if packet_filter::is_wanted(config) {
            self.filter = PacketFilter::start(config, term.on_trial())?;
        }
        let enforcing_before = self.pins.exist_of_any_version();
        let result = self.bring_up(config, prepared, term);
        if result.is_err()
            && !enforcing_before
            && let Some(filter) = self.filter.take()
        {
            self.leftovers = filter.take_down();
        }
        if let (Ok(()), Some(filter)) = (&result, &self.filter) {
            self.leftovers = filter.remove_other(config);
        }
        self.compare(true);
        result
    }

    /// Starts to enforce, if that is wanted, or takes enforcement down that is no longer wanted.
    fn bring_up(&mut self, config: &Config, prepared: Option<Prepared>, term: Term<'_>) -> Result<(), Error> {
        if let Some(prepared) = prepared {
            let enforcer = Enforcer::start(&self.pins, &self.state.boot(), config, prepared, term)?;
            self.shared.set_maps(Some(Arc::clone(enforcer.maps())));
            self.enforcer = Some(enforcer);
            self.open_events();
        } else if self.pins.exist_of_any_version() {
            let (_, result) = datapath::down(&self.pins, &crate::pool::pins::is_of_a_pool);
            result.map_err(EnforcerError::from)?;
            tracing::info!("removed the eBPF enforcement of an earlier configuration");
        }
        self.show_enforcement();
        Ok(())
    }

    /// Begins to read events; tried again later if that fails.
    pub(super) fn open_events(&mut self) {
        let Some(enforcer) = &self.enforcer else { return };
        let opened = EventReader::new(enforcer.maps());
        self.events_again.note(opened.is_ok());
        match opened {
            Ok(events) => self.events = Some(events),
            Err(error) => tracing::warn!(%error, "events cannot be read; the agent tries again"),
        }
    }

    /// Applies another configuration. Nothing is changed if that fails.
    pub(super) fn reload_engines(&mut self, config: &Config, term: Term<'_>) -> Result<(), Error> {
        let prepared = prepare(config, term)?;
        let on_trial = term.on_trial();
        // The packet filter first: it refuses a change as a whole, and can be rolled back.
        let before = self.filter.as_ref().map(PacketFilter::in_force);
        // Another one takes over before this one goes, so that no packet passes in between.
        let mut replaced = None;
        match &mut self.filter {
            Some(filter) if filter.is_of(config) => filter.reload(config, on_trial)?,
            filter if packet_filter::is_wanted(config) => {
                let next = PacketFilter::start(config, on_trial)?;
                replaced = std::mem::replace(filter, next);
                self.leftovers = Leftovers::default();
            }
            _ => {}
        }
        crate::fault::point("reload:iptables");
        if let Err(error) = self.reload_ebpf(config, prepared, term) {
            if replaced.is_some() {
                let next = std::mem::replace(&mut self.filter, replaced);
                if let Some(next) = next {
                    self.leftovers = next.take_down();
                }
                return Err(error);
            }
            match (before, self.filter.take()) {
                (Some(before), Some(mut filter)) => {
                    filter.restore(before);
                    self.filter = Some(filter);
                }
                (None, Some(filter)) => self.leftovers = filter.take_down(),
                (_, None) => {}
            }
            return Err(error);
        }
        if let Some(replaced) = replaced {
            self.leftovers = replaced.take_down();
        }
        if !packet_filter::is_wanted(config)
            && let Some(filter) = self.filter.take()
        {
            self.leftovers = filter.take_down();
        }
        Ok(())
    }

    fn reload_ebpf(
        &mut self,
        config: &Config,
        prepared: Option<Prepared>,
        term: Term<'_>,
    ) -> Result<(), Error> {
        match (self.enforcer.take(), prepared) {
            (Some(mut enforcer), Some(prepared)) => {
                let result = enforcer.reload(prepared, term);
                self.enforcer = Some(enforcer);
                result?;
            }
            (Some(enforcer), None) => {
                self.events = None;
                self.events_again = Backoff::default();
                self.shared.set_maps(None);
                enforcer.take_down(&self.pins)?;
            }
            (None, prepared) => self.bring_up(config, prepared, Term::Good)?,
        }
        Ok(())
    }

    /// Begins, or ends, to compare the engines, if there are two.
    pub(super) fn compare(&mut self, begin: bool) {
        if let Some(filter) = &mut self.filter {
            filter.compare(begin && self.enforcer.is_some());
        }
    }

    pub(super) fn report_divergence(&mut self) {
        if let Some(filter) = &mut self.filter {
            filter.report(self.enforcer.as_ref().map(|enforcer| &**enforcer.maps()));
        }
    }
}
