//! Keeps the kernel's tables as the plan says.
//!
//! The kernel is read again whenever something happened that a plan depends on, and never remembered: IPv4 routes
//! vanish without a word when a link goes down, and events can be lost.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{broadcast, watch};
use tokio::time::Instant;

use super::event::{EventKind, RouteEvent};
use super::health::Change;
use super::model::Hop;
use super::netlink::{Error, Event, Events, Interest, Netlink};
use super::plan::{Operation, Verdict, plan};
use super::settings::Settings;
use super::sources::{Desired, Merged};
use super::status::{Counters, Snapshot};
use super::watchdog::Watchdog;

/// Between two comparisons at least this long, or as long as the last one took: at most half the time is spent;
/// but never so long that a repair has to wait for it.
const REST: Duration = Duration::from_millis(2);
const REST_MAX: Duration = Duration::from_millis(20);
/// Compared at least this often, whatever the events say.
const AUDIT: Duration = Duration::from_secs(30);
/// After a refusal of the kernel: again after this long, doubled up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_millis(20);
const RETRY_MAX: Duration = Duration::from_secs(5);
/// Operations between two looks at the event socket, so that the kernel need not hold thousands of echoes.
const CHUNK: usize = 256;
/// What the kernel may hold for the event socket. A full table of 10,000 routes flushed at once does not fit, nor
/// need it: the loss is noticed.
const EVENT_BUFFER: usize = 1 << 20;

/// Owns the routes of one network namespace. Dropping it leaves them in the kernel.
pub struct Reconciler {
    settings: Settings,
    /// What the settings shall be from the next merge on.
    set: watch::Sender<Settings>,
    setting: watch::Receiver<Settings>,
    desired: Desired,
    changes: watch::Receiver<u64>,
    netlink: Netlink,
    kernel_events: Events,
    merged: Arc<Merged>,
    version: u64,
    interest: Interest,
    snapshot: watch::Sender<Arc<Snapshot>>,
    events: broadcast::Sender<RouteEvent>,
    counters: Arc<Counters>,
    retry: Duration,
    next: Next,
    /// Whether something else is wanted than at the last comparison; if not, what there is to do is a repair.
    wishes_changed: bool,
    watchdog: Option<Watchdog>,
    /// Events of neighbours were lost: all are read again with the next comparison.
    neighbours_lost: bool,
}

/// When the kernel is read next.
#[derive(Clone, Copy, Debug)]
struct Next {
    at: Instant,
    /// Not before this, however urgent.
    rested: Instant,
}

/// What a comparison came to.
struct Outcome {
    /// Whether the kernel is as planned now.
    clean: bool,
    /// How much was to be done.
    operations: usize,
}

impl Next {
    fn no_later_than(&mut self, at: Instant) {
        self.at = self.at.min(at.max(self.rested));
    }
}

impl Reconciler {
    /// Opens its sockets in the network namespace of the calling thread; needs a tokio runtime with I/O and time.
    pub fn new(settings: Settings, desired: Desired) -> Result<Self, Error> {
        let netlink = Netlink::open()?;
        let kernel_events = Events::open(netlink.port(), EVENT_BUFFER)?;
        let now = Instant::now();
        let (set, setting) = watch::channel(settings.clone());
        Ok(Self {
            watchdog: settings.health.clone().map(Watchdog::new),
            changes: desired.changes(),
            settings,
            set,
            setting,
            desired,
            netlink,
            kernel_events,
            merged: Arc::default(),
            version: 0,
            interest: Interest::default(),
            snapshot: watch::Sender::default(),
            events: broadcast::Sender::new(1024),
            counters: Arc::default(),
            retry: RETRY_MIN,
            next: Next { at: now, rested: now },
            wishes_changed: true,
            neighbours_lost: false,
        })
    }

    /// The outcome of the latest comparison; changes with each.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.snapshot.subscribe()
    }

    /// What happens from here on.
    #[must_use]
    pub fn events(&self) -> broadcast::Sender<RouteEvent> {
        self.events.clone()
    }

    /// Sends events through this channel instead of its own: for receivers that outlive it.
    #[must_use]
    pub fn sending_to(mut self, events: broadcast::Sender<RouteEvent>) -> Self {
        self.events = events;
        self
    }

    /// Where other settings are sent; they count from the next comparison on, which follows at once.
    #[must_use]
    pub fn settings(&self) -> watch::Sender<Settings> {
        self.set.clone()
    }

    /// Opens new sockets in the place of those that [`Self::run`] gave up.
    pub fn reopen(&mut self) -> Result<(), Error> {
        self.netlink = Netlink::open()?;
        self.kernel_events = Events::open(self.netlink.port(), EVENT_BUFFER)?;
        let now = Instant::now();
        self.next = Next { at: now, rested: now };
        Ok(())
    }

    /// Counts, for metrics.
    #[must_use]
    pub fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    /// Keeps the routes true until it is dropped. Returns only if the kernel can no longer be talked to; see
    /// [`Self::reopen`].
    pub async fn run(&mut self) -> Error {
        self.merge();
        let mut events = Vec::new();
        loop {
            let outcome = tokio::select! {
                biased;
                () = tokio::time::sleep_until(self.next.at) => self.sync(&mut events),
                changed = self.changes.changed() => {
                    // The sender lives in `self.desired`.
                    debug_assert!(changed.is_ok());
                    self.merge();
                    self.next.no_later_than(Instant::now());
                    Ok(())
                }
                changed = self.setting.changed() => {
                    // The sender lives in `self.set`.
                    debug_assert!(changed.is_ok());
                    self.merge();
                    self.next.no_later_than(Instant::now());
                    Ok(())
                }
                check = next_check(&mut self.watchdog) => self.ask(check),
                read = self.kernel_events.next(&mut events) => read.and_then(|()| self.kernel_events.drain(&mut events)),
            };
            match outcome {
                Ok(()) => {}
                Err(Error::Interrupted | Error::Overrun) => self.lost(),
                Err(error) => return error,
            }
            if self.concerns(&mut events) {
                self.next.no_later_than(Instant::now());
            }
        }
    }

    /// Takes up what is wanted and how, both at one moment: no comparison sees the new of one and the old of the other.
    fn merge(&mut self) {
        let settings = self.setting.borrow_and_update().clone();
        if settings != self.settings {
            if settings.health != self.settings.health {
                self.watchdog = settings.health.clone().map(Watchdog::new);
            }
            self.settings = settings;
        }
        self.changes.mark_unchanged();
        let (merged, version) = self.desired.merged(self.settings.table);
        self.interest = Interest::of(&merged.routes, &self.settings);
        self.merged = Arc::new(merged);
        self.version = version;
        self.wishes_changed = true;
    }

    /// Whether one of the events can change the plan.
    fn concerns(&mut self, events: &mut Vec<Event>) -> bool {
        let mut concerns = false;
        for event in events.drain(..) {
            concerns |= match event {
                Event::Route(route) => self.interest.matters(&route),
                Event::Topology => true,
                Event::Neighbour { hop, state } => {
                    let change = self.watchdog.as_mut().and_then(|watchdog| watchdog.heard(hop, state));
                    self.turned(change)
                }
                Event::Overrun => {
                    Counters::add(&self.counters.overruns, 1);
                    self.neighbours_lost = true;
                    true
                }
            };
        }
        concerns
    }

    /// Asks the next hops whose turn it is, or takes up an answer.
    fn ask(&mut self, check: Option<(Hop, bool)>) -> Result<(), Error> {
        if let Some(watchdog) = &mut self.watchdog {
            let changes = watchdog.act(check, &mut self.netlink)?;
            if self.turned(changes) {
                self.next.no_later_than(Instant::now());
            }
        }
        Ok(())
    }

    /// Reports next hops that went down or came up; true if there are any.
    fn turned(&self, changes: impl IntoIterator<Item = Change>) -> bool {
        let mut any = false;
        for Change { hop: (address, _), kind, reason } in changes {
            any = true;
            Counters::add(
                match kind {
                    EventKind::NextHopUp => &self.counters.next_hops_up,
                    EventKind::NextHopDamped => &self.counters.next_hops_damped,
                    _ => &self.counters.next_hops_down,
                },
                1,
            );
            self.happened(kind, || format!("next hop {address}: {reason}"));
        }
        any
    }

    fn sync(&mut self, events: &mut Vec<Event>) -> Result<(), Error> {
        let start = Instant::now();
        let outcome = self.compare_and_apply(events);
        // What was read for it has gone by now.
        if self.merged.routes.len() > CHUNK
            || outcome.as_ref().is_ok_and(|outcome| outcome.operations > CHUNK)
        {
            crate::kernel::memory::trim();
        }
        Counters::add(&self.counters.interrupted, self.netlink.take_interrupted());
        let end = Instant::now();
        let rested = end + (end - start).clamp(REST, REST_MAX);
        let wait = match outcome {
            Ok(Outcome { clean: true, .. }) => AUDIT,
            Ok(Outcome { clean: false, .. }) => self.back_off(),
            Err(Error::Interrupted) => self.back_off(),
            Err(Error::Overrun) => {
                Counters::add(&self.counters.overruns, 1);
                self.back_off()
            }
            Err(error) => return Err(error),
        };
        self.next = Next { at: rested.max(end + wait), rested };
        if wait == AUDIT {
            self.retry = RETRY_MIN;
        }
        Ok(())
    }

    /// An answer of the kernel was lost beside a comparison: everything is read again.
    fn lost(&mut self) {
        Counters::add(&self.counters.overruns, 1);
        self.neighbours_lost = true;
        let wait = self.back_off();
        self.next.no_later_than(Instant::now() + wait);
    }

    fn back_off(&mut self) -> Duration {
        let wait = self.retry;
        self.retry = (wait * 2).min(RETRY_MAX);
        wait
    }

    fn compare_and_apply(&mut self, events: &mut Vec<Event>) -> Result<Outcome, Error> {
        Counters::add(&self.counters.syncs, 1);
        if self.neighbours_lost
            && let Some(watchdog) = &mut self.watchdog
        {
            let changes = watchdog.refresh(&mut self.netlink)?;
            self.turned(changes);
        }
        self.neighbours_lost = false;
        let mut observed = self.netlink.observe(&self.interest)?;
        observed.down = self.watchdog.as_ref().map(Watchdog::down).unwrap_or_default();
        let planned = plan(&self.merged.routes, &observed, &self.settings, !self.merged.silent.is_empty());
        let mut failures = BTreeMap::new();
        for chunk in planned.operations.chunks(CHUNK) {
            let failed = self.netlink.apply(chunk)?;
            self.kernel_events.drain(events)?;
            let mut failed = failed.into_iter().peekable();
            for (index, operation) in chunk.iter().enumerate() {
                let failure =
                    failed.next_if(|failure| failure.index == index).map(|failure| failure.error.to_string());
                self.report(operation, &observed, failure.as_deref());
                if let Some(failure) = failure {
                    failures.insert(operation.key(), failure);
                }
            }
        }
        let mut replan = false;
        if let Some(watchdog) = &mut self.watchdog {
            // Of a new next hop the kernel may know already that it does not answer.
            let changes = watchdog.watch(&planned.next_hops, &mut self.netlink)?;
            replan = self.turned(changes);
        }
        let clean = failures.is_empty();
        if !std::mem::take(&mut self.wishes_changed) {
            Counters::add(&self.counters.repaired, planned.operations.len() - failures.len());
        }
        self.report_refusals(&planned.verdicts);
        let merged = Arc::clone(&self.merged);
        // What the rows need of the observation is the names of the links.
        let observed = super::Observed { routes: Vec::new(), ..observed };
        self.snapshot.send_replace(Arc::new(Snapshot {
            version: self.version,
            merged,
            verdicts: planned.verdicts,
            failures,
            pending: BTreeSet::new(),
            observed,
            next_hops: planned.next_hops,
        }));
        Ok(Outcome { clean: clean && !replan, operations: planned.operations.len() })
    }

    fn report(&self, operation: &Operation, observed: &super::Observed, failure: Option<&str>) {
        let (counter, kind) = match operation {
            Operation::Add(_) => (&self.counters.added, EventKind::RouteAdded),
            Operation::Replace { .. } => (&self.counters.replaced, EventKind::RouteReplaced),
            Operation::Delete(_) => (&self.counters.deleted, EventKind::RouteDeleted),
        };
        match failure {
            None => {
                Counters::add(counter, 1);
                self.happened(kind, || operation.show(observed));
            }
            Some(failure) => {
                Counters::add(&self.counters.failed, 1);
                self.happened(EventKind::RouteFailed, || format!("{}: {failure}", operation.show(observed)));
            }
        }
    }

    /// An event for each refusal that was not there before.
    fn report_refusals(&self, verdicts: &[Verdict]) {
        let before = self.snapshot.borrow().clone();
        let reported: BTreeMap<_, _> = (before.merged.routes.iter().zip(&before.verdicts))
            .filter_map(|(route, verdict)| Some(((route.table, route.to), verdict.refusal()?)))
            .collect();
        for (route, verdict) in self.merged.routes.iter().zip(verdicts) {
            if let Some(refusal) = verdict.refusal()
                && reported.get(&(route.table, route.to)) != Some(&refusal)
            {
                self.happened(EventKind::RouteRefused, || refusal.to_string());
            }
        }
    }

    fn happened(&self, kind: EventKind, text: impl FnOnce() -> String) {
        let worth = matches!(kind, EventKind::RouteRefused | EventKind::RouteFailed);
        if self.events.receiver_count() == 0 && !worth && !tracing::enabled!(tracing::Level::INFO) {
            return;
        }
        let text = text();
        if worth {
            tracing::warn!(?kind, "{text}");
        } else {
            tracing::info!(?kind, "{text}");
        }
        // An event without a receiver is dropped.
        _ = self.events.send(RouteEvent::now(kind, text));
    }
}

async fn next_check(watchdog: &mut Option<Watchdog>) -> Option<(Hop, bool)> {
    match watchdog {
        Some(watchdog) => watchdog.next().await,
        None => std::future::pending().await,
    }
}
