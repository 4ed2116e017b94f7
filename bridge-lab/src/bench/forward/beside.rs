//! New connections beside a flood of packets that no rule allows: how many are lost, and how long the others take.

use std::fmt::Write as _;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde::Serialize;
use socket2::SockRef;

use super::contender::Contender;
use super::figures::Spread;
use super::packets::{FORWARDING, GENERATING, WATCHING, claim};
use super::place::{Denied, Place};
use super::ruleset::ALLOWED;
use super::table::{aligned, grouped};
use super::traffic::{Effort, received};
use crate::lab::Lab;

/// A connection that takes longer is lost: a SYN is sent again after a second.
const LOST: Duration = Duration::from_millis(200);
/// From the end of one connection to the next, so that the flood has the CPUs most of the time.
const PAUSE: Duration = Duration::from_micros(500);
/// How long the server waits for a connection before it looks whether there will be more.
const PATIENCE: Duration = Duration::from_millis(20);

/// Connections tried, one after the other.
#[derive(Clone, Copy, Debug, Serialize)]
struct Connections {
    tried: u32,
    lost: u32,
    /// Microseconds that 99 of 100 of the others took at most.
    p99: f64,
    /// Packets a second that the node took off the cable meanwhile, by the clock.
    rate: f64,
}

/// New connections with a contender, without a flood and beside one; an element for each round.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Beside {
    contender: &'static str,
    #[serde(skip)]
    pub(super) which: Contender,
    pub(super) rules: u32,
    idle: Vec<Connections>,
    flooded: Vec<Connections>,
}

impl Beside {
    pub(super) fn new(which: Contender, rules: u32) -> Self {
        Self { contender: which.key(), which, rules, idle: Vec::new(), flooded: Vec::new() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.flooded.is_empty()
    }

    /// Measures one round.
    ///
    /// # Errors
    /// Without a flood no connection succeeds, or the flood cannot be sent.
    pub(super) fn sample(&mut self, place: &mut Place, effort: &Effort) -> Result<()> {
        let idle = connections(&place.lab, effort.sockets)?;
        ensure!(idle.tried > idle.lost, "no connection without a flood");
        let (stream, first) = (place.denied(Denied::Udp), place.next_packet);
        let lab = &place.lab;
        let (flooded, next) = place.packets.flood(&stream, &place.cable, first, |counts| {
            Ok((connections(lab, effort.sockets)?, counts.made()?))
        })?;
        place.next_packet = next;
        self.idle.push(idle);
        self.flooded.push(flooded);
        Ok(())
    }

    /// Percentage of connections lost beside the flood.
    pub(super) fn loss(&self) -> f64 {
        let sum = |of: fn(&Connections) -> u32| f64::from(self.flooded.iter().map(of).sum::<u32>());
        sum(|run| run.lost) / sum(|run| run.tried).max(1.0) * 100.0
    }

    /// Times beside the flood to those without it, round by round.
    pub(super) fn slowdown(&self) -> Option<Spread> {
        let ratios: Vec<_> = self.flooded.iter().zip(&self.idle).map(|(a, b)| a.p99 / b.p99).collect();
        Spread::of(&ratios)
    }
}

fn median(runs: &[Connections], of: fn(&Connections) -> f64) -> f64 {
    let values: Vec<_> = runs.iter().map(of).collect();
    Spread::of(&values).map_or(0.0, |spread| spread.median)
}

/// Connects from the LAN host to the first pod for this long.
fn connections(lab: &Lab, window: Duration) -> Result<Connections> {
    let address = SocketAddr::new(lab.c1().v4.into(), ALLOWED.0 + 2);
    let listener = lab.c1().netns.run(|| TcpListener::bind(address)).context("listen in the pod")?;
    SockRef::from(&listener).set_read_timeout(Some(PATIENCE))?;
    let over = AtomicBool::new(false);
    let node = &lab.b().netns;
    let client = || -> Result<Connections> {
        claim(0, GENERATING, WATCHING)?;
        let (mut tried, mut times, start, before) = (0, Vec::new(), Instant::now(), received(node)?);
        while start.elapsed() < window {
            let begin = Instant::now();
            tried += 1;
            match TcpStream::connect_timeout(&address, LOST) {
                Ok(stream) => {
                    times.push(begin.elapsed().as_secs_f64() * 1e6);
                    // Ends by a reset, which leaves nothing behind.
                    SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
                }
                Err(error) if error.kind() == ErrorKind::TimedOut => {}
                Err(error) => return Err(error).context("connect to the pod"),
            }
            thread::sleep(PAUSE);
        }
        times.sort_by(f64::total_cmp);
        let rate = (received(node)? - before) as f64 / start.elapsed().as_secs_f64();
        let p99 = times.get(times.len() * 99 / 100).copied().unwrap_or(LOST.as_secs_f64() * 1e6);
        Ok(Connections { tried, lost: tried - u32::try_from(times.len())?, p99, rate })
    };
    thread::scope(|scope| {
        let server = scope.spawn(|| -> Result<()> {
            claim(0, FORWARDING, WATCHING)?;
            while !over.load(Ordering::Acquire) {
                // Times out, or takes one.
                drop(listener.accept());
            }
            Ok(())
        });
        let seen = lab.a().netns.run(client);
        over.store(true, Ordering::Release);
        server.join().expect("no panic in a server")?;
        seen
    })
}

/// The table of all of them.
pub(super) fn markdown(besides: &[Beside]) -> String {
    let mut rules: Vec<_> = besides.iter().map(|beside| beside.rules).collect();
    rules.sort_unstable();
    rules.dedup();
    let mut text = String::new();
    for rules in rules {
        let header = ["contender", "flood", "lost", "p99 idle", "p99 beside", "ratio (range)"];
        let mut rows = vec![header.map(str::to_owned).to_vec()];
        for beside in besides.iter().filter(|beside| beside.rules == rules) {
            let ratio = beside.slowdown().map_or_else(String::new, |ratio| {
                format!("**{:.2}** ({:.2}–{:.2})", ratio.median, ratio.least, ratio.most)
            });
            rows.push(vec![
                beside.which.title().to_owned(),
                format!("{}/s", grouped(median(&beside.flooded, |run| run.rate))),
                format!("{:.1} %", beside.loss()),
                format!("{} µs", grouped(median(&beside.idle, |run| run.p99))),
                format!("{} µs", grouped(median(&beside.flooded, |run| run.p99))),
                ratio,
            ]);
        }
        let rules = grouped(f64::from(rules));
        write!(text, "\n**new connections beside a denied UDP flood, {rules} rules**\n\n{}", aligned(&rows))
            .expect("writing to a string");
    }
    text
}
