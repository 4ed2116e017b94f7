//! The routes as the run loop keeps them: started, updated and withdrawn with the configuration.
//!
//! Wanted where the configuration has a section `routes`, whatever the role. When the agent ends, they stay.

use std::path::Path;

use tokio::sync::broadcast;

use crate::config::Config;
use crate::kernel::backoff::Backoff;
use crate::routes::{
    Change, DesiredRoute, Error, RouteEvent, Service, Setup, SourceKind, View, carry_out, withdrawal,
};

/// The routes, while they are wanted.
#[derive(Default)]
pub(super) struct Routing {
    service: Option<Service>,
    /// Routes of an earlier configuration could not be withdrawn.
    left: Backoff,
}

/// A configuration of which everything has been done that can fail.
pub(super) enum Prepared {
    /// The routes are not wanted.
    Unwanted,
    /// They are from now on.
    Started(Box<Service>),
    /// They were, and still are.
    Changed(Box<Change>),
}

impl Routing {
    /// Performs every step that can fail, without changing the active state. (A new service begins when the run loop
    /// next waits, and never if it is dropped before.)
    pub(super) fn prepare(
        &self,
        config: &Config,
        state: &Path,
        happenings: &broadcast::Sender<RouteEvent>,
    ) -> Result<Prepared, Error> {
        if config.routes.is_none() {
            return Ok(Prepared::Unwanted);
        }
        let setup = Setup::from_config(config, state)?;
        Ok(match &self.service {
            Some(service) => Prepared::Changed(Box::new(service.prepare(setup)?)),
            None => Prepared::Started(Box::new(Service::start(setup, happenings.clone())?)),
        })
    }

    /// Applies a prepared configuration.
    pub(super) fn commit(&mut self, prepared: Prepared) {
        match (prepared, &mut self.service) {
            (Prepared::Unwanted, service) => {
                // Its tasks end with it, so that nothing is put back.
                *service = None;
                self.left.note(withdraw());
                return;
            }
            (Prepared::Changed(change), Some(service)) => service.commit(*change),
            (Prepared::Started(service), _) => self.service = Some(*service),
            (Prepared::Changed(_), None) => unreachable!("a change is prepared by a service that is there"),
        }
        self.left = Backoff::default();
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
