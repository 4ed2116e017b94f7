//! The packet filter as a part of a transaction.

use super::{Applied, Leftovers, PacketFilter, check, is_wanted};
use crate::{
    agent::{
        error::Error,
        handover, packet_filter,
        transaction::{Change, Next, Part},
    },
    datapath::Pins,
    kernel::sole::{self, Sole},
};

/// Name of the claim.
const CLAIM: &str = "bridge-agent-packet-filter";

/// The packet filter, if one is wanted.
pub(in crate::agent) struct Filters {
    pub(in crate::agent) active: Option<PacketFilter>,
    /// Rules that could not be removed.
    leftovers: Leftovers,
    pins: Pins,
    /// Kept while a filter is active: one agent of a network namespace has one.
    sole: Option<Sole>,
    /// Whether a configuration was applied.
    started: bool,
}

/// Changes that a commit has made.
enum Done {
    Nothing,
    /// The filter has other rules; these were applied before.
    Reloaded(Applied),
    /// Another filter has taken over, or the first one.
    Replaced(Option<PacketFilter>),
}

struct FilterChange<'a> {
    filters: &'a mut Filters,
    next: Next<'a>,
    /// Whether eBPF enforces from an earlier run: rules of this run then stay, whatever fails.
    adopted: bool,
    done: Done,
}

impl Filters {
    /// No filter yet. `pins`: those of the packet path.
    pub(in crate::agent) fn new(pins: Pins) -> Self {
        Self { active: None, leftovers: Leftovers::default(), pins, sole: None, started: false }
    }

    /// Removes rules that are left, if it is time for another attempt.
    pub(in crate::agent) fn try_again(&mut self) {
        self.leftovers.try_again();
    }
}

/// Refuses to work beside another agent. That the kernel refuses the claim is no reason not to enforce.
fn claim() -> Result<Option<Sole>, packet_filter::Error> {
    match Sole::claim(CLAIM) {
        Ok(sole) => Ok(Some(sole)),
        Err(sole::Error::Taken(process)) => Err(packet_filter::Error::Taken(process)),
        Err(error) => {
            tracing::warn!(%error, "cannot see whether another agent keeps rules here");
            Ok(None)
        }
    }
}

impl Part for Filters {
    fn prepare<'a>(&'a mut self, next: Next<'a>) -> Result<Box<dyn Change + 'a>, Error> {
        check(next.config)?;
        if let Some(former) = next.term.former() {
            check(former)?;
        }
        if self.active.is_none() {
            self.sole = if is_wanted(next.config) { claim()? } else { None };
        }
        let adopted = !self.started && self.pins.exist_of_any_version();
        Ok(Box::new(FilterChange { filters: self, next, adopted, done: Done::Nothing }))
    }
}

impl Change for FilterChange<'_> {
    fn commit(&mut self) -> Result<(), Error> {
        let (config, on_trial) = (self.next.config, self.next.term.on_trial());
        match &mut self.filters.active {
            Some(filter) if filter.is_of(config) => {
                let before = filter.applied();
                filter.reload(config, on_trial)?;
                self.done = Done::Reloaded(before);
            }
            // Another one takes over before this one goes, so that no packet passes in between.
            active if is_wanted(config) => {
                let tracking = active.is_none().then(|| handover::begin(&self.filters.pins)).flatten();
                let next = PacketFilter::start(config, on_trial)?;
                drop(tracking);
                self.done = Done::Replaced(std::mem::replace(active, next));
                if let Some(started) = active {
                    self.filters.leftovers.forget(started.kind());
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn rollback(&mut self) {
        match (std::mem::replace(&mut self.done, Done::Nothing), &mut self.filters.active) {
            (Done::Reloaded(before), Some(filter)) => filter.rollback(before),
            (Done::Replaced(former), active) if !self.adopted => {
                if let Some(next) = std::mem::replace(active, former) {
                    next.take_down(&mut self.filters.leftovers);
                }
            }
            _ => {}
        }
    }

    fn finish(self: Box<Self>) {
        let Self { filters, next, done, .. } = *self;
        if let Done::Replaced(Some(former)) = done {
            former.take_down(&mut filters.leftovers);
        }
        if !is_wanted(next.config)
            && let Some(filter) = filters.active.take()
        {
            filter.take_down(&mut filters.leftovers);
            filters.sole = None;
        }
        if !std::mem::replace(&mut filters.started, true) {
            let active = filters.active.as_ref().map(PacketFilter::kind);
            filters.leftovers = Leftovers::of_earlier_run(next.config, active);
        }
    }
}
