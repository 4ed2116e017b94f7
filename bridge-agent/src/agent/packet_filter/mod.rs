//! The engine beside eBPF, or in its place: the kernel's own packet filter, by iptables or by nftables.

mod filter;
mod iptables;
mod kind;
mod leftovers;
mod nftables;
mod part;
mod surroundings;

use std::sync::Arc;

use crate::{
    config::{self, Config, Engine, Role},
    datapath::{Maps, Verdict},
    firewall::Counts,
    iptables as by_iptables, nftables as by_nftables,
    state::{ActivePolicy, FirewallStatus},
};

use filter::Filter;
pub use iptables::settings;
pub use kind::Kind;
use leftovers::{Left, Leftovers};
pub use nftables::settings as nftables_settings;
pub(super) use part::Filters;

/// Why an engine cannot do its work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// iptables.
    #[error(transparent)]
    Iptables(#[from] by_iptables::Error),
    /// nftables.
    #[error(transparent)]
    Nftables(#[from] by_nftables::Error),
    /// Two agents would each take the other's rules for damage.
    #[error(
        "another agent, process {0}, keeps the rules of the packet filter in this network namespace: stop it first, or leave \
         iptables and nftables out of `enforcement.engines` here"
    )]
    Taken(i32),
}

/// The engine, while it is wanted.
#[derive(Debug)]
pub(super) enum PacketFilter {
    Iptables(Filter<iptables::Watched>),
    Nftables(Filter<nftables::Watched>),
}

/// Applied rules, for a roll-back.
#[derive(Debug)]
enum Applied {
    Iptables(filter::Applied<config::Iptables>),
    Nftables(filter::Applied<config::Nftables>),
}

fn is_wanted(config: &Config) -> bool {
    config.role == Role::Node && config.enforcement.engines.iter().any(|engine| *engine != Engine::Ebpf)
}

/// Checks the size of the policy, if an engine is wanted, before anything is written.
fn check(config: &Config) -> Result<(), Error> {
    match Kind::of(config) {
        None => {}
        Some(Kind::Iptables) => by_iptables::check(&config.policy())?,
        Some(Kind::Nftables) => by_nftables::check(&config.policy())?,
    }
    Ok(())
}

impl PacketFilter {
    /// Applies the rules; `None` if the configuration wants none.
    fn start(config: &Config, on_trial: bool) -> Result<Option<Self>, Error> {
        let chosen = Kind::chosen(config);
        let kind = chosen.as_ref().map(|(kind, _)| *kind).or_else(|| Kind::of(config));
        let mut started = match kind {
            None => return Ok(None),
            Some(Kind::Iptables) => Self::Iptables(Filter::start(config, on_trial)?),
            Some(Kind::Nftables) => Self::Nftables(Filter::start(config, on_trial)?),
        };
        started.set_chosen(chosen.map(|(_, why)| why));
        Ok(Some(started))
    }

    const fn kind(&self) -> Kind {
        match self {
            Self::Iptables(_) => Kind::Iptables,
            Self::Nftables(_) => Kind::Nftables,
        }
    }

    /// Whether a configuration wants this packet filter. `auto` keeps the present one.
    fn is_of(&self, config: &Config) -> bool {
        let engines = &config.enforcement.engines;
        is_wanted(config) && (engines.contains(&Engine::Auto) || Kind::of(config) == Some(self.kind()))
    }

    /// Applies another configuration; the former one stays active if it is refused.
    pub(super) fn reload(&mut self, config: &Config, on_trial: bool) -> Result<(), Error> {
        match self {
            Self::Iptables(filter) => filter.reload(config, on_trial)?,
            Self::Nftables(filter) => filter.reload(config, on_trial)?,
        }
        self.set_chosen(match Kind::chosen(config) {
            Some((kind, why)) if kind == self.kind() => Some(why),
            Some(_) => Some("it was active before; a restart chooses again".into()),
            None => None,
        });
        Ok(())
    }

    /// Notes why `auto` has taken this packet filter, if it has.
    fn set_chosen(&mut self, why: Option<String>) {
        match self {
            Self::Iptables(filter) => filter.chosen = why,
            Self::Nftables(filter) => filter.chosen = why,
        }
    }

    /// Returns a reader of the rules' counters.
    pub(super) fn counts(&self) -> Arc<Counts> {
        match self {
            Self::Iptables(filter) => filter.counts(),
            Self::Nftables(filter) => filter.counts(),
        }
    }

    /// Returns the policy of the rules.
    pub(super) fn active(&self) -> ActivePolicy {
        match self {
            Self::Iptables(filter) => filter.active(),
            Self::Nftables(filter) => filter.active(),
        }
    }

    /// Returns the active state, for a roll-back.
    fn applied(&self) -> Applied {
        match self {
            Self::Iptables(filter) => Applied::Iptables(filter.applied()),
            Self::Nftables(filter) => Applied::Nftables(filter.applied()),
        }
    }

    /// Rolls back to a former state of the same engine.
    fn rollback(&mut self, before: Applied) {
        match (self, before) {
            (Self::Iptables(filter), Applied::Iptables(before)) => filter.rollback(before),
            (Self::Nftables(filter), Applied::Nftables(before)) => filter.rollback(before),
            _ => tracing::error!("the rules are not those of the active configuration"),
        }
    }

    /// Begins, or ends, to compare with eBPF.
    pub(super) fn compare(&mut self, begin: bool) {
        match self {
            Self::Iptables(filter) => filter.compare(begin),
            Self::Nftables(filter) => filter.compare(begin),
        }
    }

    /// Begins to compare with eBPF; the caller need not wait for the counters.
    pub(super) fn compare_soon(&mut self) {
        match self {
            Self::Iptables(filter) => filter.compare_soon(),
            Self::Nftables(filter) => filter.compare_soon(),
        }
    }

    /// Records the verdict of eBPF on a packet.
    pub(super) fn judged_by_ebpf(&self, verdict: &Verdict) {
        if let Self::Iptables(filter) = self {
            filter.judged_by_ebpf(verdict);
        }
    }

    /// Logs the result of the comparison.
    pub(super) fn report(&mut self, maps: Option<&Maps>) {
        match self {
            Self::Iptables(filter) => filter.report(maps),
            Self::Nftables(filter) => filter.report(),
        }
    }

    pub(super) fn status(&self) -> FirewallStatus {
        let (status, chosen) = match self {
            Self::Iptables(filter) => (filter.status(), &filter.chosen),
            Self::Nftables(filter) => (filter.status(), &filter.chosen),
        };
        FirewallStatus { chosen: chosen.clone(), ..status }
    }

    /// Removes every rule. Failures are logged; `leftovers` notes the remains.
    fn take_down(self, leftovers: &mut Leftovers) {
        match self {
            Self::Iptables(filter) => leftovers.iptables = Left::of(filter),
            Self::Nftables(filter) => leftovers.nftables = Left::of(filter),
        }
    }
}
