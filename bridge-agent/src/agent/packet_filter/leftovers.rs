//! Rules of a packet filter that is no longer wanted, until they are removed.

use super::{
    filter::{Engine, Filter, Settings},
    iptables,
    kind::Kind,
    nftables,
};
use crate::{
    config::Config,
    firewall::{Firewall as _, Remains},
    kernel::backoff::Backoff,
};

/// Rules left in either packet filter.
#[derive(Debug, Default)]
pub(super) struct Leftovers {
    pub(super) iptables: Left<iptables::Watched>,
    pub(super) nftables: Left<nftables::Watched>,
}

impl Leftovers {
    /// Removes the rules that an earlier run has left in every packet filter but the active one.
    pub(super) fn of_earlier_run(config: &Config, active: Option<Kind>) -> Self {
        let mut left = Self::default();
        if active != Some(Kind::Iptables) {
            left.iptables = Left::of_earlier_run(config);
        }
        if active != Some(Kind::Nftables) {
            left.nftables = Left::of_earlier_run(config);
        }
        left
    }

    /// Keeps the rules of a packet filter that is wanted again.
    pub(super) fn forget(&mut self, kind: Kind) {
        match kind {
            Kind::Iptables => self.iptables = Left::default(),
            Kind::Nftables => self.nftables = Left::default(),
        }
    }

    /// Removes them, if it is time for another attempt.
    pub(super) fn try_again(&mut self) {
        self.iptables.try_again();
        self.nftables.try_again();
    }
}

/// Rules left in one packet filter.
#[derive(Debug)]
pub(super) struct Left<E: Engine> {
    /// Of the driver that wrote them; `None`: nothing is left.
    settings: Option<Settings<E::Section>>,
    again: Backoff,
}

impl<E: Engine> Default for Left<E> {
    fn default() -> Self {
        Self { settings: None, again: Backoff::default() }
    }
}

impl<E: Engine> Left<E> {
    fn of_earlier_run(config: &Config) -> Self {
        let settings = E::settings(config);
        // Without its programs nothing was ever written.
        let Ok(mut driver) = E::driver(&settings) else { return Self::default() };
        let present = driver.present();
        let left = Self::after(settings, driver.teardown());
        if let (Ok(Some(rules)), None) = (present, &left.settings) {
            tracing::info!(rules, "removed the rules that an earlier run left in {}", E::NAME);
        }
        left
    }

    /// Removes every rule. Failures are logged.
    pub(super) fn of(filter: Filter<E>) -> Self {
        Self::after(filter.settings, filter.engine.teardown())
    }

    fn after(settings: Settings<E::Section>, remains: Remains<E::Error>) -> Self {
        let mut left = Self { settings: Some(settings), again: Backoff::default() };
        left.note(remains);
        left
    }

    fn note(&mut self, remains: Remains<E::Error>) {
        for note in remains.notes {
            tracing::info!("{note}");
        }
        let first = self.again == Backoff::default();
        self.again.note(remains.errors.is_empty());
        for error in remains.errors {
            if first {
                tracing::error!(%error, "{} rules are left; the agent tries again", E::NAME);
            } else {
                tracing::debug!(%error, "{} rules are still left", E::NAME);
            }
        }
        if self.again == Backoff::default() {
            self.settings = None;
        }
    }

    fn try_again(&mut self) {
        let Some(settings) = self.settings.as_ref().filter(|_| self.again.is_due()) else { return };
        match E::driver(settings) {
            Ok(mut driver) => self.note(driver.teardown()),
            Err(error) => self.note(Remains { notes: Vec::new(), errors: vec![error] }),
        }
        if self.settings.is_none() {
            tracing::info!("removed the {} rules that were left", E::NAME);
        }
    }
}
