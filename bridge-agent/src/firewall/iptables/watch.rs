//! Notices within a second that another program changed the rules, and mends them.
//!
//! Every round asks the kernel one cheap question, and reads the rules only if the answer is new:
//! - nf_tables numbers its rulesets: one netlink message. (Its notifications would bring every rule that anybody
//!   writes, 10,000 of them when a kube-proxy starts, to learn no more than that.)
//! - x_tables has no numbers and no notifications: a table's outline (rules, size, entry points) is asked for in every
//!   round, and less often its content is copied out and hashed without the counters.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use super::driver::Iptables;
use super::error::Error;
use super::kernel::{self, Legacy, Nft, Outline};
use super::programs::Backend;
use super::ruleset::{Family, Table};
use crate::firewall::{Firewall, Hits, Remains};
use crate::model::Policy;

/// Between two rounds.
const INTERVAL: Duration = Duration::from_millis(200);
/// Rounds must leave this many times their own duration free, up to [`LONGEST`].
const IDLE_SHARE: u32 = 19;
const LONGEST: Duration = Duration::from_millis(700);
/// Looks at the content of x_tables tables whose outline is as it was leave this many times their own duration free,
/// up to [`CONTENT_LONGEST`]. With few rules that is in every round.
const CONTENT_SHARE: u32 = 40;
const CONTENT_LONGEST: Duration = Duration::from_millis(600);
/// Another program that also wants to be first is let win for this long, after [`PATIENCE`] repairs in a row.
const TRUCE: Duration = Duration::from_secs(30);
const PATIENCE: u32 = 5;

/// What the watch has seen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// How often rules were put back.
    pub repairs: u64,
    /// What had become of them the last time, and when.
    pub last_repair: Option<(SystemTime, String)>,
    /// Why the rules could not be read or put back, if that is so now.
    pub failure: Option<String>,
}

/// A policy in force, and a thread that keeps it so.
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
    firewall: Iptables,
    policy: Policy,
    peace: Peace,
}

impl Guard {
    /// Puts `policy` in force, saves it, and watches from then on, in the network namespace of this thread.
    ///
    /// # Errors
    /// If it cannot be put in force. That it cannot be saved is told in the log and goes on.
    pub fn start(mut firewall: Iptables, policy: Policy) -> Result<Self, Error> {
        // Before the rules are written: what happens between that and the first round is then seen by it.
        let question = Question::open(firewall.backend())?;
        firewall.converge(&policy)?;
        save(&firewall, &policy);
        let state = Mutex::new(State { firewall, policy, peace: Peace::default() });
        let shared = Arc::new(Shared {
            state,
            status: Mutex::default(),
            stop: Mutex::new(false),
            stopped: Condvar::new(),
        });
        let thread = std::thread::Builder::new()
            .name("iptables-watch".into())
            .spawn({
                let shared = Arc::clone(&shared);
                move || watch(&shared, question)
            })
            .map_err(|source| Error::Kernel { what: "start a thread".into(), source })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Puts another policy in force and saves it. If it is refused, the one of before stays.
    ///
    /// # Errors
    /// If it cannot be put in force.
    pub fn update(&self, policy: Policy) -> Result<(), Error> {
        let mut state = self.shared.state();
        // A file that is written and a signal that says so are two reloads: the second keeps the counters.
        if policy == state.policy && matches!(state.firewall.drift(), Ok(None)) {
            save(&state.firewall, &policy);
            return Ok(());
        }
        if let Err(error) = state.firewall.converge(&policy) {
            // Tables are committed one by one: those before the refused one are taken back.
            let before = state.policy.clone();
            if let Err(again) = state.firewall.converge(&before) {
                // What was refused by then is in force; the watch goes on trying.
                tracing::error!("cannot go back to the rules of before: {again}");
            }
            return Err(error);
        }
        save(&state.firewall, &policy);
        state.policy = policy;
        Ok(())
    }

    /// Whether the watch goes on.
    #[must_use]
    pub const fn watches(&self) -> bool {
        self.thread.is_some()
    }

    /// The policy that is kept in force.
    #[must_use]
    pub fn policy(&self) -> Policy {
        self.shared.state().policy.clone()
    }

    /// What the watch has seen.
    #[must_use]
    pub fn status(&self) -> Status {
        self.shared.status().clone()
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
        *self.shared.stop.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.shared.stopped.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the watch over iptables had panicked");
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

    /// True if the watch is to end.
    fn pause(&self, pause: Duration) -> bool {
        let stop = self.stop.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.stopped.wait_timeout_while(stop, pause, |stop| !*stop);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

fn save(firewall: &Iptables, policy: &Policy) {
    match firewall.save(policy) {
        Ok(files) => files.iter().for_each(|file| tracing::info!(file = %file.display(), "rules saved")),
        Err(error) => tracing::error!("{error}"),
    }
}

fn watch(shared: &Shared, mut question: Question) {
    let mut known = None;
    let mut pause = INTERVAL;
    while !shared.pause(pause) {
        let begun = Instant::now();
        // Asked before the rules are read, so that a change in between is seen in the next round.
        match question.ask() {
            Ok(answer) if known.as_ref() == Some(&answer) => {}
            Ok(answer) => {
                let seen = shared.round(begun);
                if seen == Seen::Unharmed {
                    known = Some(answer);
                }
                if seen == Seen::Repaired {
                    // What did the damage may not be done with it: be back soon.
                    pause = INTERVAL;
                    continue;
                }
            }
            Err(error) => shared.status().failed(&format!("cannot ask the kernel for changes: {error}")),
        }
        pause = (begun.elapsed() * IDLE_SHARE).clamp(INTERVAL, LONGEST);
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
    /// Looks, and mends.
    fn round(&self, now: Instant) -> Seen {
        let State { firewall, policy, peace } = &mut *self.state();
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
        match firewall.repair(policy, &changed) {
            Ok(()) => {
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
    /// Told once in the log, not in every round.
    fn failed(&mut self, failure: &str) {
        if self.failure.as_deref() != Some(failure) {
            tracing::error!("{failure}");
            self.failure = Some(failure.to_owned());
        }
    }
}

/// Keeps two programs that both put their jump first from doing nothing else.
#[derive(Debug, Default)]
struct Peace {
    last: Option<Instant>,
    in_a_row: u32,
}

impl Peace {
    fn may_repair(&mut self, drift: &str, now: Instant) -> bool {
        if !drift.ends_with("no longer first") {
            return true;
        }
        let since = self.last.map(|last| now.saturating_duration_since(last));
        match since {
            Some(since) if since < TRUCE && self.in_a_row >= PATIENCE => return false,
            Some(since) if since < TRUCE => self.in_a_row += 1,
            _ => self.in_a_row = 1,
        }
        self.last = Some(now);
        true
    }
}

/// The cheap question, and what it needs to be asked.
#[derive(Debug)]
enum Question {
    Nft(Nft),
    Legacy(Box<LegacyTables>),
}

/// Anything that is equal as long as nothing changed.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Answer {
    Generation(u32),
    Tables(BTreeMap<(Family, Table), (Outline, u64)>),
}

/// The outlines of tables are asked for in every round, their content in some.
#[derive(Debug, Default)]
struct LegacyTables {
    sockets: BTreeMap<Family, Legacy>,
    known: BTreeMap<(Family, Table), (Outline, u64)>,
    /// When the content was last read, and how long after that it is to be read again.
    read: Option<(Instant, Duration)>,
}

impl Question {
    fn open(backend: Backend) -> Result<Self, Error> {
        match backend {
            Backend::Nft => Nft::open()
                .map(Self::Nft)
                .map_err(|source| Error::Kernel { what: "open a socket to nf_tables".into(), source }),
            Backend::Legacy => {
                // A kernel without IPv6 has no tables of it either.
                let sockets =
                    Family::ALL.into_iter().filter_map(|f| Some((f, Legacy::open(f).ok()?))).collect();
                Ok(Self::Legacy(Box::new(LegacyTables { sockets, ..LegacyTables::default() })))
            }
        }
    }

    fn ask(&mut self) -> io::Result<Answer> {
        match self {
            Self::Nft(nft) => nft.generation().map(Answer::Generation),
            Self::Legacy(tables) => tables.ask().map(Answer::Tables),
        }
    }
}

impl LegacyTables {
    fn ask(&mut self) -> io::Result<BTreeMap<(Family, Table), (Outline, u64)>> {
        // A rule replaced by another of the same size, or two that changed places, show in the content alone.
        let read = self.read.is_none_or(|(last, pause)| last.elapsed() >= pause);
        let begun = Instant::now();
        let mut now = BTreeMap::new();
        for (family, socket) in &self.sockets {
            let there = kernel::legacy_tables(*family);
            for table in Table::ALL.into_iter().filter(|table| there.iter().any(|name| name == table.name()))
            {
                let outline = socket.outline(table)?;
                let content = match self.known.get(&(*family, table)) {
                    Some((known, content)) if !read && *known == outline => *content,
                    _ => socket.fingerprint(table, &outline)?,
                };
                now.insert((*family, table), (outline, content));
            }
        }
        if read {
            self.read = Some((begun, (begun.elapsed() * CONTENT_SHARE).min(CONTENT_LONGEST)));
        }
        self.known.clone_from(&now);
        Ok(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_insists_on_being_first_is_let_win_for_a_while() {
        let mut peace = Peace::default();
        let start = Instant::now();
        let drift = "IPv4 table filter, chain FORWARD: the jump to bridge is no longer first";
        for round in 0..PATIENCE {
            assert!(peace.may_repair(drift, start + Duration::from_secs(u64::from(round))));
        }
        assert!(!peace.may_repair(drift, start + Duration::from_secs(6)));
        assert!(peace.may_repair("IPv4 table filter: chain BRIDGE-FORWARD was removed", start));
        assert!(peace.may_repair(drift, start + Duration::from_secs(6) + TRUCE));
    }
}
