//! The nftables engine as the run loop keeps it: started, updated and taken down with the configuration.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::surroundings;
use crate::{
    config::{self, Config, Save, Scope},
    firewall::{Firewall, Remains},
    interfaces::Selection,
    kernel::clock,
    model::Policy,
    nftables::{
        self, Error, Nftables, Options, Programs,
        save::Saving,
        watch::{self, Guard},
    },
    state::{DivergenceStatus, FirewallStatus},
};

/// Between two messages about packets that only nftables denied.
const PAUSE: Duration = Duration::from_secs(10);

/// The engine, while it is wanted.
#[derive(Debug)]
pub(in crate::agent) struct Filter {
    guard: Guard,
    settings: Settings,
    /// Whether eBPF is beside it.
    compares: bool,
    /// Packets that only nftables denied: how many were reported, and when the next report may be.
    reported: (u64, Instant),
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
    section: config::Nftables,
}

impl Settings {
    /// Returns whether rules are saved for the boot. A policy on trial never is: after a reboot no agent would roll it
    /// back.
    fn saves(&self, on_trial: bool) -> bool {
        self.save == Save::Auto && !on_trial
    }

    fn of(config: &Config) -> Self {
        Self {
            scope: config.enforcement.scope,
            selection: surroundings::selection(config),
            save: config.persistence.save,
            section: config.enforcement.nftables,
        }
    }

    fn driver(&self, on_trial: bool) -> nftables::Config {
        nftables::Config {
            options: Options {
                scope: self.scope,
                mark: self.section.mark.get(),
                log_per_second: NonZeroU32::new(self.section.log_rate),
                ..Options::default()
            },
            programs: Programs::default(),
            saving: Saving { enabled: self.saves(on_trial), ..Saving::default() },
        }
    }
}

/// The driver as the configuration has it.
pub fn settings(config: &Config) -> nftables::Config {
    Settings::of(config).driver(false)
}

/// Removes rules that an earlier run has left.
pub(super) fn remove_leftovers(config: &Config) {
    if let Ok(mut firewall) = Nftables::new(settings(config)) {
        log(firewall.teardown());
    }
}

fn log(remains: Remains<Error>) {
    for note in remains.notes {
        tracing::info!("{note}");
    }
    for error in remains.errors {
        tracing::error!(%error, "nftables rules are left");
    }
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
        let firewall = Nftables::new(settings.driver(on_trial))?;
        let surveyor = surroundings::surveyor(&settings.selection)
            .map_err(|source| Error::Kernel { request: "read the interfaces of this host".into(), source })?;
        let guard = Guard::start(firewall, policy, Some(surveyor))?.after(before);
        tracing::info!(table = nftables::TABLE, "nftables rules active");
        Ok(Self { guard, settings, compares: false, reported: (0, Instant::now()) })
    }

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

    /// Returns the applied policy.
    pub(super) fn policy(&self) -> Arc<Policy> {
        self.guard.policy()
    }

    /// With another driver.
    fn replace(&mut self, next: Settings, policy: Policy, on_trial: bool) -> Result<(), Error> {
        // It would take the new driver's changes for damage.
        self.guard.stop();
        let before = watch::Status { failure: None, ..self.guard.status() };
        let Self { guard, .. } = Self::enforce(next.clone(), policy, before, on_trial)?;
        (self.guard, self.settings) = (guard, next);
        Ok(())
    }

    pub(super) fn applied(&self) -> Applied {
        Applied { policy: Policy::clone(&self.guard.policy()), settings: self.settings.clone() }
    }

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
            tracing::error!(%error, "the nftables rules are not those of the active configuration");
        }
    }

    pub(super) fn compare(&mut self, begin: bool) {
        self.compares = self.guard.compare(begin);
    }

    pub(super) fn report(&mut self) {
        let denied = self.guard.status().denied;
        // Packets that connection tracking calls invalid are often late packets of a flow that has ended.
        let others = denied.iter().filter(|(reason, _)| *reason != "bridge:invalid");
        let packets: u64 = others.map(|(_, packets)| packets).sum();
        let (reported, next) = self.reported;
        if !self.compares || packets <= reported || Instant::now() < next {
            return;
        }
        tracing::warn!(
            packets = packets - reported,
            by = ?denied,
            "nftables has denied packets that eBPF let through: see `bridge-agent status`, and whether eBPF is attached to \
             every interface that pods and LAN hosts are behind"
        );
        self.reported = (packets, Instant::now() + PAUSE);
    }

    pub(super) fn status(&self) -> FirewallStatus {
        let seen = self.guard.status();
        let (repaired, last_repair) = seen.last_repair.unzip();
        FirewallStatus {
            engine: "nftables".into(),
            backend: format!("inet {}", nftables::TABLE),
            repairs: seen.repairs,
            last_repair,
            last_repair_time: repaired.map(clock::at),
            failure: seen.failure,
            divergence: self
                .compares
                .then(|| DivergenceStatus { denied_by_nftables: seen.denied, ..DivergenceStatus::default() }),
        }
    }

    pub(super) fn take_down(self) {
        log(self.guard.teardown());
    }
}
