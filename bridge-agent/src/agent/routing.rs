//! The routes as the run loop keeps them: started, updated and withdrawn with the configuration.
//!
//! Wanted where the configuration has a section `routes`, whatever the role. When the agent ends, they stay.

use std::path::PathBuf;

use tokio::sync::broadcast;

use super::{
    error::Error,
    transaction::{Change, Next, Part},
};
use crate::kernel::backoff::Backoff;
use crate::routes::{
    self, DesiredRoute, RouteEvent, Service, Setup, SourceKind, View, carry_out, withdrawal,
};

/// The routes, while they are wanted.
pub(super) struct Routing {
    service: Option<Service>,
    /// State of this boot.
    state: PathBuf,
    events: broadcast::Sender<RouteEvent>,
    /// Routes of an earlier configuration could not be withdrawn.
    left: Backoff,
}

/// A configuration of which everything has been done that can fail.
enum Prepared {
    /// The routes are not wanted.
    Unwanted,
    /// They are from now on. The service begins when the run loop next waits, and never if it is dropped before.
    Started(Box<Service>),
    /// They were, and still are.
    Changed(Box<routes::Change>),
}

struct RouteChange<'a> {
    routing: &'a mut Routing,
    prepared: Prepared,
}

impl Part for Routing {
    fn prepare<'a>(&'a mut self, next: Next<'a>) -> Result<Box<dyn Change + 'a>, Error> {
        let prepared = if next.config.routes.is_none() {
            Prepared::Unwanted
        } else {
            let setup = Setup::from_config(next.config, &self.state)?;
            match &self.service {
                Some(service) => Prepared::Changed(Box::new(service.prepare(setup)?)),
                None => Prepared::Started(Box::new(Service::start(setup, self.events.clone())?)),
            }
        };
        Ok(Box::new(RouteChange { routing: self, prepared }))
    }
}

impl Change for RouteChange<'_> {
    /// Changes nothing yet: a withdrawn route could not be rolled back without a gap.
    fn commit(&mut self) -> Result<(), Error> {
        Ok(())
    }

    fn rollback(&mut self) {}

    fn finish(self: Box<Self>) {
        let Self { routing, prepared } = *self;
        match (prepared, &mut routing.service) {
            (Prepared::Unwanted, service) => {
                // Its tasks end with it, so that nothing is put back.
                *service = None;
                routing.left.note(withdraw());
                return;
            }
            (Prepared::Changed(change), Some(service)) => service.commit(*change),
            (Prepared::Started(service), _) => routing.service = Some(*service),
            (Prepared::Changed(_), None) => unreachable!("a change is prepared by a service that is there"),
        }
        routing.left = Backoff::default();
    }
}

impl Routing {
    /// No routes yet.
    pub(super) fn new(state: PathBuf, events: broadcast::Sender<RouteEvent>) -> Self {
        Self { service: None, state, events, left: Backoff::default() }
    }

    /// Withdraws routes that are left, if it is time for another attempt.
    pub(super) fn try_again(&mut self) {
        if self.left.is_due() {
            self.left.note(withdraw());
        }
    }

    /// The API server has said which routes it wants.
    pub(super) fn publish(&self, routes: Vec<DesiredRoute>) {
        if let Some(service) = &self.service {
            service.desired().register(SourceKind::Kubernetes).publish(routes);
        }
    }

    pub(super) fn view(&self) -> Option<View> {
        self.service.as_ref().map(Service::view)
    }
}

/// Removes every route with bridge's protocol number, of an earlier configuration or an earlier run. Returns whether none is
/// left; failures are logged.
fn withdraw() -> bool {
    let done = withdrawal().and_then(|(observed, operations)| {
        let failures = carry_out(&operations)?;
        for (operation, reason) in &failures {
            tracing::error!(reason, "a route is left: {}", operation.show(&observed));
        }
        Ok((operations.len() - failures.len(), failures.is_empty()))
    });
    match done {
        Ok((count, complete)) => {
            if count > 0 {
                tracing::info!(count, "withdrew the routes: the configuration has no `routes`");
            }
            complete
        }
        Err(error) => {
            tracing::error!(%error, "cannot look for routes of an earlier configuration; the agent tries again");
            false
        }
    }
}
