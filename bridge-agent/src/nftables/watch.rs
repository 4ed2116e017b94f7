//! Notices within a second that another program changed the rules, and restores them.
//!
//! The kernel notifies of every change of nf_tables, with the name of the table. Only if bridge's is among them (or if more
//! was changed at once than a socket holds) the rules are read.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use super::driver::Nftables;
use super::error::Error;
use super::ruleset::TABLE;
use crate::firewall::saver::Saver;
use crate::firewall::survey::Survey;
use crate::firewall::{Firewall, Hits, Remains, Surveyor};
use crate::kernel::nftables::Changes;
use crate::model::{Mode, Policy, Topology};

/// Between two rounds.
const INTERVAL: Duration = Duration::from_millis(200);
/// Rounds must leave this many times their own duration free, up to [`LONGEST`].
const IDLE_SHARE: u32 = 19;
const LONGEST: Duration = Duration::from_millis(700);
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
    stop: Mutex<bool>,
    stopped: Condvar,
}

#[derive(Debug)]
struct State {
    firewall: Nftables,
    policy: Arc<Policy>,
    changes: Changes,
    /// Changes were notified that were not looked at yet.
    unread: bool,
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
        let mut state = State {
            firewall,
            policy: Arc::new(policy),
            changes,
            unread: false,
            saver: Saver::default(),
            comparison: None,
        };
        state.save();
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            status: Mutex::default(),
            stop: Mutex::default(),
            stopped: Condvar::new(),
        });
        let thread = std::thread::Builder::new()
            .name("nftables-watch".into())
            .spawn({
                let shared = Arc::clone(&shared);
                move || watch(&shared, survey)
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
        *self.shared.stop.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.shared.stopped.notify_all();
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
        if self.look() && !self.is_unharmed() {
            return self.firewall.rewrite(policy);
        }
        self.firewall.converge(policy)
    }

    /// Whether changes were notified since the table was last found as it should be.
    fn look(&mut self) -> bool {
        let touched = self.changes.touched(TABLE).unwrap_or_else(|error| {
            tracing::debug!(%error, "notifications of nf_tables cannot be read");
            true
        });
        self.unread |= touched || !self.firewall.is_verified();
        self.unread
    }

    fn is_unharmed(&mut self) -> bool {
        let verified = self.firewall.is_verified() || self.firewall.verify(&self.policy).is_ok();
        verified && matches!(self.firewall.drift(), Ok(None))
    }

    /// Saves the rules for the next boot; after a failure the watch tries again.
    fn save(&mut self) {
        self.saver.save(&self.firewall, &self.policy);
    }
}

fn watch(shared: &Shared, mut survey: Option<Survey>) {
    let mut pause = INTERVAL;
    while !shared.stops_within(pause) {
        let begun = Instant::now();
        if let Some(topology) = survey.as_mut().and_then(|survey| survey.take(begun)) {
            shared.follow(topology);
        }
        let mut state = shared.state();
        let repaired = state.look() && shared.check(&mut state);
        if state.saver.is_due() {
            state.save();
        }
        let counted = state.comparison.as_ref().is_some_and(|comparison| begun >= comparison.next);
        if counted {
            shared.count(&mut state);
        }
        drop(state);
        // The other program may not have finished: look again soon.
        pause = if repaired { INTERVAL } else { (begun.elapsed() * IDLE_SHARE).clamp(INTERVAL, LONGEST) };
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn status(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the end, or for the pause to pass.
    fn stops_within(&self, pause: Duration) -> bool {
        let stop = self.stop.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.stopped.wait_timeout_while(stop, pause, |stop| !*stop);
        *waited.unwrap_or_else(PoisonError::into_inner).0
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
        let drift = if state.firewall.is_verified() {
            state.firewall.drift().map(|drift| drift.map(|(what, _)| what))
        } else {
            match state.firewall.verify(&state.policy) {
                Err(Error::NotAsWritten { found }) => Ok(Some(format!("table inet {TABLE}: {found}"))),
                result => result.map(|()| None),
            }
        };
        let drift = match drift {
            Ok(None) => {
                state.unread = false;
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
        match state.firewall.rewrite(&state.policy) {
            Ok(()) => {
                // The counters begin at zero.
                if let Some(comparison) = &mut state.comparison {
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
