//! The iptables engine as the run loop keeps it: started, updated and taken down with the configuration.

use std::num::NonZeroU32;
use std::sync::Arc;

use super::surroundings;
use crate::{
    agent::divergence::{self, Reporter},
    config::{self, Backend, Config, Enforcement, Save, Scope},
    datapath::{Maps, Verdict},
    firewall::{Firewall as _, Remains},
    interfaces::Selection,
    iptables::{
        self, Error, Iptables, Programs,
        render::Options,
        save::Saving,
        watch::{self, Guard},
    },
    kernel::{backoff::Backoff, clock},
    model::Policy,
    state::FirewallStatus,
};

/// The engine, while it is wanted.
#[derive(Debug)]
pub(in crate::agent) struct Filter {
    guard: Guard,
    backend: String,
    /// Settings of the driver.
    settings: Settings,
    /// Whether eBPF is beside it.
    compares: bool,
    reporter: Reporter,
}

/// Applied rules, for a roll-back.
#[derive(Debug)]
pub(in crate::agent) struct Applied {
    policy: Policy,
    settings: Settings,
}

/// All of the configuration but the rules.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Settings {
    scope: Scope,
    /// Which interfaces lead where.
    selection: Selection,
    save: Save,
    section: config::Iptables,
}

impl Settings {
    /// Returns whether rules are saved for the boot. A policy on trial never is: after a reboot no agent would roll it
    /// back.
    fn saves(&self, on_trial: bool) -> bool {
        self.save == Save::Auto && !on_trial
    }

    fn of(config: &Config) -> Self {
        let Enforcement { scope, iptables: section, .. } = &config.enforcement;
        let selection = surroundings::selection(config);
        Self { scope: *scope, selection, save: config.persistence.save, section: *section }
    }

    fn driver(&self, on_trial: bool) -> iptables::Config {
        let section = self.section;
        iptables::Config {
            options: Options {
                scope: self.scope,
                mark: section.mark.get(),
                log_per_second: NonZeroU32::new(section.log_rate),
                ..Options::default()
            },
            programs: Programs { lock_wait: section.lock_wait.duration(), ..Programs::default() },
            backend: match section.backend {
                Backend::Auto => None,
                Backend::Nft => Some(iptables::Backend::Nft),
                Backend::Legacy => Some(iptables::Backend::Legacy),
            },
            saving: Saving { enabled: self.saves(on_trial), ..Saving::default() },
        }
    }
}

/// The driver as the configuration has it.
pub fn settings(config: &Config) -> iptables::Config {
    Settings::of(config).driver(false)
}

/// Removes rules that an earlier run has left.
pub(super) fn remove_leftovers(config: &Config) -> Leftovers {
    let mut left = Leftovers { settings: Some(Settings::of(config)), again: Backoff::default() };
    match Iptables::new(settings(config)) {
        Ok(mut firewall) => left.note(firewall.teardown()),
        // Without iptables nothing was ever written.
        Err(_) => left.settings = None,
    }
    left
}

impl Filter {
    pub(super) fn start(config: &Config, on_trial: bool) -> Result<Self, Error> {
        Self::enforce(Settings::of(config), config.policy(), watch::Status::default(), on_trial)
    }

    fn enforce(
        settings: Settings,
        policy: Policy,
        before: watch::Status,
        on_trial: bool,
    ) -> Result<Self, Error> {
        let firewall = Iptables::new(settings.driver(on_trial))?;
        let backend = firewall.choice().backend.name().to_owned();
        let surveyor = surroundings::surveyor(&settings.selection)
            .map_err(|source| Error::Kernel { request: "read the interfaces of this host".into(), source })?;
        let guard = Guard::start_with(firewall, policy, Some(surveyor))?.after(before);
        tracing::info!(backend, "iptables rules active");
        Ok(Self { guard, backend, settings, compares: false, reporter: Reporter::default() })
    }

    /// Applies another configuration; the former one stays active if it is refused.
    pub(super) fn reload(&mut self, config: &Config, on_trial: bool) -> Result<(), Error> {
        let wanted = Settings::of(config);
        if self.settings == wanted {
            self.guard.set_saving(wanted.saves(on_trial));
            return self.guard.update(config.policy());
        }
        let before = self.applied();
        let result = self.replace(wanted, config.policy(), on_trial);
        if result.is_err() {
            self.rollback(before);
        }
        result
    }

    /// With another driver.
    fn replace(&mut self, next: Settings, policy: Policy, on_trial: bool) -> Result<(), Error> {
        // It would take the new driver's changes for damage.
        self.guard.stop();
        let before = watch::Status { failure: None, ..self.guard.status() };
        let Self { guard, backend, .. } = Self::enforce(next.clone(), policy, before, on_trial)?;
        (self.guard, self.backend, self.settings) = (guard, backend, next);
        Ok(())
    }

    /// Returns the applied policy.
    pub(super) fn policy(&self) -> Arc<Policy> {
        self.guard.policy()
    }

    /// Returns the active state, for a roll-back.
    pub(super) fn applied(&self) -> Applied {
        Applied { policy: Policy::clone(&self.guard.policy()), settings: self.settings.clone() }
    }

    /// Rolls back to a former state.
    pub(super) fn rollback(&mut self, before: Applied) {
        let Applied { policy, settings } = before;
        // The former state is never on trial: while one is, no other is applied.
        let result = if self.guard.watches() && self.settings == settings {
            self.guard.set_saving(settings.saves(false));
            self.guard.update(policy)
        } else {
            self.replace(settings, policy, false)
        };
        if let Err(error) = result {
            tracing::error!(%error, "the iptables rules are not those of the active configuration");
        }
    }

    /// Begins, or ends, to compare with eBPF; see [`Guard::compare`].
    pub(super) fn compare(&mut self, begin: bool) {
        self.compares = self.guard.compare(begin);
    }

    /// Records the verdict of eBPF on a packet.
    pub(super) fn judged_by_ebpf(&self, verdict: &Verdict) {
        if self.compares
            && let Some(packet) = divergence::first_packet(verdict)
        {
            self.guard.denied_by_ebpf(packet);
        }
    }

    /// Logs the result of the comparison.
    pub(super) fn report(&mut self, maps: Option<&Maps>) {
        if self.compares {
            self.reporter.report(&self.guard.status().divergence, &self.guard, maps);
        }
    }

    pub(super) fn status(&self) -> FirewallStatus {
        let seen = self.guard.status();
        let (repaired, last_repair) = seen.last_repair.unzip();
        FirewallStatus {
            engine: "iptables".into(),
            backend: self.backend.clone(),
            repairs: seen.repairs,
            last_repair,
            last_repair_time: repaired.map(clock::at),
            failure: seen.failure,
            divergence: self.compares.then(|| divergence::status(seen.divergence)),
        }
    }

    /// Removes every rule. Failures are logged; the remains are to be removed later.
    pub(super) fn take_down(self) -> Leftovers {
        let mut left = Leftovers { settings: Some(self.settings), again: Backoff::default() };
        left.note(self.guard.teardown());
        left
    }
}

/// Rules of an engine that is no longer wanted.
#[derive(Debug, Default)]
pub(in crate::agent) struct Leftovers {
    settings: Option<Settings>,
    again: Backoff,
}

impl Leftovers {
    fn note(&mut self, remains: Remains<Error>) {
        for note in remains.notes {
            tracing::info!("{note}");
        }
        let first = self.again == Backoff::default();
        self.again.note(remains.errors.is_empty());
        for error in remains.errors {
            if first {
                tracing::error!(%error, "iptables rules are left; the agent tries again");
            } else {
                tracing::debug!(%error, "iptables rules are still left");
            }
        }
        if self.again == Backoff::default() {
            self.settings = None;
        }
    }

    /// Removes them, if it is time for another attempt.
    pub(in crate::agent) fn try_again(&mut self) {
        let Some(settings) = self.settings.as_ref().filter(|_| self.again.is_due()) else { return };
        match Iptables::new(settings.driver(false)) {
            Ok(mut firewall) => self.note(firewall.teardown()),
            Err(error) => self.note(Remains { notes: Vec::new(), errors: vec![error] }),
        }
        if self.settings.is_none() {
            tracing::info!("removed the iptables rules that were left");
        }
    }
}
