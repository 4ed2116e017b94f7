//! The same packets through the programs and through the model.

use std::{
    collections::BTreeMap,
    fmt,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use bridge_common::filter::{counters::Reason, flow::state, policy::direction};

use super::{
    explain::Explainer,
    header, traffic,
    traffic::Step,
    verdict::{Expected, Model, Regime},
};
use crate::{
    parity::dice::Dice,
    prog::{Action, Node, Place},
};
use bridge_agent::{
    datapath::Behaviour,
    model::{Mode, OnDeny},
};

/// Rounds of a case; each begins without flows.
const ROUNDS: usize = 10;
/// Steps of a round, at least; some are no packets.
const STEPS: usize = 2100;
/// How many packets at least go through the two policies of a seed.
pub const PACKETS_PER_CASE: u64 = 20_000;

/// Outcome of a packet: verdict, reason, protocol.
type Met = (&'static str, &'static str, &'static str);

/// Result of a comparison.
#[derive(Default)]
pub struct Report {
    /// Packets sent.
    pub packets: u64,
    /// Packets that `bridge-agent explain` was asked about as well.
    pub explained: u64,
    /// Packets that the shield dropped; it is there in every other case.
    pub shielded: u64,
    /// Packets by verdict, reason and protocol.
    pub met: BTreeMap<Met, u64>,
    /// Where model and programs disagree: one at most for each thread.
    pub differences: Vec<Difference>,
    /// From the first packet to the last.
    pub took: Duration,
}

/// Where model and programs disagree.
pub struct Difference {
    /// Of the case.
    pub seed: u64,
    /// The two policies.
    pub regimes: Vec<Regime>,
    /// As few as still show it; the last is the one that is judged differently.
    pub steps: Vec<Step>,
    /// Packets sent by this thread before it was found.
    pub after: u64,
    /// The model's verdict.
    pub expected: String,
    /// The program's verdict.
    pub seen: String,
}

/// Sends at least `packets` packets, of the cases from `seed` on, with a node for each processor.
///
/// # Errors
/// The programs cannot be loaded or run.
pub fn compare(seed: u64, packets: u64, progress: impl Fn(u64) + Sync) -> Result<Report> {
    let start = Instant::now();
    let cases = packets.div_ceil(PACKETS_PER_CASE);
    let (next, sent, over) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let work = || -> Result<Report> {
        let mut report = Report::default();
        let mut programs = None;
        while !over.load(Ordering::Relaxed) {
            let case = next.fetch_add(1, Ordering::Relaxed);
            if case >= cases {
                break;
            }
            let before = report.packets;
            run_case(seed.wrapping_add(case), &mut programs, &mut report)?;
            let all = sent.fetch_add(report.packets - before, Ordering::Relaxed);
            progress(all + report.packets - before);
            if !report.differences.is_empty() {
                over.store(true, Ordering::Relaxed);
            }
        }
        Ok(report)
    };
    let threads = std::thread::available_parallelism()?.get();
    let mut whole = Report::default();
    std::thread::scope(|scope| -> Result<()> {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        for thread in threads {
            let Ok(report) = thread.join() else { anyhow::bail!("a thread panicked") };
            let report = report?;
            whole.packets += report.packets;
            whole.explained += report.explained;
            whole.shielded += report.shielded;
            whole.differences.extend(report.differences);
            for (met, count) in report.met {
                *whole.met.entry(met).or_default() += count;
            }
        }
        Ok(())
    })?;
    whole.took = start.elapsed();
    Ok(whole)
}

/// The programs, and in which slots the policies of a case are.
struct Programs {
    node: Node,
    slots: Vec<u32>,
    /// Whether the shield is there. No packet is answered then: the shield passes those that are.
    shielded: bool,
}

fn run_case(seed: u64, programs: &mut Option<Programs>, report: &mut Report) -> Result<()> {
    let mut dice = Dice::new(seed);
    let regimes = traffic::regimes(&mut dice);
    let programs = Programs::prepare(programs, &regimes, seed % 2 == 1)
        .with_context(|| format!("policies of seed {seed}"))?;
    for _ in 0..ROUNDS {
        let steps = traffic::round(&mut dice, &regimes, STEPS);
        if let Some((index, _, _)) = programs.run(&regimes, &steps, Some(report))? {
            let after = report.packets;
            let steps = programs.minimised(&regimes, steps[..=index].to_vec())?;
            let (_, expected, seen) = programs
                .run(&regimes, &steps, None)?
                .context("the difference is gone when it is repeated")?;
            report.differences.push(Difference { seed, regimes, steps, after, expected, seen });
            break;
        }
    }
    Ok(())
}

impl Programs {
    fn prepare<'a>(
        programs: &'a mut Option<Self>,
        regimes: &[Regime],
        shielded: bool,
    ) -> Result<&'a mut Self> {
        if programs.is_none() {
            let node = Node::with_room(&regimes[0].policy, &behaviour_of(&regimes[0], shielded), 1 << 16)?;
            *programs = Some(Self { node, slots: Vec::new(), shielded });
        }
        let programs = programs.as_mut().context("made just now")?;
        programs.slots.clear();
        programs.shielded = shielded;
        programs.node.set_shield(shielded);
        for regime in regimes {
            programs.node.publish(&regime.policy, &behaviour_of(regime, shielded))?;
            programs.slots.push(programs.node.slot());
        }
        Ok(programs)
    }

    /// Runs the steps on both sides. Returns the index of the first that differs, and both results.
    fn run(
        &mut self,
        regimes: &[Regime],
        steps: &[Step],
        mut report: Option<&mut Report>,
    ) -> Result<Option<(usize, String, String)>> {
        self.node.forget_flows()?;
        self.node.host_none()?;
        self.node.put_in_force(self.slots[0])?;
        let mut explainer = Explainer::new(&mut self.node, &self.slots)?;
        let mut model = Model::new(regimes.to_vec());
        for (index, step) in steps.iter().enumerate() {
            match step {
                Step::Age(key, seconds) => {
                    self.node.age_if_known(&key.of_table(), Duration::from_secs(*seconds));
                    model.age(key, *seconds);
                }
                Step::Switch(to) => {
                    self.node.put_in_force(self.slots[*to])?;
                    model.activate(*to);
                    explainer.activate(*to);
                }
                Step::Host(pod, interface) => {
                    if *interface != 0 || model.is_hosted(*pod) {
                        self.node.host(*pod, *interface)?;
                    }
                    model.host(*pod, *interface);
                    explainer.host(*pod, *interface);
                }
                Step::Packet(place, frame) => {
                    let mut expected = model.judge(*place, frame);
                    if self.shielded && expected.action == Action::Answer {
                        expected.action = Action::Drop;
                    }
                    if let Some(key) = model.moved() {
                        // The flow cache notes no numbers.
                        self.node.forget_cached(&key.of_table());
                    }
                    let answer = explainer.ask(*place, frame, regimes)?;
                    let judged = self.node.run(*place, frame)?;
                    let seen =
                        Expected { action: judged.action, counted: judged.counted, audited: judged.audited };
                    if let Some(report) = &mut report {
                        report.packets += 1;
                        report.shielded += u64::from(judged.shielded);
                        *report.met.entry(met(frame, &expected)).or_default() += 1;
                    }
                    if seen != expected {
                        return Ok(Some((index, expected.to_string(), seen.to_string())));
                    }
                    if let Some(answer) = answer {
                        if let Some((expected, seen)) = explainer.check(&answer, *place, &judged, regimes)? {
                            return Ok(Some((index, expected, seen)));
                        }
                        if let Some(report) = &mut report {
                            report.explained += 1;
                        }
                    }
                    if expected.action == Action::Next && judged.frame != *frame {
                        let seen = format!("passes, changed to {}", hex(&judged.frame));
                        return Ok(Some((index, "passes unchanged".to_owned(), seen)));
                    }
                }
            }
        }
        Ok(None)
    }

    /// Leaves out steps, many at a time and then fewer, for as long as the last one is judged differently.
    fn minimised(&mut self, regimes: &[Regime], mut steps: Vec<Step>) -> Result<Vec<Step>> {
        let mut length = steps.len() / 2;
        while length > 0 {
            let mut start = 0;
            while start + 1 < steps.len() {
                let end = (start + length).min(steps.len() - 1);
                let fewer = [&steps[..start], &steps[end..]].concat();
                match self.run(regimes, &fewer, None)? {
                    Some((index, _, _)) => {
                        steps = fewer;
                        steps.truncate(index + 1);
                    }
                    None => start = end,
                }
            }
            length /= 2;
        }
        Ok(steps)
    }
}

fn behaviour_of(regime: &Regime, shielded: bool) -> Behaviour {
    let mut timeouts = [0; state::COUNT];
    for (nanoseconds, seconds) in timeouts.iter_mut().zip(regime.timeouts) {
        *nanoseconds = seconds * 1_000_000_000;
    }
    Behaviour {
        timeouts,
        audit: regime.policy.mode == Mode::Audit,
        reject: regime.policy.on_deny == OnDeny::Reject,
        events_per_second: 0,
        answers_per_second: if shielded { 0 } else { u32::MAX },
        report_allowed: false,
    }
}

fn met(frame: &[u8], expected: &Expected) -> Met {
    let protocol = header::frame(frame).map_or("not IP", |header| match header.protocol {
        header::TCP => "TCP",
        header::UDP => "UDP",
        header::SCTP => "SCTP",
        header::ICMP => "ICMP",
        header::ICMPV6 => "ICMPv6",
        _ => "other",
    });
    let verdict = match (expected.action, expected.counted, expected.audited) {
        (Action::Drop, ..) => "drop",
        (Action::Answer, ..) => "reject",
        (Action::Next, None, None) => "not judged",
        (Action::Next, _, Some(_)) => "audit",
        (Action::Next, Some(_), None) => "allow",
    };
    let counted = expected.counted.or(expected.audited);
    (verdict, counted.map_or("-", |(_, reason)| reason.name()), protocol)
}

impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = |count: Option<(u8, Reason)>| {
            count.map_or("-".to_owned(), |(direction, reason)| {
                format!("{} {}", direction::NAMES[usize::from(direction)], reason.name())
            })
        };
        write!(f, "{:?}, counted: {}, audited: {}", self.action, text(self.counted), text(self.audited))
    }
}

impl Report {
    /// Packets in a second.
    #[must_use]
    pub fn rate(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "a rate")]
        let packets = self.packets as f64;
        packets / self.took.as_secs_f64()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const PROTOCOLS: [&str; 7] = ["TCP", "UDP", "SCTP", "ICMP", "ICMPv6", "other", "not IP"];
        let mut table = comfy_table::Table::new();
        table.load_preset(comfy_table::presets::ASCII_MARKDOWN);
        table.set_header(["reason", "verdict"].iter().chain(&PROTOCOLS));
        let mut rows: Vec<_> = self.met.keys().map(|(verdict, reason, _)| (*reason, *verdict)).collect();
        rows.sort_unstable();
        rows.dedup();
        for (reason, verdict) in rows {
            let count = |protocol: &&'static str| {
                let count = self.met.get(&(verdict, reason, *protocol)).copied().unwrap_or_default();
                if count == 0 { "-".to_owned() } else { count.to_string() }
            };
            let cells = PROTOCOLS.iter().map(count);
            table.add_row([reason.to_owned(), verdict.to_owned()].into_iter().chain(cells));
        }
        writeln!(f, "{table}")?;
        write!(
            f,
            "{} packets, {} of them explained, {} dropped by the shield, in {:.1} s, {:.0} per second, {} differences",
            self.packets,
            self.explained,
            self.shielded,
            self.took.as_secs_f64(),
            self.rate(),
            self.differences.len()
        )
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "difference after {} packets, policies of seed {}:", self.after, self.seed)?;
        for (index, regime) in self.regimes.iter().enumerate() {
            let policy = serde_json::to_string(&regime.policy).map_err(|_| fmt::Error)?;
            writeln!(f, "policy {index}: {policy}\n  timeouts {:?}", regime.timeouts)?;
        }
        for step in &self.steps {
            match step {
                Step::Packet(Place { hook, input }, frame) => {
                    let header = header::frame(frame);
                    writeln!(f, "{} from {input} {}\n  {header:?}", hook.name(), hex(frame))?;
                }
                Step::Host(pod, 0) => writeln!(f, "pod {pod} gone")?,
                Step::Host(pod, interface) => writeln!(f, "pod {pod} at {interface}")?,
                Step::Age(key, seconds) => writeln!(f, "silent for {seconds} s: {key:?}")?,
                Step::Switch(to) => writeln!(f, "policy {to} active")?,
            }
        }
        writeln!(f, "expected: {}\nprogram:  {}", self.expected, self.seen)?;
        write!(f, "again: cargo xtask model --seed {} --packets 1", self.seed)
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
