//! The gap meter: numbered packets of allowed flows and numbered probes that must not pass, both ways through the node,
//! at a given rate, while an event befalls the agent. It reports which packets were lost, which probes passed, and for
//! how long.

mod frames;
pub mod runs;
pub(crate) mod socket;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde::Serialize;

use self::frames::{Frames, Kind, Way};
use self::socket::{BATCH, Receiver, Sender};
use crate::lab::Lab;
use crate::wait::{eventually, patience};

/// Between two bursts of a sender.
const TICK: Duration = Duration::from_millis(1);
/// How long the last packets of a reading may take to arrive.
const PATIENCE: Duration = Duration::from_secs(2);
/// Measurement continues for this long after an event, for delayed effects.
const AFTER: Duration = Duration::from_millis(100);

/// Sends and receives until it is dropped.
#[derive(Debug)]
pub struct Meter {
    ways: [Arc<Traffic>; 2],
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<()>>>,
}

/// Packets in one direction.
#[derive(Debug, Default)]
struct Traffic {
    /// Frames sent of each kind: the next number.
    sent: [AtomicU64; 2],
    /// Numbers of allowed frames that were sent by then, a row for each burst.
    log: Mutex<Vec<(u64, Instant)>>,
    seen: Mutex<Seen>,
}

/// Packets that have arrived.
#[derive(Debug, Default)]
struct Seen {
    /// Bits by number.
    allowed: Vec<u64>,
    /// Numbers of probes that came through.
    probes: Vec<u64>,
    openings: u64,
    last: Option<Instant>,
    longest_silence: Duration,
}

/// Losses and leaks during an event.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Reading {
    /// Packets of allowed flows.
    pub sent: u64,
    /// Those of them that did not arrive.
    pub lost: u64,
    /// From the first lost packet to the last, at most, in milliseconds.
    pub lost_for_ms: f64,
    /// The longest time in which no allowed packet arrived, of either way, in milliseconds.
    pub silence_ms: f64,
    /// Packets that no rule allows.
    pub probes: u64,
    /// Those of them that arrived.
    pub leaked: u64,
    /// Duration of the event in milliseconds.
    pub took_ms: f64,
}

/// A moment, as the number of packets sent in each direction.
#[derive(Clone, Copy, Debug)]
pub struct Mark([[u64; 2]; 2]);

impl Traffic {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn log(&self) -> MutexGuard<'_, Vec<(u64, Instant)>> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sent(&self) -> [u64; 2] {
        [0, 1].map(|kind| self.sent[kind].load(Ordering::Acquire))
    }

    /// Numbers from `from` to `to` that have not arrived.
    fn missing(&self, from: u64, to: u64) -> Vec<u64> {
        let seen = self.seen();
        let has = |number: u64| {
            let word = usize::try_from(number / 64).ok().and_then(|index| seen.allowed.get(index));
            word.is_some_and(|word| word >> (number % 64) & 1 == 1)
        };
        (from..to).filter(|number| !has(*number)).collect()
    }

    /// When an allowed frame was sent, at the latest.
    fn sent_at(&self, number: u64) -> Option<Instant> {
        let log = self.log();
        let row = log.partition_point(|(until, _)| *until <= number);
        log.get(row).map(|(_, at)| *at)
    }
}

impl Seen {
    fn take(&mut self, frame: &[u8]) {
        match frames::read(frame) {
            Some((Kind::Allowed, number)) => {
                let index = usize::try_from(number / 64).unwrap_or(usize::MAX);
                if self.allowed.len() <= index {
                    self.allowed.resize(index + 1024, 0);
                }
                self.allowed[index] |= 1 << (number % 64);
                let now = Instant::now();
                let silence = self.last.replace(now).map_or(Duration::ZERO, |last| now - last);
                self.longest_silence = self.longest_silence.max(silence);
            }
            Some((Kind::Probe, number)) => self.probes.push(number),
            Some((Kind::Opening, _)) => self.openings += 1,
            None => {}
        }
    }
}

impl Meter {
    /// Opens the flows, and sends from then on: each way, `rate` packets of allowed flows in a second, and as many
    /// probes. The policy must allow the flows to be opened, [`runs::configuration`] for instance.
    ///
    /// # Errors
    /// A flow cannot be opened, or a socket.
    pub fn start(lab: &Lab, rate: u32) -> Result<Self> {
        frames::prepare(lab)?;
        let (a, c1) = (lab.a(), lab.c1());
        let mut meter = Self { ways: Default::default(), stop: Arc::default(), threads: Vec::new() };
        let receivers = [
            Receiver::new(&c1.netns, &c1.interface, frames::POD)?,
            Receiver::new(&a.netns, &a.interface, frames::EXTERNAL)?,
        ];
        for (traffic, receiver) in meter.ways.clone().into_iter().zip(receivers) {
            let stop = Arc::clone(&meter.stop);
            meter.threads.push(thread::spawn(move || receive(receiver, &traffic, &stop)));
        }
        let senders = || -> Result<[Sender; 2]> {
            Ok([Sender::new(&a.netns, &a.interface)?, Sender::new(&c1.netns, &c1.interface)?])
        };
        let openers = senders()?;
        for (way, frame) in frames::openings(lab) {
            let traffic = &meter.ways[way as usize];
            let before = traffic.seen().openings;
            eventually(patience(PATIENCE), || {
                openers[way as usize].send(&mut [frame.clone()]).ok()?;
                eventually(Duration::from_millis(50), || (traffic.seen().openings > before).then_some(()))
            })
            .with_context(|| format!("a flow could not be opened ({way:?})"))?;
        }
        for ((way, traffic), sender) in Way::BOTH.into_iter().zip(meter.ways.clone()).zip(senders()?) {
            let (stop, frames) = (Arc::clone(&meter.stop), Frames::of(lab, way));
            meter.threads.push(thread::spawn(move || send(&sender, frames, rate, &traffic, &stop)));
        }
        Ok(meter)
    }

    /// Now.
    #[must_use]
    pub fn mark(&self) -> Mark {
        Mark([0, 1].map(|way| self.ways[way].sent()))
    }

    /// Returns losses and leaks while `work` ran, and a moment after.
    ///
    /// # Errors
    /// Of `work`, or a thread of the meter has failed.
    pub fn while_doing<T>(&mut self, work: impl FnOnce(&Self) -> Result<T>) -> Result<(T, Reading)> {
        for traffic in &self.ways {
            let mut seen = traffic.seen();
            (seen.last, seen.longest_silence) = (None, Duration::ZERO);
        }
        let (begun, from) = (Instant::now(), self.mark());
        let done = work(self)?;
        let took = begun.elapsed();
        // Packets sent until then count too, and there must be some even if it took no time.
        let end = Instant::now() + AFTER;
        eventually(AFTER * 4, || (Instant::now() >= end).then_some(()));
        let mut reading = self.read(from, self.mark())?;
        reading.took_ms = milliseconds(took);
        Ok((done, reading))
    }

    /// Returns losses and leaks among the packets sent between two moments.
    ///
    /// # Errors
    /// A thread of the meter has failed.
    pub fn read(&mut self, from: Mark, to: Mark) -> Result<Reading> {
        if let Some(ended) = self.threads.iter().position(JoinHandle::is_finished) {
            let result = self.threads.swap_remove(ended).join();
            result.map_err(|_| anyhow::anyhow!("a thread of the meter panicked"))??;
            anyhow::bail!("a thread of the meter has ended");
        }
        let mut reading = Reading::default();
        for (way, traffic) in self.ways.iter().enumerate() {
            let ([first, first_probe], [last, last_probe]) = (from.0[way], to.0[way]);
            let missing = || traffic.missing(first, last);
            let missing = eventually(patience(PATIENCE), || Some(missing()).filter(Vec::is_empty))
                .unwrap_or_else(missing);
            if let [one, ..] = missing[..] {
                let end = missing.last().copied().unwrap_or(one);
                if let (Some(one), Some(end)) = (traffic.sent_at(one), traffic.sent_at(end)) {
                    reading.lost_for_ms = reading.lost_for_ms.max(milliseconds(end - one + TICK));
                }
            }
            let seen = traffic.seen();
            reading.sent += last - first;
            reading.lost += missing.len() as u64;
            reading.probes += last_probe - first_probe;
            let leaked = seen.probes.iter().filter(|number| (first_probe..last_probe).contains(number));
            reading.leaked += leaked.count() as u64;
            reading.silence_ms = reading.silence_ms.max(milliseconds(seen.longest_silence));
        }
        Ok(reading)
    }
}

impl Reading {
    /// Both, one after the other.
    #[must_use]
    pub fn and(self, other: &Self) -> Self {
        Self {
            sent: self.sent + other.sent,
            lost: self.lost + other.lost,
            lost_for_ms: self.lost_for_ms.max(other.lost_for_ms),
            silence_ms: self.silence_ms.max(other.silence_ms),
            probes: self.probes + other.probes,
            leaked: self.leaked + other.leaked,
            took_ms: self.took_ms.max(other.took_ms),
        }
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A reading has reported its failure.
            let _ = thread.join();
        }
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn receive(mut receiver: Receiver, traffic: &Traffic, stop: &AtomicBool) -> Result<()> {
    while !stop.load(Ordering::Relaxed) {
        let mut frames = Vec::with_capacity(BATCH);
        receiver.receive(|frame| frames.push(frame.to_vec()))?;
        let mut seen = traffic.seen();
        frames.iter().for_each(|frame| seen.take(frame));
    }
    Ok(())
}

fn send(sender: &Sender, mut frames: Frames, rate: u32, traffic: &Traffic, stop: &AtomicBool) -> Result<()> {
    let begun = Instant::now();
    let mut next = [0_u64; 2];
    while !stop.load(Ordering::Relaxed) {
        // Packets due by now; after a pause of this thread not all at once, which would overflow every queue.
        let due = u64::try_from(begun.elapsed().as_micros())?.saturating_mul(rate.into()) / 1_000_000;
        let burst = due.saturating_sub(next[0]).min(BATCH as u64);
        for (kind, templates) in [&mut frames.allowed, &mut frames.probes].into_iter().enumerate() {
            let count = templates.len();
            let mut batch: Vec<Vec<u8>> = Vec::with_capacity(BATCH);
            for number in next[kind]..next[kind] + burst {
                let template = &mut templates[usize::try_from(number)? % count];
                frames::number(template, number);
                batch.push(template.clone());
            }
            if !batch.is_empty() {
                sender.send(&mut batch)?;
            }
            next[kind] += burst;
            traffic.sent[kind].store(next[kind], Ordering::Release);
        }
        if burst > 0 {
            traffic.log().push((next[0], Instant::now()));
        }
        thread::sleep(TICK);
    }
    Ok(())
}
