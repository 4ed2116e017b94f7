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
    firewall::{Counts, Remains},
    iptables::{
        self, Error, Iptables, Programs,
        save::Saving,
        watch::{self, Guard},
    },
    kernel::clock,
    model::Policy,
    state::FirewallStatus,
};

/// The rules, and the watch over them.
#[derive(Debug)]
pub(in crate::agent) struct Watched {
    guard: Guard,
    counts: Arc<Counts>,
    backend: String,
    reporter: Reporter,
    misled: Misled,
}

type Settings = filter::Settings<config::Iptables>;

impl Settings {
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
    Watched::settings(config).driver(false)
}

impl Engine for Watched {
    type Section = config::Iptables;
    type Driver = Iptables;
    type Error = Error;
    const NAME: &'static str = "iptables";

    fn section(config: &Config) -> Self::Section {
        config.enforcement.iptables
    }

    fn driver(settings: &Settings) -> Result<Iptables, Error> {
        Iptables::new(settings.driver(false))
    }

    fn start(
        settings: &Settings,
        policy: Policy,
        on_trial: bool,
        former: Option<&mut Self>,
    ) -> Result<Self, Error> {
        let firewall = Iptables::new(settings.driver(on_trial))?;
        let backend = firewall.choice().backend.name().to_owned();
        let counts = Arc::new(Counts::of(firewall.reader()));
        let (surveyor, misled) = surroundings::surveyor(&settings.selection)
            .map_err(|source| Error::Kernel { request: "read the interfaces of this host".into(), source })?;
        let guard = Guard::start_with(firewall, policy, Some(surveyor))?;
        tracing::info!(backend, "iptables rules active");
        Ok(match former {
            None => Self { guard, counts, backend, reporter: Reporter::default(), misled },
            Some(former) => Self {
                guard: guard.after(watch::Status { failure: None, ..former.guard.status() }),
                counts,
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

    fn counts(&self) -> Arc<Counts> {
        Arc::clone(&self.counts)
    }

    fn watches(&self) -> bool {
        self.guard.watches()
    }

    fn stop(&mut self) {
        self.guard.stop();
    }

    fn teardown(self) -> Remains<Error> {
        self.guard.teardown()
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
}
