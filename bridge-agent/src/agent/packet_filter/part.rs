//! The packet filter as a part of a transaction.

use super::{Applied, Leftovers, PacketFilter, check, is_wanted};
use crate::{
    agent::{
        error::Error,
        transaction::{Change, Next, Part},
    },
    datapath::Pins,
};

/// The packet filter, if one is wanted.
pub(in crate::agent) struct Filters {
    pub(in crate::agent) active: Option<PacketFilter>,
    /// Rules that could not be removed.
    leftovers: Leftovers,
    pins: Pins,
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
        Self { active: None, leftovers: Leftovers::default(), pins, started: false }
    }

    /// Removes rules that are left, if it is time for another attempt.
    pub(in crate::agent) fn try_again(&mut self) {
        self.leftovers.try_again();
    }
}

impl Part for Filters {
    fn prepare<'a>(&'a mut self, next: Next<'a>) -> Result<Box<dyn Change + 'a>, Error> {
        check(next.config)?;
        if let Some(former) = next.term.former() {
            check(former)?;
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
                let next = PacketFilter::start(config, on_trial)?;
                self.done = Done::Replaced(std::mem::replace(active, next));
                self.filters.leftovers = Leftovers::default();
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
                    self.filters.leftovers = next.take_down();
                }
            }
            _ => {}
        }
    }

    fn finish(self: Box<Self>) {
        let Self { filters, next, done, .. } = *self;
        if let Done::Replaced(Some(former)) = done {
            filters.leftovers = former.take_down();
        }
        if !is_wanted(next.config)
            && let Some(filter) = filters.active.take()
        {
            filters.leftovers = filter.take_down();
        }
        if !std::mem::replace(&mut filters.started, true)
            && let Some(filter) = &filters.active
        {
            filters.leftovers = filter.remove_other(next.config);
        }
    }
}
