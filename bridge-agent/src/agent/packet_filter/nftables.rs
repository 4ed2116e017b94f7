//! The nftables engine as the run loop keeps it: started, updated and taken down with the configuration.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{
    filter::{self, Engine, Filter},
    surroundings::{self, Misled},
};
use crate::{
    config::{self, Config},
    firewall::{Counts, Remains},
    kernel::clock,
    model::Policy,
    nftables::{
        self, Error, Nftables, Programs,
        save::Saving,
        watch::{self, Guard},
    },
    state::{DivergenceStatus, FirewallStatus},
};

/// Between two messages about packets that only nftables denied.
const PAUSE: Duration = Duration::from_secs(10);

/// The rules, and the watch over them.
#[derive(Debug)]
pub(in crate::agent) struct Watched {
    guard: Guard,
    counts: Arc<Counts>,
    /// Packets that only nftables denied: how many were reported, and when the next report may be.
    reported: (u64, Instant),
    misled: Misled,
}

type Settings = filter::Settings<config::Nftables>;

impl Settings {
    fn driver(&self, on_trial: bool) -> nftables::Config {
        nftables::Config {
            options: self.options(self.section.mark.get(), self.section.log_rate),
            programs: Programs::default(),
            saving: Saving { enabled: self.saves(on_trial), ..Saving::default() },
        }
    }
}

/// The driver as the configuration has it.
pub fn settings(config: &Config) -> nftables::Config {
    Watched::settings(config).driver(false)
}

impl Engine for Watched {
    type Section = config::Nftables;
    type Driver = Nftables;
    type Error = Error;
    const NAME: &'static str = "nftables";

    fn section(config: &Config) -> Self::Section {
        config.enforcement.nftables
    }

    fn driver(settings: &Settings) -> Result<Nftables, Error> {
        Nftables::new(settings.driver(false))
    }

    fn start(
        settings: &Settings,
        policy: Policy,
        on_trial: bool,
        former: Option<&mut Self>,
    ) -> Result<Self, Error> {
        let firewall = Nftables::new(settings.driver(on_trial))?;
        let counts = Arc::new(Counts::of(Nftables::new(settings.driver(on_trial))?));
        let (surveyor, misled) = surroundings::surveyor(&settings.selection)
            .map_err(|source| Error::Kernel { request: "read the interfaces of this host".into(), source })?;
        let guard = Guard::start(firewall, policy, Some(surveyor))?;
        tracing::info!(table = nftables::TABLE, "nftables rules active");
        Ok(match former {
            None => Self { guard, counts, reported: (0, Instant::now()), misled },
            Some(former) => Self {
                guard: guard.after(watch::Status { failure: None, ..former.guard.status() }),
                counts,
                reported: former.reported,
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
}

impl Filter<Watched> {
    pub(super) fn report(&mut self) {
        let denied = self.engine.guard.status().denied;
        // Packets that connection tracking calls invalid are often late packets of a flow that has ended.
        let others = denied.iter().filter(|(reason, _)| *reason != "bridge:invalid");
        let packets: u64 = others.map(|(_, packets)| packets).sum();
        let (reported, next) = self.engine.reported;
        if !self.compares || packets <= reported || Instant::now() < next {
            return;
        }
        tracing::warn!(
            packets = packets - reported,
            by = ?denied,
            "nftables has denied packets that eBPF let through: see `bridge-agent status`, and whether eBPF is attached to \
             every interface that pods and LAN hosts are behind"
        );
        self.engine.reported = (packets, Instant::now() + PAUSE);
    }

    pub(super) fn status(&self) -> FirewallStatus {
        let seen = self.engine.guard.status();
        let (repaired, last_repair) = seen.last_repair.unzip();
        FirewallStatus {
            engine: "nftables".into(),
            backend: format!("inet {}", nftables::TABLE),
            chosen: None,
            repairs: seen.repairs,
            last_repair,
            last_repair_time: repaired.map(clock::at),
            failure: seen.failure.or_else(|| self.engine.misled.why()),
            divergence: self
                .compares
                .then(|| DivergenceStatus { denied_by_nftables: seen.denied, ..DivergenceStatus::default() }),
        }
    }
}
