//! The last events, numbered, for any number of readers.
//!
//! Readers share one bounded ring and hold a position each: a slow reader costs no memory, and loses the oldest events.

use std::{
    collections::VecDeque,
    fmt,
    ops::Deref,
    str::FromStr,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use serde::Serialize;
use tokio::sync::watch;

use crate::{datapath::Verdict, kernel::lock::lock, routes::RouteEvent};

/// Events that are kept: a reader that lags behind by more loses some.
const CAPACITY: usize = 1024;

/// An event of this node.
#[derive(Clone, Debug)]
pub enum Event {
    /// A verdict on a packet.
    Verdict(Arc<Logged<Verdict>>),
    /// A change of a route, a next hop or a discovered pod.
    Route(Arc<Logged<RouteEvent>>),
}

/// A value and its JSON, which is made once for all readers.
#[derive(Debug)]
pub struct Logged<T> {
    value: Arc<T>,
    json: OnceLock<String>,
}

impl<T: Serialize> Logged<T> {
    /// A value that is about to be published.
    pub fn new(value: impl Into<Arc<T>>) -> Arc<Self> {
        Arc::new(Self { value: value.into(), json: OnceLock::new() })
    }

    /// Returns its JSON.
    pub fn json(&self) -> &str {
        // None of the types of events can fail to be serialized.
        self.json.get_or_init(|| serde_json::to_string(&*self.value).unwrap_or_default())
    }
}

impl<T> Deref for Logged<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

/// Position of an event: the run of the agent, and its number in it. Readers resume after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventId {
    run: u64,
    number: u64,
}

/// A text that is not the id of an event.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not the id of an event: repeat the last `id` that was received")]
pub struct InvalidEventId(String);

impl fmt::Display for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}-{}", self.run, self.number)
    }
}

impl FromStr for EventId {
    type Err = InvalidEventId;

    fn from_str(text: &str) -> Result<Self, InvalidEventId> {
        let parse = || {
            let (run, number) = text.split_once('-')?;
            Some(Self { run: u64::from_str_radix(run, 16).ok()?, number: number.parse().ok()? })
        };
        parse().ok_or_else(|| InvalidEventId(text.to_owned()))
    }
}

/// Received by a reader.
#[derive(Clone, Debug)]
pub enum Received<E = Event> {
    /// An event with its id.
    Event(EventId, E),
    /// The reader lost events: they were overwritten before it took them.
    Missed(u64),
    /// The reader resumed after an event of another run of the agent; events of this run follow.
    Restarted,
}

/// First event that a reader wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// The last events that are kept, at most this many, and later ones.
    Last(usize),
    /// Events after this one.
    After(EventId),
}

/// Events of one run of the agent. Clones share it.
pub struct Journal<E = Event>(Arc<Inner<E>>);

struct Inner<E> {
    run: u64,
    ring: Mutex<Ring<E>>,
    /// Number of the next event.
    next: watch::Sender<u64>,
    missed: AtomicU64,
}

struct Ring<E> {
    /// The last one has the number `next - 1`.
    events: VecDeque<E>,
    next: u64,
}

impl<E> Ring<E> {
    fn oldest(&self) -> u64 {
        self.next - self.events.len() as u64
    }
}

impl<E> Clone for Journal<E> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<E> fmt::Debug for Journal<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Journal").finish_non_exhaustive()
    }
}

impl<E> Default for Journal<E> {
    fn default() -> Self {
        let inner = Inner {
            run: rand::random(),
            ring: Mutex::new(Ring { events: VecDeque::new(), next: 0 }),
            next: watch::Sender::default(),
            missed: AtomicU64::new(0),
        };
        Self(Arc::new(inner))
    }
}

impl<E: Clone> Journal<E> {
    /// Appends an event; evicts the oldest one of a full ring.
    pub fn publish(&self, event: E) {
        let mut ring = lock(&self.0.ring);
        if ring.events.len() == CAPACITY {
            ring.events.pop_front();
        }
        ring.events.push_back(event);
        ring.next += 1;
        let next = ring.next;
        drop(ring);
        self.0.next.send_replace(next);
    }

    /// Events that readers lost so far, over all readers.
    #[must_use]
    pub fn missed(&self) -> u64 {
        self.0.missed.load(Ordering::Relaxed)
    }

    /// Returns a reader of the events from `start` on.
    #[must_use]
    pub fn read(&self, start: Start) -> Reader<E> {
        let changes = self.0.next.subscribe();
        let ring = lock(&self.0.ring);
        let (position, restarted) = match start {
            Start::Last(count) => (ring.next.saturating_sub(count as u64).max(ring.oldest()), false),
            Start::After(id) if id.run == self.0.run => (id.number.saturating_add(1).min(ring.next), false),
            Start::After(_) => (ring.oldest(), true),
        };
        drop(ring);
        Reader { journal: self.clone(), changes, position, restarted }
    }
}

/// A reader of the journal, at its position.
#[derive(Debug)]
pub struct Reader<E = Event> {
    journal: Journal<E>,
    changes: watch::Receiver<u64>,
    position: u64,
    restarted: bool,
}

impl<E: Clone> Reader<E> {
    /// Waits for the next event. May be cancelled.
    pub async fn next(&mut self) -> Received<E> {
        if std::mem::take(&mut self.restarted) {
            return Received::Restarted;
        }
        loop {
            if let Some(received) = self.take() {
                return received;
            }
            let position = self.position;
            // The sender lives as long as the journal, which `self` holds.
            drop(self.changes.wait_for(|next| *next > position).await);
        }
    }

    fn take(&mut self) -> Option<Received<E>> {
        let Inner { run, ring, missed, .. } = &*self.journal.0;
        let ring = lock(ring);
        let lost = ring.oldest().saturating_sub(self.position);
        if lost > 0 {
            self.position = ring.oldest();
            missed.fetch_add(lost, Ordering::Relaxed);
            return Some(Received::Missed(lost));
        }
        let index = usize::try_from(self.position - ring.oldest()).ok()?;
        let event = ring.events.get(index)?.clone();
        let id = EventId { run: *run, number: self.position };
        self.position += 1;
        Some(Received::Event(id, event))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routes::EventKind;

    fn event(text: impl ToString) -> Event {
        let (time, kind) = (String::new(), EventKind::RouteAdded);
        Event::Route(Logged::new(RouteEvent { time, kind, text: text.to_string() }))
    }

    fn publish(journal: &Journal, numbers: std::ops::Range<usize>) {
        numbers.for_each(|number| journal.publish(event(number)));
    }

    fn block_on<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(work)
    }

    /// Reads until `last`, and shows each event by its text.
    fn read(reader: &mut Reader, last: &str) -> Vec<String> {
        let mut texts = Vec::new();
        while texts.last().is_none_or(|text| text != last) {
            texts.push(match block_on(reader.next()) {
                Received::Event(_, Event::Route(event)) => event.text.clone(),
                Received::Event(_, Event::Verdict(_)) => unreachable!("none was published"),
                Received::Missed(count) => format!("missed {count}"),
                Received::Restarted => "restarted".to_owned(),
            });
        }
        texts
    }

    #[test]
    fn readers_start_at_the_end_or_before_it() {
        let journal = Journal::default();
        publish(&journal, 0..10);
        let (mut live, mut history) = (journal.read(Start::Last(0)), journal.read(Start::Last(3)));
        let mut all = journal.read(Start::Last(usize::MAX));
        publish(&journal, 10..12);
        assert_eq!(read(&mut live, "11"), ["10", "11"]);
        assert_eq!(read(&mut history, "11"), ["7", "8", "9", "10", "11"]);
        assert_eq!(read(&mut all, "11").len(), 12);
    }

    #[test]
    fn a_reader_resumes_after_an_id() {
        let journal = Journal::default();
        publish(&journal, 0..10);
        let Received::Event(id, _) = block_on(journal.read(Start::Last(4)).next()) else {
            panic!("no event")
        };
        let id: EventId = id.to_string().parse().unwrap();
        assert_eq!(read(&mut journal.read(Start::After(id)), "9"), ["7", "8", "9"]);
        publish(&journal, 10..10 + CAPACITY);
        let last = (9 + CAPACITY).to_string();
        let texts = read(&mut journal.read(Start::After(id)), &last);
        assert_eq!((texts[0].as_str(), texts[1].as_str(), texts.len()), ("missed 3", "10", CAPACITY + 1));
        assert_eq!(journal.missed(), 3);
    }

    #[test]
    fn a_reader_of_another_run_gets_every_event_of_this_one() {
        let (before, after) = (Journal::default(), Journal::default());
        publish(&before, 0..9);
        publish(&after, 0..2);
        let Received::Event(id, _) = block_on(before.read(Start::Last(1)).next()) else { panic!("no event") };
        assert_eq!(read(&mut after.read(Start::After(id)), "1"), ["restarted", "0", "1"]);
    }

    #[test]
    fn a_slow_reader_loses_the_oldest_events_and_holds_no_memory() {
        let journal = Journal::default();
        let mut slow = journal.read(Start::Last(0));
        let Event::Route(first) = event("first") else { unreachable!() };
        journal.publish(Event::Route(Arc::clone(&first)));
        publish(&journal, 0..3 * CAPACITY);
        assert_eq!(Arc::strong_count(&first), 1, "the journal or a reader holds an evicted event");
        let last = (3 * CAPACITY - 1).to_string();
        let texts = read(&mut slow, &last);
        assert_eq!((texts[0].clone(), texts.len()), (format!("missed {}", 2 * CAPACITY + 1), CAPACITY + 1));
    }

    #[test]
    fn ids_that_no_agent_sent_are_refused_or_harmless() {
        for text in ["", "-", "1", "x-1", "1-", "1--1", "1-18446744073709551616", "1-1-1"] {
            assert!(text.parse::<EventId>().is_err(), "{text}");
        }
        let journal = Journal::default();
        publish(&journal, 0..2);
        let beyond = EventId { run: journal.0.run, number: u64::MAX };
        let mut reader = journal.read(Start::After(beyond));
        publish(&journal, 2..3);
        assert_eq!(read(&mut reader, "2"), ["2"]);
    }
}
