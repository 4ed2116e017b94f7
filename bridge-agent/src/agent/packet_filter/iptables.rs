//! The iptables engine as the run loop keeps it: started, updated and taken down with the configuration.

use std::sync::Arc;

use super::{
    filter::{self, Engine, Filter},
    surroundings::{self, Misled},
};
use crate::{
    agent::divergence::{self, Reporter},
    config::{self, Backend, Config},
    datapath::{Maps, Verdict},
    firewall::{Firewall as _, Remains},
    iptables::{
        self, Error, Iptables, Programs,
        save::Saving,
        watch::{self, Guard},
    },
    kernel::{backoff::Backoff, clock},
    model::Policy,
    state::FirewallStatus,
};

/// The rules, and the watch over them.
#[derive(Debug)]
pub(in crate::agent) struct Watched {
    guard: Guard,
    backend: String,
    reporter: Reporter,
    misled: Misled,
}

type Settings = filter::Settings<config::Iptables>;

impl Settings {
    fn of(config: &Config) -> Self {
        Self::new(config, config.enforcement.iptables)
    }

    fn driver(&self, on_trial: bool) -> iptables::Config {
        let section = self.section;
        iptables::Config {
            options: self.options(section.mark.get(), section.log_rate),
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

impl Engine for Watched {
    type Section = config::Iptables;
    type Error = Error;
    const NAME: &'static str = "iptables";

    fn section(config: &Config) -> Self::Section {
        config.enforcement.iptables
    }

    fn start(
        settings: &Settings,
        policy: Policy,
        on_trial: bool,
        former: Option<&mut Self>,
    ) -> Result<Self, Error> {
        let firewall = Iptables::new(settings.driver(on_trial))?;
        let backend = firewall.choice().backend.name().to_owned();
        let (surveyor, misled) = surroundings::surveyor(&settings.selection)
            .map_err(|source| Error::Kernel { request: "read the interfaces of this host".into(), source })?;
        let guard = Guard::start_with(firewall, policy, Some(surveyor))?;
        tracing::info!(backend, "iptables rules active");
        Ok(match former {
            None => Self { guard, backend, reporter: Reporter::default(), misled },
            Some(former) => Self {
                guard: guard.after(watch::Status { failure: None, ..former.guard.status() }),
                backend,
                reporter: std::mem::take(&mut former.reporter),
                misled,
            },
        })
    }

    fn update(&self, policy: Policy) -> Result<(), Error> {
        self.guard.update(policy)
    }

    fn set_saving(&self, enabled: bool) {
        self.guard.set_saving(enabled);
    }

    fn policy(&self) -> Arc<Policy> {
        self.guard.policy()
    }

    fn watches(&self) -> bool {
        self.guard.watches()
    }

    fn stop(&mut self) {
        self.guard.stop();
    }

    fn compare(&self, begin: bool) -> bool {
        self.guard.compare(begin)
    }

    fn compare_soon(&self) -> bool {
        self.guard.compare_soon();
        true
    }
}

impl Filter<Watched> {
    /// Records the verdict of eBPF on a packet.
    pub(super) fn judged_by_ebpf(&self, verdict: &Verdict) {
        if self.compares
            && let Some(packet) = divergence::first_packet(verdict)
        {
            self.engine.guard.denied_by_ebpf(packet);
        }
    }

    /// Logs the result of the comparison.
    pub(super) fn report(&mut self, maps: Option<&Maps>) {
        if self.compares {
            let Watched { guard, reporter, .. } = &mut self.engine;
            reporter.report(&guard.status().divergence, guard, maps);
        }
    }

    pub(super) fn status(&self) -> FirewallStatus {
        let seen = self.engine.guard.status();
        let (repaired, last_repair) = seen.last_repair.unzip();
        FirewallStatus {
            engine: "iptables".into(),
            backend: self.engine.backend.clone(),
            chosen: None,
            repairs: seen.repairs,
            last_repair,
            last_repair_time: repaired.map(clock::at),
            failure: seen.failure.or_else(|| self.engine.misled.why()),
            divergence: self.compares.then(|| divergence::status(seen.divergence)),
        }
    }

    /// Removes every rule. Failures are logged; the remains are to be removed later.
    pub(super) fn take_down(self) -> Leftovers {
        let mut left = Leftovers { settings: Some(self.settings), again: Backoff::default() };
        left.note(self.engine.guard.teardown());
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
