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
    /// Limit of pods.
    pub max_entries: usize,
    /// Limit of pods that are announced from one address.
    pub max_per_source: usize,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            pods: Vec::new(),
            tolerance: Duration::from_secs(120),
            max_lifetime: Duration::from_secs(3600),
            max_entries: 16_384,
            max_per_source: 4_096,
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
    /// Too many from one address.
    #[error("{limit} pods are known from {egress} already, which is the limit of one address")]
    SourceFull {
        /// Where the announcement came from.
        egress: IpAddr,
        /// The limit.
        limit: usize,
    },
    /// Announced from another address. A binding lasts as long as its entry, so that a holder of the key cannot divert the
    /// route of another pod.
    #[error(
        "{address} is bound to {bound} for another {} s, and this announcement came from {egress}; a pod that moved is \
         taken once that time is over", left.as_secs().max(1)
    )]
    Bound {
        /// The pod.
        address: IpAddr,
        /// Where it announced itself from.
        bound: IpAddr,
        /// Where this announcement came from.
        egress: IpAddr,
        /// Time until its entry expires.
        left: Duration,
    },
    /// It failed the check lately.
    #[error(
        "{address} did not prove from {egress} that it is there; the next announcement is taken in {} s",
        left.as_secs().max(1)
    )]
    Unproven {
        /// The pod.
        address: IpAddr,
        /// Where it came from.
        egress: IpAddr,
        /// Time until its next announcement is taken.
        left: Duration,
    },
}

/// The pause after a failed check, in which its route is not installed again: it doubles with each failure in a row.
const FIRST_PAUSE: Duration = Duration::from_secs(10);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(600);

/// Failed checks of one address from one source.
#[derive(Clone, Copy, Debug)]
struct Failures {
    count: u32,
    until: Instant,
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
    /// By address and source.
    failures: BTreeMap<(IpAddr, IpAddr), Failures>,
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
        now: Instant,
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
        let known = self.entries.get(&address).or_else(|| self.checking.get(&address));
        if let Some(entry) = known
            && entry.egress != egress
        {
            let left = entry.expires.saturating_duration_since(now);
            return Err(Disbelief::Bound { address, bound: entry.egress, egress, left });
        }
        if let Some(Failures { until, .. }) = self.failures.get(&(address, egress))
            && *until > now
        {
            return Err(Disbelief::Unproven { address, egress, left: *until - now });
        }
        if known.is_none() {
            if self.entries.len() + self.checking.len() >= rules.max_entries {
                return Err(Disbelief::Full(rules.max_entries));
            }
            let of_source = |entries: &BTreeMap<IpAddr, Entry>| {
                entries.values().filter(|entry| entry.egress == egress).count()
            };
            if of_source(&self.entries) + of_source(&self.checking) >= rules.max_per_source {
                return Err(Disbelief::SourceFull { egress, limit: rules.max_per_source });
            }
        }
        Ok(Duration::from_secs(announcement.lifetime.into())
            .clamp(MIN_LIFETIME, rules.max_lifetime.max(MIN_LIFETIME)))
    }

    /// Starts or prolongs the pause after a check that failed.
    pub fn failed(&mut self, address: IpAddr, egress: IpAddr, now: Instant) {
        // Failures in a row: one that lies further back than the longest pause is forgotten.
        self.failures.retain(|_, failures| failures.until + LONGEST_PAUSE > now);
        let failures = self.failures.entry((address, egress)).or_insert(Failures { count: 0, until: now });
        let pause = FIRST_PAUSE.saturating_mul(1 << failures.count.min(10)).min(LONGEST_PAUSE);
        *failures = Failures { count: failures.count + 1, until: now + pause };
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
        self.failures.remove(&(address, entry.egress));
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
        Registry::default().judge(
            announcement,
            egress.parse().unwrap(),
            &[1; 16],
            clock,
            Instant::now(),
            rules,
        )
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
        let first = entry("192.168.31.17", 60);
        let second = Entry { name: "other".into(), ..entry("192.168.31.17", 90) };
        registry.begin(pod, first.clone());
        assert_eq!(via(&registry), "10.200.1.91/32 via 192.168.31.17 (discovery pod)");
        assert!(registry.finish(pod, &first, true));
        registry.begin(pod, second.clone());
        assert_eq!(via(&registry), "10.200.1.91/32 via 192.168.31.17 (discovery other)");
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
    #[test]
    fn an_address_is_bound_to_its_source_until_its_entry_expires() {
        let (now, rules) = (Instant::now(), Rules::default());
        let pod: IpAddr = "10.200.1.91".parse().unwrap();
        let (node, thief): (IpAddr, IpAddr) =
            ("192.168.31.17".parse().unwrap(), "192.168.31.66".parse().unwrap());
        let announcement = announcement("10.200.1.91");
        let judge = |registry: &Registry, egress, now| {
            registry.judge(&announcement, egress, &[1; 16], 1_000_000, now, &rules)
        };
        let entry = Entry { egress: node, name: "pod".into(), expires: now + Duration::from_secs(60) };
        let mut registry = Registry::default();
        registry.begin(pod, entry.clone());
        // While it is being checked, and after that.
        for _ in 0..2 {
            let error = judge(&registry, thief, now + Duration::from_secs(20)).unwrap_err();
            let left = Duration::from_secs(40);
            assert_eq!(error, Disbelief::Bound { address: pod, bound: node, egress: thief, left });
            judge(&registry, node, now).unwrap();
            registry.finish(pod, &entry, true);
        }
        let over = now + Duration::from_secs(60);
        registry.expire(over);
        judge(&registry, thief, over).unwrap();
    }

    #[test]
    fn failed_checks_pause_their_source_longer_each_time_and_no_other() {
        let (now, rules) = (Instant::now(), Rules::default());
        let pod: IpAddr = "10.200.1.91".parse().unwrap();
        let (thief, node): (IpAddr, IpAddr) =
            ("192.168.31.66".parse().unwrap(), "192.168.31.17".parse().unwrap());
        let announcement = announcement("10.200.1.91");
        let judge = |registry: &Registry, egress, now| {
            registry.judge(&announcement, egress, &[1; 16], 1_000_000, now, &rules)
        };
        let mut registry = Registry::default();
        let mut at = now;
        for pause in [10, 20, 40, 80, 160, 320, 600, 600] {
            judge(&registry, thief, at).unwrap();
            registry.failed(pod, thief, at);
            let left = Duration::from_secs(pause);
            let error = judge(&registry, thief, at).unwrap_err();
            assert_eq!(error, Disbelief::Unproven { address: pod, egress: thief, left });
            judge(&registry, node, at).unwrap();
            at += left;
        }
        let entry = Entry { egress: thief, name: "pod".into(), expires: at + Duration::from_secs(60) };
        registry.begin(pod, entry.clone());
        registry.finish(pod, &entry, true);
        registry.failed(pod, thief, at);
        judge(&registry, thief, at + FIRST_PAUSE).unwrap();
    }

    #[test]
    fn one_source_cannot_fill_the_registry() {
        let rules = Rules { max_per_source: 2, ..Rules::default() };
        let now = Instant::now();
        let mut registry = Registry::default();
        let node: IpAddr = "192.168.31.17".parse().unwrap();
        for last in [1, 2] {
            let entry = Entry { egress: node, name: "pod".into(), expires: now + Duration::from_secs(60) };
            registry.begin([10, 200, 1, last].into(), entry);
        }
        let announcement = announcement("10.200.1.91");
        let judge = |egress: &str| {
            registry.judge(&announcement, egress.parse().unwrap(), &[1; 16], 1_000_000, now, &rules)
        };
        assert_eq!(judge("192.168.31.17"), Err(Disbelief::SourceFull { egress: node, limit: 2 }));
        judge("192.168.31.18").unwrap();
    }
}
