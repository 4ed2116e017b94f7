//! The pods that announced themselves. Pure: the caller supplies the time.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use thiserror::Error;

use super::message::{Announcement, Nonce};
use crate::routes::model::{DesiredRoute, SourceKind};
use crate::routes::prefix_map::host;

/// An accepted announcement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Pods are in these networks; empty believes any address.
    pub pods: Vec<IpNet>,
    /// How far clocks may be apart.
    pub tolerance: Duration,
    /// No entry lives longer without being renewed.
    pub max_lifetime: Duration,
    /// Maximum number of pods.
    pub max_entries: usize,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            pods: Vec::new(),
            tolerance: Duration::from_secs(120),
            max_lifetime: Duration::from_secs(3600),
            max_entries: 16_384,
        }
    }
}

/// Entries that live less would flap.
const MIN_LIFETIME: Duration = Duration::from_secs(5);

/// Why an authentic announcement is not believed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Disbelief {
    /// It belongs to another connection.
    #[error("the announcement answers the challenge of another connection: a replay")]
    Replay,
    /// The clocks differ.
    #[error("the clocks of pod and host differ by {} s, more than {} s; check NTP on both", difference.as_secs(), tolerance.as_secs())]
    Clock {
        /// By how much.
        difference: Duration,
        /// How much is tolerated.
        tolerance: Duration,
    },
    /// Nothing translated the address on the way.
    #[error("{0} arrived with its own address: no node masquerades it, and the host reaches it already")]
    NotMasqueraded(IpAddr),
    /// IPv4 in IPv6 or the other way round.
    #[error(
        "{address} announced itself from {egress}, of another address family; probe once for each family"
    )]
    Family {
        /// The pod.
        address: IpAddr,
        /// Where it came from.
        egress: IpAddr,
    },
    /// Outside the networks of the pods.
    #[error("{0} lies in none of `networks.pods`; add its network there")]
    Outside(IpAddr),
    /// Too many.
    #[error("{0} pods are known already, which is the limit")]
    Full(usize),
}

/// A pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The address it is seen with: its node's.
    pub egress: IpAddr,
    /// For people.
    pub name: String,
    /// When it is forgotten unless it announces itself again.
    pub expires: Instant,
}

/// All pods by address. A pod whose check is pending has its route already, but is not an entry yet.
#[derive(Debug, Default)]
pub struct Registry {
    entries: BTreeMap<IpAddr, Entry>,
    checking: BTreeMap<IpAddr, Entry>,
}

impl Registry {
    /// Judges an authentic announcement that came from `egress` over the connection of `challenge`; `clock` is
    /// milliseconds since 1970-01-01 UTC. An accepted announcement must be checked next.
    pub fn judge(
        &self,
        announcement: &Announcement,
        egress: IpAddr,
        challenge: &Nonce,
        clock: u64,
        rules: &Rules,
    ) -> Result<Duration, Disbelief> {
        let address = announcement.address;
        if announcement.challenge != *challenge {
            return Err(Disbelief::Replay);
        }
        let difference = Duration::from_millis(announcement.timestamp.abs_diff(clock));
        if difference > rules.tolerance {
            return Err(Disbelief::Clock { difference, tolerance: rules.tolerance });
        }
        if address == egress {
            return Err(Disbelief::NotMasqueraded(address));
        }
        if address.is_ipv4() != egress.is_ipv4() {
            return Err(Disbelief::Family { address, egress });
        }
        if !rules.pods.is_empty() && !rules.pods.iter().any(|net| net.contains(&address)) {
            return Err(Disbelief::Outside(address));
        }
        let known = self.entries.contains_key(&address) || self.checking.contains_key(&address);
        if !known && self.entries.len() + self.checking.len() >= rules.max_entries {
            return Err(Disbelief::Full(rules.max_entries));
        }
        Ok(Duration::from_secs(announcement.lifetime.into())
            .clamp(MIN_LIFETIME, rules.max_lifetime.max(MIN_LIFETIME)))
    }

    /// Routes the pod for as long as it is being checked.
    pub fn begin(&mut self, address: IpAddr, entry: Entry) {
        self.checking.insert(address, entry);
    }

    /// Ends the check of exactly this entry. True if the pod was not known like this before.
    pub fn finish(&mut self, address: IpAddr, entry: &Entry, passed: bool) -> bool {
        // A newer announcement of the same pod may be under way.
        if self.checking.get(&address) == Some(entry) {
            self.checking.remove(&address);
        }
        if !passed {
            return false;
        }
        let old = self.entries.insert(address, entry.clone());
        old.is_none_or(|old| old.egress != entry.egress)
    }

    /// Removes expired entries.
    pub fn expire(&mut self, now: Instant) -> Vec<(IpAddr, Entry)> {
        let expired = self.entries.iter().filter(|(_, entry)| entry.expires <= now);
        let expired: Vec<_> = expired.map(|(address, entry)| (*address, entry.clone())).collect();
        for (address, _) in &expired {
            self.entries.remove(address);
        }
        expired
    }

    /// When the next one expires.
    #[must_use]
    pub fn next_expiry(&self) -> Option<Instant> {
        self.entries.values().map(|entry| entry.expires).min()
    }

    /// A route to each pod; one that is being checked is reached the way it says.
    #[must_use]
    pub fn routes(&self) -> Vec<DesiredRoute> {
        let mut all: BTreeMap<_, _> = self.entries.iter().collect();
        all.extend(self.checking.iter());
        let route = |(address, entry): (&IpAddr, &Entry)| {
            DesiredRoute::forward(host(*address), entry.egress, SourceKind::Discovery, entry.name.clone())
        };
        all.into_iter().map(route).collect()
    }

    /// Those that were checked, by address.
    pub fn entries(&self) -> impl Iterator<Item = (&IpAddr, &Entry)> {
        self.entries.iter()
    }

    /// Forgets pods outside of all these networks, unless there are none.
    pub fn forget_outside(&mut self, pods: &[IpNet]) {
        if !pods.is_empty() {
            self.entries.retain(|address, _| pods.iter().any(|net| net.contains(address)));
        }
    }

    /// Restores the entries of an earlier run.
    pub fn restore(&mut self, entries: impl IntoIterator<Item = (IpAddr, Entry)>) {
        self.entries.extend(entries);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn announcement(address: &str) -> Announcement {
        Announcement {
            challenge: [1; 16],
            nonce: [2; 16],
            timestamp: 1_000_000,
            lifetime: 60,
            check_port: 1,
            address: address.parse().unwrap(),
            name: "pod".into(),
        }
    }

    fn judge(
        announcement: &Announcement,
        egress: &str,
        clock: u64,
        rules: &Rules,
    ) -> Result<Duration, Disbelief> {
        Registry::default().judge(announcement, egress.parse().unwrap(), &[1; 16], clock, rules)
    }

    #[test]
    fn what_is_not_believed_says_why() {
        let pod = announcement("10.200.1.91");
        let rules = Rules { pods: vec!["10.200.0.0/16".parse().unwrap()], ..Rules::default() };
        assert_eq!(judge(&pod, "192.168.31.17", 1_000_000 + 120_000, &rules), Ok(Duration::from_secs(60)));
        assert_eq!(judge(&pod, "192.168.31.17", 1_000_000 - 120_000, &rules), Ok(Duration::from_secs(60)));
        let text = |result: Result<Duration, Disbelief>| result.unwrap_err().to_string();
        insta::assert_snapshot!([
            text(judge(&pod, "192.168.31.17", 1_000_000 + 121_000, &rules)),
            text(judge(&pod, "192.168.31.17", 1_000_000 - 121_000, &rules)),
            text(judge(&Announcement { challenge: [3; 16], ..pod.clone() }, "192.168.31.17", 1_000_000, &rules)),
            text(judge(&pod, "10.200.1.91", 1_000_000, &rules)),
            text(judge(&pod, "fd31::17", 1_000_000, &rules)),
            text(judge(&announcement("10.201.1.91"), "192.168.31.17", 1_000_000, &rules)),
            text(judge(&pod, "192.168.31.17", 1_000_000, &Rules { max_entries: 0, ..rules.clone() })),
        ].join("\n"), @r"
        the clocks of pod and host differ by 121 s, more than 120 s; check NTP on both
        the clocks of pod and host differ by 121 s, more than 120 s; check NTP on both
        the announcement answers the challenge of another connection: a replay
        10.200.1.91 arrived with its own address: no node masquerades it, and the host reaches it already
        10.200.1.91 announced itself from fd31::17, of another address family; probe once for each family
        10.201.1.91 lies in none of `networks.pods`; add its network there
        0 pods are known already, which is the limit
        ");
    }

    #[test]
    fn lifetimes_are_bounded_on_both_sides() {
        let rules = Rules::default();
        let lives = |lifetime| {
            judge(
                &Announcement { lifetime, ..announcement("10.200.1.91") },
                "192.168.31.17",
                1_000_000,
                &rules,
            )
            .unwrap()
        };
        assert_eq!(lives(0), MIN_LIFETIME);
        assert_eq!(lives(u32::MAX), rules.max_lifetime);
    }

    #[test]
    fn a_failed_check_leaves_what_was_known_before() {
        let now = Instant::now();
        let pod: IpAddr = "10.200.1.91".parse().unwrap();
        let entry = |egress: &str, seconds| Entry {
            egress: egress.parse().unwrap(),
            name: "pod".into(),
            expires: now + Duration::from_secs(seconds),
        };
        let via = |registry: &Registry| {
            registry.routes().iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
        };
        let mut registry = Registry::default();
        let (first, second) = (entry("192.168.31.17", 60), entry("192.168.31.18", 90));
        registry.begin(pod, first.clone());
        assert_eq!(via(&registry), "10.200.1.91/32 via 192.168.31.17 (discovery pod)");
        assert!(registry.finish(pod, &first, true));
        registry.begin(pod, second.clone());
        assert_eq!(via(&registry), "10.200.1.91/32 via 192.168.31.18 (discovery pod)");
        assert!(!registry.finish(pod, &second, false));
        assert_eq!(via(&registry), "10.200.1.91/32 via 192.168.31.17 (discovery pod)");
        // Renewed: the same, for longer.
        let renewed = entry("192.168.31.17", 120);
        registry.begin(pod, renewed.clone());
        assert!(!registry.finish(pod, &renewed, true));
        assert_eq!(registry.expire(now + Duration::from_secs(119)), []);
        assert_eq!(registry.next_expiry(), Some(now + Duration::from_secs(120)));
        assert_eq!(registry.expire(now + Duration::from_secs(120)), [(pod, renewed)]);
        assert_eq!(via(&registry), "");
    }
}
