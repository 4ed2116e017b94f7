//! A packet filter as the run loop keeps it: started, updated and taken down with the configuration.

use std::{fmt, num::NonZeroU32, sync::Arc};

use crate::{
    config::{Config, PoolScope, Save, Scope},
    firewall::{Counts, Firewall, Options, Remains},
    interfaces::Selection,
    model::Policy,
    state::ActivePolicy,
};

/// A kind of packet filter: applied rules, and the watch over them.
pub(in crate::agent) trait Engine: Sized {
    /// Its section of the configuration.
    type Section: Clone + fmt::Debug + PartialEq;
    /// Writes the rules.
    type Driver: Firewall<Error = Self::Error>;
    /// A failure, with a remedy.
    type Error: fmt::Display;
    const NAME: &'static str;

    fn section(config: &Config) -> Self::Section;

    fn settings(config: &Config) -> Settings<Self::Section> {
        let (scope, save) = (config.enforcement.scope, config.persistence.save);
        Settings { scope, selection: Selection::of(config), save, section: Self::section(config) }
    }

    /// Opens a driver for rules that are not on trial.
    fn driver(settings: &Settings<Self::Section>) -> Result<Self::Driver, Self::Error>;

    /// Applies the rules of `policy` and watches them, after `former` was stopped.
    fn start(
        settings: &Settings<Self::Section>,
        policy: Policy,
        on_trial: bool,
        former: Option<&mut Self>,
    ) -> Result<Self, Self::Error>;

    /// Applies another policy; the former one stays active if it is refused.
    fn update(&self, policy: Policy) -> Result<(), Self::Error>;

    /// Whether updates are saved for the boot from now on.
    fn set_saving(&self, enabled: bool);

    /// Returns the applied policy.
    fn policy(&self) -> Arc<Policy>;

    /// Returns a reader of the rules' counters.
    fn counts(&self) -> Arc<Counts>;

    /// Whether the watch goes on.
    fn watches(&self) -> bool;

    /// Ends the watch and leaves the rules.
    fn stop(&mut self);

    /// Ends the watch and removes every rule.
    fn teardown(self) -> Remains<Self::Error>;

    /// Begins, or ends, to compare with eBPF. Returns whether it has begun.
    fn compare(&self, begin: bool) -> bool;

    /// Begins to compare with eBPF; the caller need not wait for the counters. Returns whether it begins.
    fn compare_soon(&self) -> bool {
        self.compare(true)
    }
}

/// All of the configuration but the rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::agent) struct Settings<S> {
    scope: Scope,
    /// Which interfaces lead where.
    pub(super) selection: Selection,
    save: Save,
    pub(super) section: S,
}

impl<S> Settings<S> {
    /// Returns whether rules are saved for the boot. A policy on trial never is: after a reboot no agent would roll it
    /// back.
    pub(super) fn saves(&self, on_trial: bool) -> bool {
        self.save == Save::Auto && !on_trial
    }

    /// Options of the rules; `log_rate` is in packets per second, 0: none is logged.
    pub(super) fn options(&self, mark: NonZeroU32, log_rate: u32) -> Options {
        let log_per_second = NonZeroU32::new(log_rate);
        Options { scope: self.scope, mark, log_per_second, ..Options::default() }
    }
}

/// The engine, while it is wanted.
#[derive(Debug)]
pub(in crate::agent) struct Filter<E: Engine> {
    pub(super) engine: E,
    pub(super) settings: Settings<E::Section>,
    /// The port pool of the configuration, which the rules know nothing of.
    pub(super) pool: Option<PoolScope>,
    /// Whether eBPF is beside it.
    pub(super) compares: bool,
    /// Why `auto` has taken it, if it has.
    pub(super) chosen: Option<String>,
}

/// Applied rules, for a roll-back.
#[derive(Debug)]
pub(in crate::agent) struct Applied<S> {
    policy: Policy,
    settings: Settings<S>,
    pool: Option<PoolScope>,
}

impl<E: Engine> Filter<E> {
    pub(super) fn start(config: &Config, on_trial: bool) -> Result<Self, E::Error> {
        let settings = E::settings(config);
        let engine = E::start(&settings, config.policy(), on_trial, None)?;
        Ok(Self { engine, settings, pool: config.pool_scope(), compares: false, chosen: None })
    }

    /// Applies another configuration; the former one stays active if it is refused.
    pub(super) fn reload(&mut self, config: &Config, on_trial: bool) -> Result<(), E::Error> {
        let wanted = E::settings(config);
        if self.settings == wanted {
            self.engine.set_saving(wanted.saves(on_trial));
            self.engine.update(config.policy())?;
        } else {
            let before = self.applied();
            if let Err(error) = self.replace(wanted, config.policy(), on_trial) {
                self.rollback(before);
                return Err(error);
            }
        }
        self.pool = config.pool_scope();
        Ok(())
    }

    /// Starts again with other settings.
    fn replace(
        &mut self,
        next: Settings<E::Section>,
        policy: Policy,
        on_trial: bool,
    ) -> Result<(), E::Error> {
        // It would take the next one's changes for damage.
        self.engine.stop();
        self.engine = E::start(&next, policy, on_trial, Some(&mut self.engine))?;
        self.settings = next;
        Ok(())
    }

    /// Returns a reader of the rules' counters.
    pub(super) fn counts(&self) -> Arc<Counts> {
        self.engine.counts()
    }

    /// Returns the applied policy, and the port pool of the same configuration.
    pub(super) fn active(&self) -> ActivePolicy {
        ActivePolicy { policy: self.engine.policy(), pool: self.pool.clone(), local: Vec::new() }
    }

    /// Returns the applied state, for a roll-back.
    pub(super) fn applied(&self) -> Applied<E::Section> {
        Applied {
            policy: Policy::clone(&self.engine.policy()),
            settings: self.settings.clone(),
            pool: self.pool.clone(),
        }
    }

    /// Rolls back to a former state.
    pub(super) fn rollback(&mut self, before: Applied<E::Section>) {
        let Applied { policy, settings, pool } = before;
        self.pool = pool;
        // The former state is never on trial: while one is, no other is applied.
        let result = if self.engine.watches() && self.settings == settings {
            self.engine.set_saving(settings.saves(false));
            self.engine.update(policy)
        } else {
            self.replace(settings, policy, false)
        };
        if let Err(error) = result {
            tracing::error!(%error, engine = E::NAME, "the rules are not those of the active configuration");
        }
    }

    /// Begins, or ends, to compare with eBPF.
    pub(super) fn compare(&mut self, begin: bool) {
        self.compares = self.engine.compare(begin);
    }

    /// Begins to compare with eBPF, after the caller has gone on.
    pub(super) fn compare_soon(&mut self) {
        self.compares = self.engine.compare_soon();
    }
}
