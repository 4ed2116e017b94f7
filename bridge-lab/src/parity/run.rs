//! The same packets through every engine, and their verdicts.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use bridge_agent::datapath::{Maps, Pins};
use bridge_common::filter::fast_path::Outcome;

use super::engines::{ByEbpf, ByIptables, ByNftables, Engine, translating};
use super::expected::ENGINES;
use super::node::Node;
use super::{Case, Difference, Sent};
use crate::cpu::stay_on;
use crate::lab::Lab;

/// Packets of a policy, at least.
pub const PACKETS_PER_POLICY: usize = 500;
/// Seeds of cases that once showed a fault of an engine, and that fault.
pub const REGRESSIONS: [(u64, &str); 9] = [
    (68, "eBPF let a TCP header in fragments of 8 or 16 octets through to a denied NodePort"),
    (
        105,
        "eBPF answered a forged ACK of a handshake with an RST, and took that for the end of the handshake",
    ),
    (110, "eBPF let an IPv6 packet without next header through by a rule for any protocol"),
    (113, "eBPF denied a LAN router's ICMP error about a flow out of scope"),
    (
        80,
        "eBPF denied answers to a pod whose connection a Service led to a host outside of networks.external",
    ),
    (312, "eBPF denied a connection to an allowed NodePort whose backend is outside of networks.pods"),
    (100, "eBPF let pods of this node and of others send packets of tunnels to nodes"),
    (
        101,
        "the packet filters cut connections to an allowed NodePort that are masqueraded to a pod of another node",
    ),
    (126, "the packet filters took a node with an address in networks.pods for a pod"),
];
/// Cases that wait for a slower engine.
const AHEAD: usize = 2;
/// Maximum number of differences that are printed in full; the others are only counted.
const MAX_SHOWN: usize = 20;

/// Nodes that never hear of each other, each with one of [`ENGINES`].
///
/// Needs root, iproute2, ethtool, iptables, nftables and conntrack.
pub struct Nodes {
    /// In the order of [`ENGINES`].
    workers: [Worker; ENGINES.len()],
    /// Of the eBPF programs, without the shield and with it.
    pins: [Pins; 2],
    /// Its pins go with it, also after a crash.
    _lab: Lab,
}

/// Result of a run.
#[derive(Debug, Default)]
pub struct Report {
    /// Policies that were applied.
    pub policies: usize,
    /// Packets (datagrams, if they were sent in fragments) that went through every engine.
    pub packets: usize,
    /// How many of them came out of all.
    pub passed: usize,
    /// How many of the nodes that enforce by eBPF took the fast path.
    pub fast: u64,
    /// How many the shield dropped.
    pub shielded: u64,
    /// How many of the packets were in transit, or of an overlay.
    pub elsewhere: usize,
    /// How many of the packets a node had to translate.
    pub translated: usize,
    /// How many met each intended difference.
    pub intended: BTreeMap<Difference, usize>,
    /// How many were treated by an engine in another way than expected.
    pub unexplained: usize,
    /// How many times `explain` was asked about the rules of a packet filter.
    pub explained: usize,
    /// How many of its answers were wrong, or none.
    pub misexplained: usize,
    /// The first of those, with all that it takes to see them again.
    pub shown: Vec<String>,
    /// How long it took.
    pub took: Duration,
}

impl Report {
    /// Packets in a second.
    #[must_use]
    pub fn rate(&self) -> f64 {
        f64::from(u32::try_from(self.packets).unwrap_or(u32::MAX)) / self.took.as_secs_f64()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} policies", self.policies)?;
        let passed = 100 * self.passed / self.packets.max(1);
        writeln!(f, "{} packets through each engine, {passed} % passed all", self.packets)?;
        writeln!(f, "{} were in transit, or of an overlay", self.elsewhere)?;
        writeln!(f, "{} were to be translated", self.translated)?;
        writeln!(f, "{} took the fast path of eBPF", self.fast)?;
        writeln!(f, "{} were dropped by the shield", self.shielded)?;
        writeln!(f, "{:.0} packets per second ({:.0} s)", self.rate(), self.took.as_secs_f64())?;
        for difference in Difference::ALL {
            let count = self.intended.get(&difference).copied().unwrap_or_default();
            writeln!(f, "{count:7} differ as intended: {}", difference.name())?;
        }
        writeln!(f, "{:7} differ unexplained", self.unexplained)?;
        write!(f, "{} questions to explain, {} wrong answers", self.explained, self.misexplained)
    }
}

/// The packets of a case on one node.
struct Seen {
    /// Which came out.
    passed: Vec<bool>,
    /// Answers of `explain`; see [`Rules::ask`].
    explained: Vec<Option<Option<bool>>>,
}

struct Worker {
    cases: Option<SyncSender<Arc<Case>>>,
    verdicts: Receiver<Result<Seen>>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts an engine on a node of its own, on one CPU: packets must not overtake one another.
    fn start<E: Engine>(
        cpu: usize,
        engine: impl FnOnce(&Node) -> Result<E> + Send + 'static,
    ) -> Result<Self> {
        let node = Node::new()?;
        let (cases, next) = sync_channel::<Arc<Case>>(AHEAD);
        let (results, verdicts) = channel();
        let work = move |mut node: Node| -> Result<()> {
            stay_on(cpu)?;
            let mut engine = engine(&node)?;
            let mut judge = |case: &Case| -> Result<Seen> {
                engine.enforce(case)?;
                let (direct, translated) = case.sent.split_at(case.direct);
                let (plain, elsewhere) = direct.split_at(case.plain);
                let explained = engine.rules()?.map(|rules| rules.ask(plain)).unwrap_or_default();
                node.cut_off(case.policy.nodes.is_empty());
                let mut passed = node.send(plain)?;
                engine.forget()?;
                passed.extend(node.send(elsewhere)?);
                engine.forget()?;
                passed.extend(translating(&case.services, || node.send(translated))?);
                Ok(Seen { passed, explained })
            };
            for case in next {
                let seen = judge(&case).with_context(|| format!("seed {}", case.seed));
                if results.send(seen).is_err() {
                    break;
                }
            }
            Ok(())
        };
        let ns = Arc::clone(&node.ns);
        let thread = ns.spawn(move || {
            if let Err(error) = work(node) {
                eprintln!("{error:#}");
            }
        });
        Ok(Self { cases: Some(cases), verdicts, thread: Some(thread) })
    }

    fn next(&self) -> Result<Seen> {
        self.verdicts.recv().context("the engine has ended")?
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.cases = None;
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

impl Nodes {
    /// Makes the nodes, and starts the engines.
    ///
    /// # Errors
    /// A prerequisite is missing.
    pub fn new() -> Result<Self> {
        let lab = Lab::builder().pods(0).build()?;
        let directory = lab.pin_directory()?;
        let pins = ["parity", "shielded"].map(|name| Pins::new(directory.join(name)));
        let [plain, shielded] = pins.clone();
        let workers = [
            Worker::start(0, move |node| ByEbpf::new(node, plain, false))?,
            Worker::start(0, move |node| ByEbpf::new(node, shielded, true))?,
            Worker::start(1, |_| ByIptables::new())?,
            Worker::start(1, |_| ByNftables::new())?,
        ];
        Ok(Self { workers, pins, _lab: lab })
    }

    /// The case of each seed, through every engine.
    ///
    /// # Errors
    /// An engine refuses a policy, or a node falls silent.
    pub fn compare(self, seeds: &[u64], mut progress: impl FnMut(&Report)) -> Result<Report> {
        let start = Instant::now();
        let mut report = Report::default();
        thread::scope(|scope| {
            let (sender, cases) = sync_channel::<Arc<Case>>(AHEAD);
            let workers = self.workers.each_ref().map(|worker| worker.cases.clone());
            scope.spawn(move || {
                for seed in seeds {
                    let case = Arc::new(Case::new(*seed, PACKETS_PER_POLICY));
                    for to in workers.iter().flatten().chain([&sender]) {
                        // A receiver that has hung up reports the reason.
                        if to.send(Arc::clone(&case)).is_err() {
                            return;
                        }
                    }
                }
            });
            for case in cases {
                let nodes: Vec<Seen> = (ENGINES.into_iter().zip(&self.workers))
                    .map(|(engine, worker)| worker.next().context(engine))
                    .collect::<Result<_>>()?;
                report.add(&case, &nodes);
                report.took = start.elapsed();
                progress(&report);
            }
            for pins in &self.pins {
                let maps = Maps::open(pins)?;
                let outcomes = maps.outcome_counts()?;
                let fast = outcomes.iter().filter(|count| count.outcome == Outcome::forwarded.name());
                report.fast += fast.map(|count| count.packets).sum::<u64>();
                report.shielded += maps.shielded()?.packets;
            }
            Ok(report)
        })
    }
}

impl Report {
    /// Adds the verdicts of [`ENGINES`].
    fn add(&mut self, case: &Case, nodes: &[Seen]) {
        for (engine, node) in ENGINES.into_iter().zip(nodes) {
            self.add_explained(case, engine, node);
        }
        self.policies += 1;
        self.packets += case.sent.len();
        self.elsewhere += case.direct - case.plain;
        self.translated += case.sent.len() - case.direct;
        for (number, sent) in case.sent.iter().enumerate() {
            let seen: Vec<bool> =
                nodes.iter().map(|node| node.passed.get(number).copied().unwrap_or_default()).collect();
            if seen != sent.expected.by_engine() {
                self.unexplained += 1;
                if self.shown.len() < MAX_SHOWN {
                    self.shown.push(describe(case, number, &seen));
                }
            } else if let Some(difference) = sent.expected.difference() {
                *self.intended.entry(difference).or_default() += 1;
            } else if !seen.contains(&false) {
                self.passed += 1;
            }
        }
    }
}

impl Report {
    /// Compares the answers of `explain` with the verdicts of an engine.
    fn add_explained(&mut self, case: &Case, engine: &str, node: &Seen) {
        let each = node.explained.iter().zip(&node.passed).enumerate();
        for (number, (answer, passed)) in
            each.filter_map(|(at, (answer, passed))| Some((at, ((*answer)?, passed))))
        {
            self.explained += 1;
            if answer != Some(*passed) {
                self.misexplained += 1;
                if self.shown.len() < MAX_SHOWN {
                    let text = format!("explain says of {engine}: {answer:?}, seen: {passed}\n");
                    self.shown.push(text + &describe(case, number, &[*passed; ENGINES.len()]));
                }
            }
        }
    }
}

/// Everything about one packet, and those before it that may have mattered.
fn describe(case: &Case, number: usize, seen: &[bool]) -> String {
    let sent = &case.sent[number];
    let word = |passes: bool| if passes { "passes" } else { "is denied" };
    let mut text = format!("seed {}, packet {number}, {}\n", case.seed, sent.label);
    for (engine, (expected, seen)) in ENGINES.into_iter().zip(sent.expected.by_engine().into_iter().zip(seen))
    {
        let _ = writeln!(text, "  {engine}: expected: {}, seen: {}", word(expected), word(*seen));
    }
    let addresses = |sent: &Sent| {
        let (source, destination) = sent.packets[0].addresses();
        [source.min(destination), source.max(destination)]
    };
    let before = case.sent[..=number].iter().filter(|other| addresses(other) == addresses(sent));
    for (packet, other) in before.flat_map(|other| other.packets.iter().map(move |packet| (packet, other))) {
        let (source, destination) = packet.addresses();
        let hex: String = packet.ip().iter().map(|octet| format!("{octet:02x}")).collect();
        let _ = writeln!(text, "  from {:?}, {source} to {destination}, {}: {hex}", other.from, other.label);
    }
    let _ = writeln!(text, "  {:?}", case.policy);
    if number >= case.direct {
        let _ = writeln!(text, "  {:?}", case.services);
    }
    let _ = write!(text, "  again: cargo xtask parity --packets 1 --seed {}", case.seed);
    text
}
