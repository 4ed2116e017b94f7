//! Whether next hops answer. Pure: takes the time, the kernel's neighbour entries and the results of TCP checks, which
//! the reconciler makes.
//!
//! - *Neighbour*: the kernel asks by ARP or neighbour discovery. `NUD_FAILED` is down at once: the kernel has asked
//!   three times by then. `NUD_REACHABLE` is up.
//! - *TCP*: optional, a port of the node that must accept connections; a number of failures in a row means
//!   down, a number of successes up.
//! - *Damping* (RFC 2439): each time a next hop goes down it gets a penalty that halves with time. Above one limit it
//!   stays down even if it answers, until the penalty has fallen below another one.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::event::EventKind;
use super::model::Hop;

const NUD_INCOMPLETE: u16 = 0x01;
const NUD_REACHABLE: u16 = 0x02;
const NUD_STALE: u16 = 0x04;
const NUD_DELAY: u16 = 0x08;
const NUD_PROBE: u16 = 0x10;
const NUD_FAILED: u16 = 0x20;
const NUD_NOARP: u16 = 0x40;
const NUD_PERMANENT: u16 = 0x80;

/// How next hops are watched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Each next hop is asked this often.
    pub interval: Duration,
    /// A port of the node that must accept connections.
    pub tcp: Option<u16>,
    /// How long a TCP check waits.
    pub timeout: Duration,
    /// TCP checks that must fail in a row for the next hop to be down.
    pub fall: u32,
    /// TCP checks that must succeed in a row for it to be up again.
    pub rise: u32,
    /// With more next hops than this the kernel is not made to ask, only listened to: each asked neighbour takes a
    /// place in its table, which holds 1,024 by default (`net.ipv4.neigh.default.gc_thresh3`).
    pub max_asked: usize,
    /// Against next hops that come and go.
    pub damping: Damping,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(5),
            tcp: None,
            timeout: Duration::from_secs(1),
            fall: 2,
            rise: 2,
            max_asked: 512,
            damping: Damping::default(),
        }
    }
}

/// The figures of RFC 2439, for a LAN: a third failure within half a minute holds a next hop down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damping {
    /// Added each time a next hop goes down.
    pub penalty: u32,
    /// Above this it is held down.
    pub suppress: u32,
    /// Below this no longer.
    pub reuse: u32,
    /// The penalty halves in this time.
    pub half_life: Duration,
    /// It is never held down for longer than this after it last went down.
    pub max_suppress: Duration,
}

impl Default for Damping {
    fn default() -> Self {
        Self {
            penalty: 1000,
            suppress: 2500,
            reuse: 1000,
            half_life: Duration::from_secs(30),
            max_suppress: Duration::from_secs(120),
        }
    }
}

/// Something an operator wants to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Which next hop.
    pub hop: Hop,
    /// Down, up, or damped.
    pub kind: EventKind,
    pub reason: String,
}

/// How the kernel is made to ask for a neighbour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// It knows nothing valid: as if a packet were waiting (`NTF_USE`).
    Resolve,
    /// It believes to know: verify now, not when it next feels like it (`NUD_PROBE`).
    Verify,
}

/// Everything known of the watched next hops.
#[derive(Debug)]
pub struct Health {
    options: Options,
    hops: BTreeMap<Hop, Track>,
    /// Where the next slice begins.
    after: Option<Hop>,
}

#[derive(Clone, Debug)]
struct Track {
    neighbour: u16,
    neighbour_failed: bool,
    tcp_failed: bool,
    /// TCP checks in a row that contradict `tcp_failed`.
    contrary: u32,
    penalty: f64,
    since: Instant,
    suppressed: bool,
}

impl Health {
    /// Watches nothing yet.
    #[must_use]
    pub const fn new(options: Options) -> Self {
        Self { options, hops: BTreeMap::new(), after: None }
    }

    /// How it watches.
    #[must_use]
    pub const fn options(&self) -> &Options {
        &self.options
    }

    /// Watches exactly these; true if some of them are new. What was known of the others is forgotten, and of the
    /// new ones good is assumed.
    pub fn watch(&mut self, now: Instant, hops: &BTreeSet<Hop>) -> bool {
        self.hops.retain(|hop, _| hops.contains(hop));
        let before = self.hops.len();
        for hop in hops {
            self.hops.entry(*hop).or_insert_with(|| Track::new(now));
        }
        self.hops.len() > before
    }

    /// What the kernel knows of a neighbour: an `NUD_*` state, 0 for nothing.
    pub fn neighbour(&mut self, now: Instant, hop: Hop, state: u16) -> Option<Change> {
        let track = self.hops.get_mut(&hop)?;
        track.neighbour = state;
        let failed = match state {
            NUD_FAILED => true,
            NUD_REACHABLE | NUD_NOARP | NUD_PERMANENT => false,
            // On the way to one of the above, or an old belief.
            _ => return None,
        };
        let up = track.answers();
        track.neighbour_failed = failed;
        track.turn(
            now,
            up,
            hop,
            &self.options.damping,
            "its neighbour entry failed (no answer to ARP or neighbour discovery)",
        )
    }

    /// How a TCP check ended.
    pub fn tcp(&mut self, now: Instant, hop: Hop, accepted: bool) -> Option<Change> {
        let track = self.hops.get_mut(&hop)?;
        let up = track.answers();
        if accepted == track.tcp_failed {
            track.contrary += 1;
        } else {
            track.contrary = 0;
        }
        if track.contrary >= if accepted { self.options.rise } else { self.options.fall } {
            track.tcp_failed = !accepted;
            track.contrary = 0;
        }
        let reason = format!("TCP port {} does not accept connections", self.options.tcp.unwrap_or(0));
        track.turn(now, up, hop, &self.options.damping, &reason)
    }

    /// Releases next hops that have been stable for long enough.
    pub fn decay(&mut self, now: Instant) -> Vec<Change> {
        let damping = &self.options.damping;
        let mut changes = Vec::new();
        for (hop, track) in self.hops.iter_mut().filter(|(_, track)| track.suppressed) {
            track.settle(now, damping);
            if track.penalty < f64::from(damping.reuse) {
                track.suppressed = false;
                if track.answers() {
                    let reason = "it has been quiet for long enough".to_owned();
                    changes.push(Change { hop: *hop, kind: EventKind::NextHopUp, reason });
                }
            }
        }
        changes
    }

    /// Those not to be used.
    #[must_use]
    pub fn down(&self) -> BTreeSet<Hop> {
        self.hops
            .iter()
            .filter(|(_, track)| track.suppressed || !track.answers())
            .map(|(hop, _)| *hop)
            .collect()
    }

    /// The next `1/parts` of the next hops, in turn.
    pub fn slice(&mut self, parts: usize) -> Vec<Hop> {
        use std::ops::Bound::{Excluded, Unbounded};
        let size = self.hops.len().div_ceil(parts.max(1));
        let start = self.after.map_or(Unbounded, Excluded);
        let slice: Vec<_> = self.hops.range((start, Unbounded)).map(|(hop, _)| *hop).take(size).collect();
        self.after = if slice.len() < size { None } else { slice.last().copied() };
        slice
    }

    /// How to make the kernel ask for each; nothing for those it is asking for already or never does.
    #[must_use]
    pub fn ask(&self, hops: &[Hop]) -> Vec<(Hop, Ask)> {
        if self.hops.len() > self.options.max_asked {
            return Vec::new();
        }
        let ask = |hop: &Hop| match self.hops.get(hop)?.neighbour {
            NUD_INCOMPLETE | NUD_PROBE | NUD_NOARP | NUD_PERMANENT => None,
            NUD_REACHABLE | NUD_STALE | NUD_DELAY => Some((*hop, Ask::Verify)),
            _ => Some((*hop, Ask::Resolve)),
        };
        hops.iter().filter_map(ask).collect()
    }
}

impl Track {
    const fn new(now: Instant) -> Self {
        Self {
            neighbour: 0,
            neighbour_failed: false,
            tcp_failed: false,
            contrary: 0,
            penalty: 0.0,
            since: now,
            suppressed: false,
        }
    }

    const fn answers(&self) -> bool {
        !self.neighbour_failed && !self.tcp_failed
    }

    /// Brings the penalty up to date.
    fn settle(&mut self, now: Instant, damping: &Damping) {
        let halves = (now - self.since).as_secs_f64() / damping.half_life.as_secs_f64();
        self.penalty *= 0.5f64.powf(halves);
        self.since = now;
    }

    /// Whether it went down or came up, and what of it shows.
    fn turn(
        &mut self,
        now: Instant,
        up_before: bool,
        hop: Hop,
        damping: &Damping,
        reason: &str,
    ) -> Option<Change> {
        let up = self.answers();
        if up == up_before {
            return None;
        }
        let change = |kind, reason: &str| Some(Change { hop, kind, reason: reason.to_owned() });
        if up {
            // Held down: it comes up in `decay`.
            return if self.suppressed { None } else { change(EventKind::NextHopUp, "it answers again") };
        }
        self.settle(now, damping);
        let cap = f64::from(damping.reuse)
            * (damping.max_suppress.as_secs_f64() / damping.half_life.as_secs_f64()).exp2();
        self.penalty = (self.penalty + f64::from(damping.penalty)).min(cap);
        if self.suppressed {
            return None;
        }
        if self.penalty > f64::from(damping.suppress) {
            self.suppressed = true;
            return change(
                EventKind::NextHopDamped,
                &format!("{reason}, once too often; it stays down until it has been quiet"),
            );
        }
        change(EventKind::NextHopDown, reason)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use std::net::IpAddr;

    use super::*;

    fn hop(last: u8) -> Hop {
        (IpAddr::from([192, 168, 31, last]), 2)
    }

    fn watching(options: Options, hops: &[Hop]) -> (Health, Instant) {
        let (mut health, now) = (Health::new(options), Instant::now());
        assert!(health.watch(now, &hops.iter().copied().collect()));
        assert!(!health.watch(now, &hops.iter().copied().collect()));
        (health, now)
    }

    #[test]
    fn a_failed_neighbour_is_down_until_it_is_reachable() {
        let (mut health, now) = watching(Options::default(), &[hop(17), hop(18)]);
        assert_eq!(health.ask(&[hop(17)]), [(hop(17), Ask::Resolve)]);
        for state in [NUD_INCOMPLETE, NUD_REACHABLE, NUD_STALE] {
            assert_eq!(health.neighbour(now, hop(17), state), None);
        }
        assert_eq!(health.ask(&[hop(17)]), [(hop(17), Ask::Verify)]);
        assert_eq!(health.neighbour(now, hop(17), NUD_PROBE), None);
        assert_eq!(health.ask(&[hop(17)]), []);
        assert_eq!(health.neighbour(now, hop(17), NUD_FAILED).unwrap().kind, EventKind::NextHopDown);
        assert_eq!(health.down(), [hop(17)].into());
        assert_eq!(health.neighbour(now, hop(17), NUD_INCOMPLETE), None);
        assert_eq!(health.neighbour(now, hop(17), NUD_FAILED), None);
        assert_eq!(health.neighbour(now, hop(17), NUD_REACHABLE).unwrap().kind, EventKind::NextHopUp);
        assert_eq!(health.down(), [].into());
        assert_eq!(health.neighbour(now, hop(99), NUD_FAILED), None, "not watched");
    }

    #[test]
    fn tcp_checks_count_in_a_row() {
        let (mut health, now) = watching(Options { tcp: Some(10250), ..Options::default() }, &[hop(17)]);
        let mut outcomes = |outcomes: &[bool]| {
            outcomes
                .iter()
                .filter_map(|ok| health.tcp(now, hop(17), *ok))
                .map(|change| change.kind)
                .collect::<Vec<_>>()
        };
        assert_eq!(outcomes(&[true, false, true, false, true]), []);
        assert_eq!(outcomes(&[false, false, false]), [EventKind::NextHopDown]);
        assert_eq!(outcomes(&[true, false, true, false]), []);
        assert_eq!(outcomes(&[true, true, true]), [EventKind::NextHopUp]);
    }

    #[test]
    fn flapping_is_damped_and_forgiven() {
        let (mut health, start) = watching(Options::default(), &[hop(17)]);
        let flap = |health: &mut Health, second: u64| {
            let now = start + Duration::from_secs(second);
            [NUD_FAILED, NUD_REACHABLE]
                .map(|state| health.neighbour(now, hop(17), state).map(|change| change.kind))
        };
        let visible = [Some(EventKind::NextHopDown), Some(EventKind::NextHopUp)];
        assert_eq!(flap(&mut health, 0), visible);
        assert_eq!(flap(&mut health, 1), visible);
        assert_eq!(flap(&mut health, 2), [Some(EventKind::NextHopDamped), None]);
        assert_eq!(flap(&mut health, 3), [None, None]);
        assert_eq!(health.down(), [hop(17)].into());
        // About 3,890 at second 3; below 1,000 after a little less than two half-lives.
        assert_eq!(health.decay(start + Duration::from_secs(60)), []);
        let up = health.decay(start + Duration::from_secs(63));
        assert_eq!(up.iter().map(|change| change.kind).collect::<Vec<_>>(), [EventKind::NextHopUp]);
        assert_eq!(health.down(), [].into());
        // Slow failures are never damped.
        for minute in 10..20 {
            assert_eq!(flap(&mut health, minute * 60), visible);
        }
    }

    #[test]
    fn everybody_gets_a_turn_and_a_crowd_is_not_asked_for() {
        let hops: Vec<_> = (1..=23).map(hop).collect();
        let (mut health, _) = watching(Options { max_asked: 22, ..Options::default() }, &hops);
        let mut seen = Vec::new();
        for _ in 0..10 {
            let slice = health.slice(10);
            assert!(slice.len() <= 3);
            seen.extend(slice);
        }
        seen.dedup();
        assert!(hops.iter().all(|hop| seen.contains(hop)), "{seen:?}");
        assert_eq!(health.ask(&hops), []);
    }

    proptest! {
        /// The state down follows from the events alone, and no next hop is held down for longer than allowed.
        #[test]
        fn the_state_follows_from_the_events(steps in prop::collection::vec((0u64..20_000, 0u8..4, 17u8..19), 0..60)) {
            let (mut health, mut now) = watching(Options { tcp: Some(1), fall: 2, rise: 1, ..Options::default() }, &[hop(17), hop(18)]);
            let mut down = BTreeSet::new();
            for (wait, what, last) in steps {
                now += Duration::from_millis(wait);
                let mut changes = health.decay(now);
                changes.extend(match what {
                    0 => health.neighbour(now, hop(last), NUD_FAILED),
                    1 => health.neighbour(now, hop(last), NUD_REACHABLE),
                    2 => health.tcp(now, hop(last), false),
                    _ => health.tcp(now, hop(last), true),
                });
                for change in changes {
                    let news = match change.kind {
                        EventKind::NextHopUp => down.remove(&change.hop),
                        _ => down.insert(change.hop),
                    };
                    prop_assert!(news, "{:?}", change);
                }
                prop_assert_eq!(health.down(), down.clone());
            }
            for last in [17, 18] {
                health.neighbour(now, hop(last), NUD_REACHABLE);
                health.tcp(now, hop(last), true);
            }
            health.decay(now + Duration::from_secs(121));
            prop_assert_eq!(health.down(), BTreeSet::new());
        }
    }
}
