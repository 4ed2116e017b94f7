//! The pool in figures.

use bridge_common::pool::{Refusal, counter};
use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{backend::Backend, held::Held, kernel::KernelPoolError, tables::lock};

/// The pool in figures.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "PoolSummary")]
pub struct Summary {
    /// `kernel`, or `userspace` where the kernel cannot hold the pool.
    pub mode: String,
    /// The ports, as ranges.
    pub ports: Vec<String>,
    /// How many ports there are towards each destination.
    pub available: u32,
    /// Connections to these networks use the pool.
    #[schemars(with = "Vec<String>")]
    pub destinations: Vec<IpNet>,
    /// Ports in use, over all destinations.
    pub held: u64,
    /// Ports that only the network namespace that used them last may have yet, over all destinations.
    pub warm: u64,
    /// Ports in use towards the one destination that has most of them.
    #[serde(default)]
    pub busiest: u64,
    /// Counters of the hooks; all 0 without them.
    pub counters: Counters,
    /// Counters of leases for explicit clients.
    pub leases: Leases,
    /// Pods that take part because they say so.
    #[serde(default)]
    pub pods: Pods,
    /// How often the agent put `table inet bridge-pool` back after another program had removed or changed it.
    #[serde(default)]
    pub masquerade_repairs: u64,
    /// Faults of the pool's surroundings, with the remedy.
    pub warnings: Vec<String>,
}

/// Pods of this node that bear the annotation `bridge.lan/port-pool: transparent`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "PoolPods")]
pub struct Pods {
    /// Their connections come from ports of the pool.
    pub hooked: usize,
    /// Their control group is not there: not yet, or no more; or not in version 2 of control groups.
    pub waiting: usize,
}

/// Counters of the hooks since they were first loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "PoolCounters")]
pub struct Counters {
    /// Ports claimed, taken over from a lease included.
    pub claims: u64,
    /// Ports given back.
    pub releases: u64,
    /// Claims of a port that the program had bound itself.
    pub adoptions: u64,
    /// Binds that the kernel refused, because of a socket outside the pool.
    pub bind_retries: u64,
    /// Events that were not written.
    pub events_lost: u64,
    /// Ports that began to rest: in TIME_WAIT at a peer without TCP timestamps.
    #[serde(default)]
    pub rests: u64,
    /// Connects that the kernel refused after the pool had bound a port.
    #[serde(default)]
    pub connect_failures: u64,
    /// Ports that should have rested, and did not: their control group had as many at rest as it may.
    #[serde(default)]
    pub rests_denied: u64,
    /// Connects that were refused.
    pub refusals: Refusals,
}

/// Counters of leases for explicit clients, since the agent started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "PoolLeases")]
pub struct Leases {
    /// Leases that are not over.
    pub held: u64,
    /// Ports leased.
    pub acquired: u64,
    /// Leases that are over, in whatever way.
    pub released: u64,
    /// Requests that were refused for want of a port.
    pub refusals: Refusals,
}

/// Refusals by reason; see [`Refusal`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[expect(missing_docs, reason = "they are the names of the reasons")]
pub struct Refusals {
    pub exhausted: u64,
    pub outside: u64,
    pub taken: u64,
    pub quota: u64,
    pub table_full: u64,
    pub bind: u64,
    pub memory: u64,
    #[serde(default)]
    pub protocol: u64,
    #[serde(default)]
    pub resting: u64,
    #[serde(default)]
    pub share: u64,
    #[serde(default)]
    pub kernel: u64,
    #[serde(default)]
    pub leases: u64,
}

impl Refusals {
    fn of(&mut self, refusal: Refusal) -> Option<&mut u64> {
        Some(match refusal {
            Refusal::EXHAUSTED => &mut self.exhausted,
            Refusal::OUTSIDE => &mut self.outside,
            Refusal::TAKEN => &mut self.taken,
            Refusal::QUOTA => &mut self.quota,
            Refusal::TABLE_FULL => &mut self.table_full,
            Refusal::BIND => &mut self.bind,
            Refusal::MEMORY => &mut self.memory,
            Refusal::PROTOCOL => &mut self.protocol,
            Refusal::RESTING => &mut self.resting,
            Refusal::SHARE => &mut self.share,
            Refusal::KERNEL => &mut self.kernel,
            Refusal::LEASES => &mut self.leases,
            _ => return None,
        })
    }

    /// Every reason that there is, and how often.
    pub fn iter(mut self) -> impl Iterator<Item = (&'static str, u64)> {
        (1..Refusal::END).filter_map(move |code| {
            let refusal = Refusal(code);
            self.of(refusal).map(|count| (refusal.name(), *count))
        })
    }
}

impl Leases {
    pub(super) fn count_refusal(&mut self, refusal: Refusal) {
        if let Some(count) = self.refusals.of(refusal) {
            *count += 1;
        }
    }
}

impl Summary {
    /// Returns the summary of a backend.
    pub(super) fn of(backend: &Backend) -> Result<Self, KernelPoolError> {
        let layout = backend.layout();
        let Held { held, warm, busiest } = backend.held()?;
        let counters = match backend {
            Backend::Kernel(pool, _) => Counters::of(&lock(pool).counters()?),
            Backend::Userspace(_) => Counters::default(),
        };
        Ok(Self {
            mode: backend.name().to_owned(),
            ports: layout.ports.ranges().iter().map(ToString::to_string).collect(),
            available: layout.ports.len(),
            held,
            warm,
            busiest,
            counters,
            ..Self::default()
        })
    }
}

impl Counters {
    fn of(counts: &[u64; counter::COUNT as usize]) -> Self {
        let count = |index: u32| counts[index as usize];
        let mut refusals = Refusals::default();
        for code in 1..Refusal::COUNT {
            if let Some(refused) = refusals.of(Refusal(code)) {
                *refused = count(counter::REFUSALS + code);
            }
        }
        Self {
            claims: count(counter::CLAIMS),
            releases: count(counter::RELEASES),
            adoptions: count(counter::ADOPTIONS),
            bind_retries: count(counter::BIND_RETRIES),
            events_lost: count(counter::EVENTS_LOST),
            rests: count(counter::RESTS),
            connect_failures: count(counter::CONNECT_FAILURES),
            rests_denied: count(counter::RESTS_DENIED),
            refusals,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_a_place_under_its_name() {
        let mut counts = [0; counter::COUNT as usize];
        for code in 1..Refusal::COUNT {
            counts[(counter::REFUSALS + code) as usize] = u64::from(code);
        }
        let refusals = Counters::of(&counts).refusals;
        let listed: Vec<_> = refusals.iter().collect();
        let mut expected: Vec<_> =
            (1..Refusal::COUNT).map(|code| (Refusal(code).name(), u64::from(code))).collect();
        // Of leases alone.
        expected.push((Refusal::LEASES.name(), 0));
        assert_eq!(listed, expected);
        let json = serde_json::to_value(refusals).unwrap();
        assert!(expected.iter().all(|(name, count)| json[name] == *count), "{json}");
    }
}
