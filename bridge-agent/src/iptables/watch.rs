//! Notices within a second that another program changed the rules, and mends them.
//!
//! Every round asks the kernel one cheap question, and reads the rules only if the answer is new:
//! - nf_tables numbers its rulesets: one netlink message. (Its notifications would bring every rule that anybody
//!   writes, 10,000 of them when a kube-proxy starts, to learn no more than that.)
//! - x_tables has no numbers and no notifications: a table's outline (rules, size, entry points) is asked for in every
//!   round, and less often its content is copied out and hashed without the counters.

mod comparison;
mod peace;

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use self::comparison::Comparison;
use self::peace::Peace;
use super::divergence::Divergence;
use super::driver::Iptables;
use super::error::Error;
use super::observe::OwnRules;
use super::question::{Answer, Question};
use super::ruleset::{Family, Table};
use super::walk::{self, Packet, Verdict};
use crate::firewall::saver::Saver;
use crate::firewall::survey::Survey;
use crate::firewall::{Firewall, Hits, Remains, Surveyor};
use crate::model::{Mode, Policy, Topology};

/// Between two rounds.
const INTERVAL: Duration = Duration::from_millis(200);
/// Rounds must leave this many times their own duration free, up to [`LONGEST`].
const IDLE_SHARE: u32 = 19;
const LONGEST: Duration = Duration::from_millis(700);
/// Denied packets that wait to be held against the rules, and how many are at a time.
const WAITING: usize = 256;
const AT_A_TIME: usize = 16;
/// With less time than this between policies, [`MANY`] times in a row, the thread saves the rules and begins to compare the
/// engines after a pause of this length: a change waits for neither.
const LULL: Duration = Duration::from_secs(1);
const MANY: u32 = 3;

/// The findings of the watch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// How often rules were put back.
    pub repairs: u64,
    /// The damage that was repaired last, and when.
    pub last_repair: Option<(SystemTime, String)>,
    /// Why the rules could not be read or put back, if that is so now.
    pub failure: Option<String>,
    /// Packets that one engine let through and the other did not, while both were compared.
    pub divergence: Divergence,
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
    mail: Mutex<Mail>,
    arrived: Condvar,
}

/// Messages to the thread.
#[derive(Debug, Default)]
struct Mail {
    stop: bool,
    /// The next round is due at once.
    due: bool,
    /// Packets that eBPF has denied.
    denied: VecDeque<Packet>,
}

/// Why the thread woke.
enum Woken {
    Stop,
    Denied(Vec<Packet>),
    Time,
}

#[derive(Debug)]
struct State {
    firewall: Iptables,
    policy: Arc<Policy>,
    peace: Peace,
    /// When the policy was last changed.
    changed: Instant,
    /// Number of changes in a row, each soon after the one before.
    in_a_row: u32,
    /// The rules are to be saved then.
    save_at: Option<Instant>,
    saver: Saver,
    /// With eBPF beside it.
    comparison: Option<Comparison>,
    /// The comparison is to begin then.
    compare_at: Option<Instant>,
}

impl Guard {
    /// Applies and saves `policy`, and watches the rules from then on, in the network namespace of this thread.
    ///
    /// # Errors
    /// The rules cannot be applied. A failure to save them is only logged.
    pub fn start(firewall: Iptables, policy: Policy) -> Result<Self, Error> {
        Self::start_with(firewall, policy, None)
    }

    /// As [`Guard::start`]; `topology` is asked from time to time for the interfaces of this node, and the rules follow.
    ///
    /// # Errors
    /// Those of [`Guard::start`].
    pub fn start_with(
        mut firewall: Iptables,
        policy: Policy,
        topology: Option<Surveyor>,
    ) -> Result<Self, Error> {
        let mut survey = topology.map(Survey::new);
        if let Some(topology) = survey.as_mut().and_then(|survey| survey.take(Instant::now())) {
            firewall.set_topology(topology);
        }
        // Before the rules are written: the first round sees every change since then.
        let question = Question::open(firewall.backend())?;
        firewall.converge(&policy)?;
        let mut state = State {
            firewall,
            policy: Arc::new(policy),
            peace: Peace::default(),
            changed: Instant::now(),
            in_a_row: 0,
            save_at: None,
            saver: Saver::default(),
            comparison: None,
            compare_at: None,
        };
        state.save();
        let state = Mutex::new(state);
        let shared = Arc::new(Shared {
            state,
            status: Mutex::default(),
            mail: Mutex::default(),
            arrived: Condvar::new(),
        });
        let thread = std::thread::Builder::new()
            .name("iptables-watch".into())
            .spawn({
                let shared = Arc::clone(&shared);
                move || watch(&shared, question, survey)
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
        // A changed file and a signal about it are two reloads: the second keeps the counters.
        if policy == *state.policy && matches!(state.firewall.drift(), Ok(None)) {
            state.save();
            return Ok(());
        }
        if let Err(error) = state.firewall.converge(&policy) {
            // Tables are committed one by one: those before the refused one are taken back.
            let before = state.policy.clone();
            if let Err(again) = state.firewall.converge(&before) {
                // The watch goes on trying.
                tracing::error!("cannot go back to the rules of before: {again}");
            }
            return Err(error);
        }
        state.policy = Arc::new(policy);
        state.in_a_row = if state.changed.elapsed() < LULL { state.in_a_row + 1 } else { 0 };
        if state.is_busy() {
            state.save_at.get_or_insert_with(|| Instant::now() + LULL);
        } else {
            state.save();
        }
        state.changed = Instant::now();
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

    /// Begins, or ends, to compare with eBPF, which judges the same packets first by the same policy. To be ended before
    /// either changes its policy, and begun again when both have: in between they differ, and that means nothing.
    ///
    /// Returns whether it has begun: not if the counters cannot be read, which is logged.
    pub fn compare(&self, begin: bool) -> bool {
        let mut state = self.end_comparison();
        if !begin {
            return false;
        }
        if state.is_busy() {
            state.compare_at = Some(Instant::now() + LULL);
            return true;
        }
        state.begin_comparison()
    }

    /// As [`Guard::compare`] that begins, but the thread reads the counters, so that the caller does not wait for them.
    pub fn compare_soon(&self) {
        let mut state = self.end_comparison();
        let pause = if state.is_busy() { LULL } else { Duration::ZERO };
        state.compare_at = Some(Instant::now() + pause);
        drop(state);
        self.shared.mail().due = pause.is_zero();
        self.shared.arrived.notify_all();
    }

    fn end_comparison(&self) -> MutexGuard<'_, State> {
        let mut state = self.shared.state();
        self.shared.mail().denied.clear();
        self.shared.count(&mut state);
        (state.comparison, state.compare_at) = (None, None);
        state
    }

    /// Takes in the first packet of a flow, which eBPF has denied (in audit mode: would have).
    pub fn denied_by_ebpf(&self, packet: Packet) {
        let mut mail = self.shared.mail();
        if mail.denied.len() < WAITING {
            mail.denied.push_back(packet);
            self.shared.arrived.notify_all();
        } else {
            drop(mail);
            self.shared.status().divergence.not_compared += 1;
        }
    }

    /// Returns the verdict of the rules on the first packet of a flow; `None` if it is not known.
    #[must_use]
    pub fn verdict(&self, packet: &Packet) -> Option<Verdict> {
        let state = self.shared.state();
        walk::verdict(state.firewall.written(), packet, state.policy.mode == Mode::Audit)
    }

    /// See [`Firewall::hits`].
    ///
    /// # Errors
    /// If the kernel's rules cannot be read.
    pub fn hits(&self) -> Result<BTreeMap<String, Hits>, Error> {
        self.shared.state().firewall.hits()
    }

    /// Ends the watch, then removes everything.
    pub fn teardown(mut self) -> Remains<Error> {
        self.stop();
        self.shared.state().firewall.teardown()
    }

    /// Ends the watch and leaves the rules.
    pub fn stop(&mut self) {
        self.shared.mail().stop = true;
        self.shared.arrived.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the watch over iptables had panicked");
        }
        let mut state = self.shared.state();
        if state.save_at.is_some() {
            state.save();
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn status(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn mail(&self) -> MutexGuard<'_, Mail> {
        self.mail.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count_now_and_then(&self) {
        let mut state = self.state();
        if state.comparison.as_ref().is_some_and(Comparison::is_due) {
            let begun = Instant::now();
            self.count(&mut state);
            if let Some(comparison) = &mut state.comparison {
                comparison.done(begun);
            }
        }
    }

    fn count(&self, state: &mut State) {
        let State { firewall, policy, comparison: Some(comparison), .. } = state else {
            return;
        };
        // The status is not locked while the rules are read.
        let mut divergence = self.status().divergence.clone();
        match comparison.count(firewall, policy.mode, &mut divergence) {
            Ok(()) => self.status().divergence.denied_by_iptables = divergence.denied_by_iptables,
            Err(error) => tracing::debug!(%error, "the counters cannot be read"),
        }
    }

    /// Compares packets that eBPF has denied with the rules that are in the kernel now.
    fn compare(&self, packets: &[Packet], question: &mut Question, known: Option<&Answer>) {
        let answer = question.ask().ok();
        let state = self.state();
        if state.comparison.is_none() {
            return;
        }
        let unharmed = answer.is_some() && answer.as_ref() == known;
        let read = if unharmed { None } else { Some(state.firewall.read_back()) };
        let changed: BTreeMap<(Family, Table), OwnRules>;
        let rules = match read {
            None => state.firewall.written(),
            Some(Ok(tables)) => {
                changed = tables.iter().map(|(key, table)| (*key, table.own())).collect();
                &changed
            }
            Some(Err(error)) => {
                tracing::debug!(%error, "denied packets cannot be compared");
                self.status().divergence.not_compared += packets.len() as u64;
                return;
            }
        };
        let audit = state.policy.mode == Mode::Audit;
        comparison::compare(packets, rules, audit, &mut self.status().divergence);
    }

    /// Waits for the end, for packets to compare (but not before `rested`), or until `round`.
    fn wait(&self, round: Instant, rested: Instant) -> Woken {
        let mut mail = self.mail();
        loop {
            let now = Instant::now();
            if mail.stop {
                return Woken::Stop;
            }
            if now >= round || std::mem::take(&mut mail.due) {
                return Woken::Time;
            }
            if !mail.denied.is_empty() && now >= rested {
                let count = mail.denied.len().min(AT_A_TIME);
                return Woken::Denied(mail.denied.drain(..count).collect());
            }
            let until = if mail.denied.is_empty() { round } else { round.min(rested) };
            let waited = self.arrived.wait_timeout(mail, until.saturating_duration_since(now));
            mail = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl State {
    /// Saves the rules for the next boot; after a failure the watch tries again.
    fn save(&mut self) {
        self.save_at = None;
        self.saver.save(&self.firewall, &self.policy);
    }
}

impl State {
    /// Whether one change follows another.
    fn is_busy(&self) -> bool {
        self.in_a_row >= MANY
    }

    /// Begins to compare with the counters of now. Returns whether they can be read.
    fn begin_comparison(&mut self) -> bool {
        self.compare_at = None;
        match Comparison::begin(&self.firewall) {
            Ok(comparison) => self.comparison = Some(comparison),
            Err(error) => tracing::warn!(%error, "iptables cannot be compared with eBPF"),
        }
        self.comparison.is_some()
    }

    /// Does the work that changes have put off.
    fn catch_up(&mut self) {
        let is_due = |at: Option<Instant>| at.is_some_and(|at| Instant::now() >= at);
        if is_due(self.save_at) || self.saver.is_due() {
            self.save();
        }
        if is_due(self.compare_at) {
            self.begin_comparison();
        }
    }
}

fn watch(shared: &Shared, mut question: Question, mut survey: Option<Survey>) {
    let mut known = None;
    let mut next = Instant::now() + INTERVAL;
    let mut rested = next;
    loop {
        match shared.wait(next, rested) {
            Woken::Stop => return,
            Woken::Denied(packets) => {
                let begun = Instant::now();
                shared.compare(&packets, &mut question, known.as_ref());
                rested = Instant::now() + begun.elapsed() * IDLE_SHARE;
            }
            Woken::Time => {
                if let Some(topology) = survey.as_mut().and_then(|survey| survey.take(Instant::now())) {
                    shared.follow(topology);
                }
                next = Instant::now() + round(shared, &mut question, &mut known);
            }
        }
    }
}

/// Checks for changes and repairs them; returns the pause until the next round.
fn round(shared: &Shared, question: &mut Question, known: &mut Option<Answer>) -> Duration {
    let begun = Instant::now();
    // Asked before the rules are read, so that a change in between is seen in the next round.
    match question.ask() {
        Ok(answer) if known.as_ref() == Some(&answer) => {}
        Ok(answer) => match shared.check(begun, &answer) {
            Seen::Unharmed => *known = Some(answer),
            // The other program may not have finished: look again soon.
            Seen::Repaired => return INTERVAL,
            Seen::Failed => {}
        },
        Err(error) => shared.status().failed(&format!("cannot ask the kernel for changes: {error}")),
    }
    shared.state().catch_up();
    let pause = (begun.elapsed() * IDLE_SHARE).clamp(INTERVAL, LONGEST);
    shared.count_now_and_then();
    pause
}

impl Shared {
    /// Renders the rules for another topology.
    fn follow(&self, topology: Topology) {
        let mut state = self.state();
        let State { firewall, policy, comparison, .. } = &mut *state;
        if *firewall.topology() == topology {
            return;
        }
        let before = firewall.topology().clone();
        firewall.set_topology(topology);
        match firewall.converge(policy) {
            Ok(()) => {
                if comparison.is_some() {
                    *comparison = Comparison::begin(firewall).ok();
                }
                state.save();
                tracing::info!("iptables rules follow the interfaces of this node");
            }
            Err(error) => {
                // Tried again in the next survey.
                firewall.set_topology(before);
                self.status().failed(&format!("the rules cannot follow the interfaces: {error}"));
            }
        }
    }
}

/// How a round ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    /// Whatever changed was not bridge's.
    Unharmed,
    /// Damage, put back: a change too, so the next round looks again.
    Repaired,
    /// Damage, or no way to see: to be looked at again though nothing changes.
    Failed,
}

impl Shared {
    /// Checks the rules, and repairs them.
    fn check(&self, now: Instant, answer: &Answer) -> Seen {
        let State { firewall, policy, peace, comparison, .. } = &mut *self.state();
        // Its own change: the rules have just been read back.
        if matches!(answer, Answer::Generation(generation) if firewall.is_verified_at(*generation)) {
            self.status().failure = None;
            return Seen::Unharmed;
        }
        let (drift, changed) = match firewall.drift() {
            Ok(None) => {
                self.status().failure = None;
                return Seen::Unharmed;
            }
            Ok(Some(drift)) => drift,
            Err(error) => {
                self.status().failed(&error.to_string());
                return Seen::Failed;
            }
        };
        if !peace.may_repair(&drift, now) {
            self.status().failed(&format!(
                "{drift}, and is no longer put back at once: another program wants to be first there too \
                 (Calico: set chainInsertMode to Append)"
            ));
            return Seen::Failed;
        }
        if let Some(comparison) = comparison {
            comparison.add(&changed.tables, policy.mode, &mut self.status().divergence);
        }
        match firewall.repair(policy, &changed) {
            Ok(()) => {
                if comparison.is_some() {
                    *comparison = Comparison::begin(firewall).ok();
                }
                tracing::warn!("{drift}; repaired");
                let mut status = self.status();
                status.failure = None;
                status.repairs += 1;
                status.last_repair = Some((SystemTime::now(), drift));
                Seen::Repaired
            }
            Err(error) => {
                self.status().failed(&format!("{drift}; {error}"));
                Seen::Failed
            }
        }
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
