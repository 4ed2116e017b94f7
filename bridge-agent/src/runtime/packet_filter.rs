//! The iptables engine as the run loop keeps it: started, updated and taken down with the configuration.

use serde::{Deserialize, Serialize};

use super::status;
use crate::{
    config::{Config, Engine, Role, Save, Scope},
    firewall::iptables::{self, Error, Iptables, render::Options, save::Saving, watch::Guard},
    model::Policy,
};

/// The iptables engine, as it says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FirewallStatus {
    /// `nft` or `legacy`.
    pub backend: String,
    /// How often rules that another program had changed were put back.
    pub repairs: u64,
    /// What had become of them the last time.
    pub last_repair: Option<String>,
    /// When that was; RFC 3339, UTC.
    pub last_repair_time: Option<String>,
    /// Why the rules could not be read or put back, if that is so now.
    pub failure: Option<String>,
}

/// The engine, while it is wanted.
#[derive(Debug)]
pub(super) struct PacketFilter {
    guard: Guard,
    backend: String,
    /// What the driver was made with.
    made_with: (Scope, Save),
}

pub(super) fn is_wanted(config: &Config) -> bool {
    config.role == Role::Node && config.enforcement.engines.contains(&Engine::Iptables)
}

/// The driver as the configuration has it.
pub fn settings(config: &Config) -> iptables::Config {
    iptables::Config {
        options: Options { scope: config.enforcement.scope, ..Options::default() },
        saving: Saving { enabled: config.persistence.save == Save::Auto, ..Saving::default() },
        ..iptables::Config::default()
    }
}

fn made_with(config: &Config) -> (Scope, Save) {
    (config.enforcement.scope, config.persistence.save)
}

impl PacketFilter {
    pub(super) fn start(config: &Config) -> Result<Self, Error> {
        let firewall = Iptables::new(settings(config))?;
        let backend = firewall.choice().backend.name().to_owned();
        let guard = Guard::start(firewall, config.policy())?;
        tracing::info!(backend, "iptables rules in force");
        Ok(Self { guard, backend, made_with: made_with(config) })
    }

    /// Puts another configuration in force; that of before stays if it is refused.
    pub(super) fn reload(&mut self, config: &Config) -> Result<(), Error> {
        if self.made_with == made_with(config) {
            return self.guard.update(config.policy());
        }
        *self = Self::start(config)?;
        Ok(())
    }

    /// The policy in force, to go back to.
    pub(super) fn policy(&self) -> Policy {
        self.guard.policy()
    }

    /// Goes back to a policy that was in force.
    pub(super) fn restore(&self, policy: Policy) {
        if let Err(error) = self.guard.update(policy) {
            tracing::error!(%error, "iptables and eBPF have different policies");
        }
    }

    pub(super) fn status(&self) -> FirewallStatus {
        let seen = self.guard.status();
        let (time, last_repair) = seen.last_repair.unzip();
        FirewallStatus {
            backend: self.backend.clone(),
            repairs: seen.repairs,
            last_repair,
            last_repair_time: time.map(status::at),
            failure: seen.failure,
        }
    }

    /// Removes every rule. What cannot be removed is logged: nothing else hinders going on.
    pub(super) fn take_down(self) {
        let remains = self.guard.teardown();
        for note in remains.notes {
            tracing::info!("{note}");
        }
        for error in remains.errors {
            tracing::error!(%error, "iptables rules are left");
        }
    }
}
