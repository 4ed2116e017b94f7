//! Notices within a second that another program changed the rules, and restores them.
//!
//! The kernel notifies of every change of nf_tables, with the name of the table and the number of the transaction. A change of
//! bridge's table by another transaction than its own is damage, and the table is written again. Only where that is uncertain
//! (more was changed at once than a socket holds, or another program wrote at the same time) the rules are read.

use std::collections::BTreeMap;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::driver::Nftables;
use super::error::Error;
use super::ruleset::TABLE;
use crate::firewall::saver::Saver;
use crate::firewall::survey::Survey;
use crate::firewall::{Firewall, Hits, Remains, Surveyor};
use crate::kernel::nftables::{Changes, Touched};
use crate::model::{Mode, Policy, Topology};

/// Between two rounds without a notification.
const INTERVAL: Duration = Duration::from_millis(200);
/// Rounds leave this many times their own duration free, between these bounds, whatever is notified: the ruleset may be that of
/// a program that writes without end.
const IDLE_SHARE: u32 = 9;
const SHORTEST: Duration = Duration::from_millis(20);
const LONGEST: Duration = Duration::from_millis(400);
/// Between two readings of the counters, while eBPF is beside.
const COUNTING: Duration = Duration::from_secs(5);
/// Reasons that are none of eBPF's business: `scope: strict` is for the packet filter alone.
const NOT_COMPARED: [&str; 3] = ["bridge:strict", "bridge:audited", "bridge:nodeport-allowed"];

/// The findings of the watch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// How often rules were put back.
    pub repairs: u64,
    /// The damage that was repaired last, and when.
    pub last_repair: Option<(SystemTime, String)>,
    /// Why the rules could not be read or put back, if that is so now.
    pub failure: Option<String>,
    /// Packets that nftables denied though eBPF had let them through, by reason, while both were compared.
    pub denied: BTreeMap<String, u64>,
}

/// An applied policy, and a thread that keeps its rules in place.
///
/// Dropping it ends the thread and leaves the rules.
#[derive(Debug)]
pub struct Guard {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Apart from the state, so that it can be had while rules are being written.
    status: Mutex<Status>,
    /// Can be read once the watch is to end.
    stop: OwnedFd,
}

#[derive(Debug)]
struct State {
    firewall: Nftables,
    policy: Arc<Policy>,
    changes: Changes,
    /// Changes by others that were notified and not looked at yet.
    unread: Touched,
    saver: Saver,
    /// The counters as last read, with eBPF beside.
    comparison: Option<Comparison>,
}

#[derive(Debug)]
struct Comparison {
    counters: BTreeMap<String, Hits>,
    next: Instant,
}

impl Guard {
    /// Applies and saves `policy`, and watches the rules from then on, in the network namespace of this thread. `topology` is
    /// asked from time to time for the interfaces of this node, and the rules follow.
    ///
    /// # Errors
    /// The rules cannot be applied. A failure to save them is only logged.
    pub fn start(mut firewall: Nftables, policy: Policy, topology: Option<Surveyor>) -> Result<Self, Error> {
        let mut survey = topology.map(Survey::new);
        if let Some(topology) = survey.as_mut().and_then(|survey| survey.take(Instant::now())) {
            firewall.set_topology(topology);
        }
        // Before the rules are written: the first round sees every change since then.
        let changes = Changes::open()
            .map_err(|source| Error::Kernel { request: "watch the changes of nf_tables".into(), source })?;
        firewall.converge(&policy)?;
        let notified = changes
            .descriptor()
            .map_err(|source| Error::Kernel { request: "watch the changes of nf_tables".into(), source })?;
        let stop = eventfd(0, EventfdFlags::CLOEXEC)
            .map_err(|error| Error::Kernel { request: "make an event".into(), source: error.into() })?;
        let mut state = State {
            firewall,
            policy: Arc::new(policy),
            changes,
            unread: Touched::No,
            saver: Saver::default(),
            comparison: None,
        };
        state.save();
        let shared = Arc::new(Shared { state: Mutex::new(state), status: Mutex::default(), stop });
        let thread = std::thread::Builder::new()
            .name("nftables-watch".into())
            .spawn({
                let shared = Arc::clone(&shared);
                move || watch(&shared, &notified, survey)
            })
            .map_err(|source| Error::Kernel { request: "start a thread".into(), source })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Continues the counters of an earlier guard.
    #[must_use]
    pub fn after(self, before: Status) -> Self {
        *self.shared.status() = before;
        self
    }

    /// Applies and saves another policy. If it is refused, the previous one stays.
    ///
    /// # Errors
    /// The policy cannot be applied.
    pub fn update(&self, policy: Policy) -> Result<(), Error> {
        let mut state = self.shared.state();
        state.converge(&policy)?;
        state.policy = Arc::new(policy);
        state.save();
        Ok(())
    }

    /// Whether updates are saved from now on.
    pub fn set_saving(&self, enabled: bool) {
        self.shared.state().firewall.set_saving(enabled);
    }

    /// Whether the watch goes on.
    #[must_use]
    pub const fn watches(&self) -> bool {
        self.thread.is_some()
    }

    /// Returns the applied policy.
    #[must_use]
    pub fn policy(&self) -> Arc<Policy> {
        Arc::clone(&self.shared.state().policy)
    }

    /// Returns the findings of the watch.
    #[must_use]
    pub fn status(&self) -> Status {
        self.shared.status().clone()
    }

    /// Begins, or ends, to count packets that nftables denies after eBPF has let them through. To be ended before either
    /// changes its policy, and begun again when both have: in between they differ, and that means nothing.
    ///
    /// Returns whether it has begun: not if the counters cannot be read, which is logged.
    pub fn compare(&self, begin: bool) -> bool {
        let mut state = self.shared.state();
        self.shared.count(&mut state);
        state.comparison = None;
        if begin {
            match state.firewall.counters() {
                Ok(counters) => {
                    state.comparison = Some(Comparison { counters, next: Instant::now() + COUNTING });
                }
                Err(error) => tracing::warn!(%error, "nftables cannot be compared with eBPF"),
            }
        }
        state.comparison.is_some()
    }

    /// Ends the watch, then removes everything.
    pub fn teardown(mut self) -> Remains<Error> {
        self.stop();
        self.shared.state().firewall.teardown()
    }

    /// Ends the watch and leaves the rules.
    pub fn stop(&mut self) {
        if let Err(error) = rustix::io::write(&self.shared.stop, &1_u64.to_ne_bytes()) {
            tracing::error!(%error, "the watch over nftables cannot be ended");
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the watch over nftables had panicked");
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.stop();
    }
}

impl State {
    /// Applies a policy. Where another program has changed the table since it was last looked at, all of it is written:
    /// a foreign rule must not be taken for one that belongs there.
    fn converge(&mut self, policy: &Policy) -> Result<(), Error> {
        let harmed = match self.look() {
            Touched::No => false,
            Touched::Perhaps => !matches!(self.drift(), Ok(None)),
            Touched::Changed | Touched::Removed => true,
        };
        if !harmed {
            return self.firewall.converge(policy);
        }
        self.firewall.rewrite(policy)?;
        self.unread = Touched::No;
        Ok(())
    }

    /// Returns the changes by others that were notified since the table was last found as it should be.
    fn look(&mut self) -> Touched {
        let (own, since) = self.firewall.transactions();
        let touched = self.changes.touched(TABLE, own, since).unwrap_or_else(|error| {
            tracing::debug!(%error, "notifications of nf_tables cannot be read");
            Touched::Perhaps
        });
        self.unread = self.unread.max(touched);
        self.unread
    }

    /// Reads the rules; returns the difference from those written, if there is one.
    fn drift(&mut self) -> Result<Option<String>, Error> {
        if self.firewall.is_verified() {
            return self.firewall.drift().map(|drift| drift.map(|(drift, _)| drift));
        }
        match self.firewall.verify(&self.policy) {
            Err(Error::NotAsWritten { found }) => Ok(Some(format!("table inet {TABLE}: {found}"))),
            result => result.map(|()| None),
        }
    }

    /// Saves the rules for the next boot; after a failure the watch tries again.
    fn save(&mut self) {
        self.saver.save(&self.firewall, &self.policy);
    }
}

fn watch(shared: &Shared, notified: &OwnedFd, mut survey: Option<Survey>) {
    let mut pause = SHORTEST;
    // What is notified during the pause is looked at after it, at once.
    loop {
        let survey_notified = survey.as_ref().and_then(Survey::descriptor);
        let events: Vec<BorrowedFd<'_>> = survey_notified.into_iter().chain([notified.as_fd()]).collect();
        if shared.stops_within(&[], pause) || shared.stops_within(&events, INTERVAL) {
            return;
        }
        let begun = Instant::now();
        if let Some(topology) = survey.as_mut().and_then(|survey| survey.take(begun)) {
            shared.follow(topology);
        }
        let mut state = shared.state();
        let wanted = state.look() != Touched::No || state.firewall.is_due();
        let repaired = wanted && shared.check(&mut state);
        if state.saver.is_due() {
            state.save();
        }
        let counted = state.comparison.as_ref().is_some_and(|comparison| begun >= comparison.next);
        if counted {
            shared.count(&mut state);
        }
        drop(state);
        // The other program may not have finished: look again soon.
        pause = if repaired { SHORTEST } else { (begun.elapsed() * IDLE_SHARE).clamp(SHORTEST, LONGEST) };
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn status(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the end of the watch, for a notification on `notified`, or for the pause to pass. Returns whether it was the
    /// end.
    fn stops_within(&self, notified: &[BorrowedFd<'_>], pause: Duration) -> bool {
        let events = std::iter::once(self.stop.as_fd()).chain(notified.iter().copied());
        let mut events: Vec<_> = events.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
        let until = Instant::now() + pause;
        loop {
            let left = Timespec::try_from(until.saturating_duration_since(Instant::now())).ok();
            match poll(&mut events, left.as_ref()) {
                Ok(_) => return events.first().is_some_and(|stop| !stop.revents().is_empty()),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(%error, "the watch over nftables cannot wait");
                    return true;
                }
            }
        }
    }

    /// Renders the rules for another topology.
    fn follow(&self, topology: Topology) {
        let mut state = self.state();
        if *state.firewall.topology() == topology {
            return;
        }
        let before = state.firewall.topology().clone();
        state.firewall.set_topology(topology);
        let policy = state.policy.clone();
        match state.converge(&policy) {
            Ok(()) => {
                state.save();
                tracing::info!("nftables rules follow the interfaces of this node");
            }
            Err(error) => {
                // Tried again in the next survey.
                state.firewall.set_topology(before);
                self.status().failed(&format!("the rules cannot follow the interfaces: {error}"));
            }
        }
    }

    /// Checks the rules, and restores them. Returns whether they were restored.
    fn check(&self, state: &mut State) -> bool {
        let drift = match state.unread {
            Touched::Removed => Ok(Some(format!("table inet {TABLE} was removed"))),
            Touched::Changed => Ok(Some(format!("table inet {TABLE} was changed by another program"))),
            Touched::No | Touched::Perhaps => state.drift(),
        };
        let drift = match drift {
            Ok(None) => {
                state.unread = Touched::No;
                self.status().failure = None;
                return false;
            }
            Ok(Some(drift)) => drift,
            Err(error) => {
                self.status().failed(&error.to_string());
                return false;
            }
        };
        self.count(state);
        let removed = state.unread == Touched::Removed;
        match state.firewall.restore(&state.policy, removed) {
            Ok(goes_on) => {
                state.unread = Touched::No;
                if let Some(comparison) = state.comparison.as_mut().filter(|_| !goes_on) {
                    comparison.counters.clear();
                }
                tracing::warn!("{drift}; repaired");
                let mut status = self.status();
                status.failure = None;
                status.repairs += 1;
                status.last_repair = Some((SystemTime::now(), drift));
                true
            }
            Err(error) => {
                self.status().failed(&format!("{drift}; {error}"));
                false
            }
        }
    }

    /// Adds the packets denied since the counters were last read.
    fn count(&self, state: &mut State) {
        let State { firewall, policy, comparison: Some(comparison), .. } = state else { return };
        comparison.next = Instant::now() + COUNTING;
        let counters = match firewall.counters() {
            Ok(counters) => counters,
            Err(error) => return tracing::debug!(%error, "the counters cannot be read"),
        };
        // In audit mode eBPF passes everything, also packets that it would have denied.
        if policy.mode == Mode::Enforce {
            let mut status = self.status();
            for (reason, now) in
                counters.iter().filter(|(reason, _)| !NOT_COMPARED.contains(&reason.as_str()))
            {
                let known = comparison.counters.get(reason).map_or(0, |known| known.packets);
                // The table was written again: its counters began at zero.
                let known = if known > now.packets { 0 } else { known };
                if now.packets > known {
                    *status.denied.entry(reason.clone()).or_default() += now.packets - known;
                }
            }
        }
        comparison.counters = counters;
    }
}

impl Status {
    /// Logs a failure once, not in every round.
    fn failed(&mut self, failure: &str) {
        if self.failure.as_deref() != Some(failure) {
            tracing::error!("{failure}");
            self.failure = Some(failure.to_owned());
        }
    }
}
