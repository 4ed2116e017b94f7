//! The pool for kernels without the hooks (pure): ports are given out and taken back by the agent alone.
//!
//! A used port goes back to the same owner first; to another one only after `quarantine`, when conntrack has forgotten
//! it. Among several, the one given back first is taken first: every other table has had the longest time to forget it.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    time::{Duration, Instant},
};

use bridge_common::pool::{Destination, Refusal, shares, slots};

use super::{Layout, held::Held};

/// The pool in the agent's own memory.
#[derive(Debug)]
pub struct FifoPool {
    layout: Layout,
    quarantine: Duration,
    destinations: HashMap<Destination, Ports>,
}

#[derive(Debug, Default)]
struct Ports {
    /// Never used, in random order.
    fresh: Vec<u16>,
    /// Given back, by owner, the oldest first.
    warm: HashMap<u64, VecDeque<(Instant, u16)>>,
    /// The same, over all owners.
    oldest: BTreeSet<(Instant, u16, u64)>,
    /// In use.
    held: HashMap<u16, u64>,
}

impl FifoPool {
    /// An empty pool.
    #[must_use]
    pub fn new(layout: Layout, quarantine: Duration) -> Self {
        Self { layout, quarantine, destinations: HashMap::new() }
    }

    /// Takes a port (host byte order).
    ///
    /// # Errors
    /// [`Refusal::EXHAUSTED`], [`Refusal::QUOTA`] or [`Refusal::SHARE`].
    pub fn acquire(&mut self, destination: &Destination, owner: u64, now: Instant) -> Result<u16, Refusal> {
        let layout = &self.layout;
        let others = self.destinations.values().any(|ports| ports.has_others(owner));
        let ports = self.destinations.entry(*destination).or_insert_with(|| {
            let mut fresh: Vec<u16> = layout.template(slots::template(destination)).iter().collect();
            rand::seq::SliceRandom::shuffle(&mut fresh[..], &mut rand::rng());
            Ports { fresh, ..Ports::default() }
        });
        let quota = layout.config.quota;
        let own = ports.held.values().filter(|holder| **holder == owner).count() as u64;
        if quota & shares::SHARE == 0 && quota != 0 && own >= u64::from(quota) {
            return Err(Refusal::QUOTA);
        }
        let free = ports.fresh.len() as u64;
        let in_share = free == 0 || shares::leaves_a_quarter(own, free);
        let port = match ports.own(owner) {
            Some(port) => port,
            None if quota & shares::SHARE != 0 && others && !in_share => return Err(Refusal::SHARE),
            None => {
                ports.fresh.pop().or_else(|| ports.foreign(now, self.quarantine)).ok_or(Refusal::EXHAUSTED)?
            }
        };
        ports.held.insert(port, owner);
        Ok(port)
    }

    /// Takes a port back. `false`: it was not held.
    pub fn release(&mut self, destination: &Destination, port: u16, now: Instant) -> bool {
        let Some(ports) = self.destinations.get_mut(destination) else { return false };
        let Some(owner) = ports.held.remove(&port) else { return false };
        if !self.layout.template(slots::template(destination)).contains(port) {
            // It has left the pool meanwhile.
            return true;
        }
        ports.warm.entry(owner).or_default().push_back((now, port));
        ports.oldest.insert((now, port, owner));
        true
    }

    /// The ports of the pool.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Goes over to other ports. Those that are held stay so, and are not given out again if they have left.
    pub fn change(&mut self, layout: Layout) {
        for (destination, ports) in &mut self.destinations {
            let allowed = layout.template(slots::template(destination));
            let known = self.layout.template(slots::template(destination));
            ports.fresh.retain(|port| allowed.contains(*port));
            for queue in ports.warm.values_mut() {
                queue.retain(|(_, port)| allowed.contains(*port));
            }
            ports.oldest.retain(|(_, port, _)| allowed.contains(*port));
            let new = |port: &u16| !known.contains(*port) && !ports.held.contains_key(port);
            ports.fresh.extend(allowed.iter().filter(new));
            rand::seq::SliceRandom::shuffle(&mut ports.fresh[..], &mut rand::rng());
        }
        self.layout = layout;
    }

    /// How many ports are held, and how many are warm, over all destinations.
    #[must_use]
    pub fn held(&self) -> Held {
        self.destinations.values().fold(Held::default(), |sum, ports| Held {
            held: sum.held + ports.held.len() as u64,
            warm: sum.warm + ports.oldest.len() as u64,
            busiest: sum.busiest.max(ports.held.len() as u64),
        })
    }

    /// Forgets destinations that have not been used for the quarantine.
    pub fn sweep(&mut self, now: Instant) {
        let over = |ports: &Ports| {
            let last = ports.oldest.last().map(|(at, ..)| *at);
            ports.held.is_empty()
                && last.is_none_or(|at| now.saturating_duration_since(at) >= self.quarantine)
        };
        self.destinations.retain(|_, ports| !over(ports));
    }
}

impl Ports {
    fn has_others(&self, owner: u64) -> bool {
        self.held.values().any(|holder| *holder != owner)
            || self.oldest.iter().any(|(_, _, former)| *former != owner)
    }

    fn own(&mut self, owner: u64) -> Option<u16> {
        let (at, port) = self.warm.get_mut(&owner)?.pop_front()?;
        self.oldest.remove(&(at, port, owner));
        Some(port)
    }

    fn foreign(&mut self, now: Instant, quarantine: Duration) -> Option<u16> {
        let &(at, port, owner) = self.oldest.first()?;
        if now.saturating_duration_since(at) < quarantine {
            return None;
        }
        self.oldest.pop_first();
        if let Some(queue) = self.warm.get_mut(&owner)
            // Among the first: only those that came back at the very same moment can be before it.
            && let Some(place) = queue.iter().position(|entry| *entry == (at, port))
        {
            queue.remove(place);
        }
        Some(port)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;
    use crate::{
        model::PortRange,
        pool::{Settings, layout::Occupied},
    };

    fn pool(first: u16, last: u16, quota: Option<u32>) -> FifoPool {
        let settings = Settings {
            ports: vec![PortRange { first, last }],
            bind_udp: false,
            quota,
            ..Settings::default()
        };
        let layout = Layout::plan(&settings, &Occupied::default()).unwrap();
        FifoPool::new(layout, Duration::from_secs(120))
    }

    fn to(n: u8) -> Destination {
        Destination::from_network_v4([10, 0, 0, n], [1, 187], bridge_common::protocol::TCP)
    }

    #[test]
    fn the_port_given_back_first_is_taken_first() {
        let mut pool = pool(61001, 61003, None);
        let now = Instant::now();
        let ports: Vec<u16> = (0..3).map(|_| pool.acquire(&to(1), 1, now).unwrap()).collect();
        assert_eq!(pool.acquire(&to(1), 1, now), Err(Refusal::EXHAUSTED));
        for (i, port) in ports.iter().enumerate() {
            assert!(pool.release(&to(1), *port, now + Duration::from_secs(i as u64)));
            assert!(!pool.release(&to(1), *port, now), "given back twice");
        }
        let again: Vec<u16> = (0..3).map(|_| pool.acquire(&to(1), 1, now).unwrap()).collect();
        assert_eq!(again, ports);
    }

    #[test]
    fn another_owner_waits_for_the_quarantine() {
        let mut pool = pool(61001, 61001, None);
        let now = Instant::now();
        let port = pool.acquire(&to(1), 1, now).unwrap();
        assert!(pool.release(&to(1), port, now));
        assert_eq!(pool.acquire(&to(1), 2, now + Duration::from_secs(119)), Err(Refusal::EXHAUSTED));
        assert_eq!(pool.acquire(&to(1), 2, now + Duration::from_secs(120)), Ok(port));
        assert_eq!(pool.acquire(&to(2), 1, now), Ok(port), "another destination is another bitmap");
    }

    #[test]
    fn a_quota_leaves_the_rest_to_others() {
        let mut pool = pool(61001, 61003, Some(2));
        let now = Instant::now();
        pool.acquire(&to(1), 1, now).unwrap();
        pool.acquire(&to(1), 1, now).unwrap();
        assert_eq!(pool.acquire(&to(1), 1, now), Err(Refusal::QUOTA));
        assert!(pool.acquire(&to(1), 2, now).is_ok());
    }

    #[test]
    fn a_client_leaves_a_quarter_of_the_ports_while_there_are_others() {
        let mut pool = pool(61001, 61008, None);
        let now = Instant::now();
        let alone: Vec<u16> = (0..8).map(|_| pool.acquire(&to(1), 1, now).unwrap()).collect();
        assert_eq!(pool.acquire(&to(1), 1, now), Err(Refusal::EXHAUSTED), "{alone:?}");
        pool.acquire(&to(2), 2, now).unwrap();
        assert!((0..6).all(|_| pool.acquire(&to(3), 1, now).is_ok()));
        assert_eq!(pool.acquire(&to(3), 1, now), Err(Refusal::SHARE));
        assert!(pool.acquire(&to(3), 2, now).is_ok());
    }

    #[test]
    fn a_change_keeps_what_is_held_and_gives_out_the_new_ports_alone() {
        let mut pool = pool(61001, 61003, None);
        let now = Instant::now();
        let held: Vec<u16> = (0..3).map(|_| pool.acquire(&to(1), 1, now).unwrap()).collect();
        assert!(pool.release(&to(1), 61001, now));
        assert_eq!(pool.held(), Held { held: 2, warm: 1, busiest: 2 });
        let layout = |first, last| self::pool(first, last, None).layout().clone();
        pool.change(layout(61003, 61004));
        assert_eq!(pool.held(), Held { held: 2, warm: 0, busiest: 2 });
        assert_eq!(pool.acquire(&to(1), 1, now), Ok(61004));
        assert_eq!(pool.acquire(&to(1), 1, now), Err(Refusal::EXHAUSTED), "{held:?}");
        assert!(pool.release(&to(1), 61002, now));
        assert_eq!(pool.acquire(&to(1), 1, now), Err(Refusal::EXHAUSTED), "61002 has left");
        // 61001 and 61002 come back, 61003 is still held.
        pool.change(layout(61001, 61004));
        let mut back: Vec<u16> = (0..2).map(|_| pool.acquire(&to(1), 1, now).unwrap()).collect();
        back.sort_unstable();
        assert_eq!(back, [61001, 61002]);
        assert_eq!(pool.acquire(&to(1), 1, now), Err(Refusal::EXHAUSTED));
    }

    proptest! {
        #[test]
        fn no_port_is_held_twice(steps in prop::collection::vec((0..3_u8, 1..4_u64, 0..200_u64, any::<bool>()), 0..400)) {
            let mut pool = pool(61001, 61008, Some(8));
            let mut now = Instant::now();
            let mut held: Vec<(u8, u16)> = Vec::new();
            for (destination, owner, seconds, release) in steps {
                now += Duration::from_secs(seconds / 10);
                if release && !held.is_empty() {
                    let (destination, port) = held.remove(usize::try_from(seconds).unwrap() % held.len());
                    prop_assert!(pool.release(&to(destination), port, now));
                } else if let Ok(port) = pool.acquire(&to(destination), owner, now) {
                    prop_assert!((61001..=61008).contains(&port));
                    held.push((destination, port));
                } else {
                    // All eight are in use, or warm with another owner.
                    let in_use = held.iter().filter(|(d, _)| *d == destination).count();
                    prop_assert!(in_use + pool.destinations[&to(destination)].oldest.len() == 8);
                }
                let unique: HashSet<_> = held.iter().collect();
                prop_assert_eq!(unique.len(), held.len());
                pool.sweep(now);
            }
        }
    }
}
