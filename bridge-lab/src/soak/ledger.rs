//! Objects that exist before and after, and resources that agents accumulate while they live.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    process::Command,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::{
    agent::Agent,
    bench::agent::resident_kib,
    lab::{Host, Lab},
    wait::eventually,
};

/// Variation of an agent's memory that is no leak: single samples vary by more, with the temporary memory of a reload
/// or an answer; the medians of many samples do not.
const SLACK_KIB: f64 = 1024.0;

/// Memory of the journal of 1,024 events, which fills while a short run lasts.
const JOURNAL_KIB: f64 = 1024.0;

/// In which an agent cannot gather much.
const SHORT: Duration = Duration::from_secs(300);

/// One thing that was looked for.
#[derive(Clone, Debug)]
pub struct Finding {
    /// The object or resource.
    pub subject: String,
    /// Before, and after.
    pub figures: [String; 2],
    /// Whether it is as it should be.
    pub ok: bool,
}

impl Finding {
    fn same(subject: &str, before: impl ToString, after: impl ToString) -> Self {
        let figures = [before.to_string(), after.to_string()];
        Self { subject: subject.to_owned(), ok: figures[0] == figures[1], figures }
    }
}

/// Resources of a process.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    at: Instant,
    /// Private memory. Mapped pages of its program and of kernel maps are left out: they grow with use, are not
    /// accumulated, and are bounded.
    resident_kib: f64,
    descriptors: usize,
}

impl Sample {
    /// Samples the process `pid`; `before` are its samples so far.
    pub(super) fn of(pid: u32, before: &[Self]) -> Result<Self> {
        let mut descriptors = usize::MAX;
        let least = before.get(1).map(|first| first.descriptors);
        // A client's connection, or a file that is being read, is none that is kept: its descriptor goes while this waits.
        let (begun, fewer) = (Instant::now(), |now| least.is_none_or(|least| now <= least));
        eventually(Duration::from_secs(3), || {
            let now = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count();
            descriptors = descriptors.min(now);
            (fewer(descriptors) && begun.elapsed() > Duration::from_millis(300)).then_some(())
        });
        Ok(Self { at: Instant::now(), resident_kib: resident_kib(pid, "RssAnon")?, descriptors })
    }
}

/// Returns whether an agent has accumulated resources in its life, from samples at rest.
pub(super) fn gathered(which: &str, samples: &[Sample], time: Duration) -> Vec<Finding> {
    // The first round fills caches that later rounds reuse.
    let Some((first, last)) = samples.get(1).zip(samples.last()) else {
        let figures = ["-".to_owned(), format!("{} rounds are too few", samples.len())];
        let subject = format!("resources accumulated by the agent on the {which}");
        return vec![Finding { subject, figures, ok: time < SHORT }];
    };
    let listed: Vec<_> =
        samples.iter().map(|sample| format!("{:.0}/{}", sample.resident_kib, sample.descriptors)).collect();
    eprintln!("KiB and descriptors of the agent on the {which}, round by round: {}", listed.join(" "));
    let third = samples.len().div_ceil(3);
    let median = |part: &[Sample]| {
        let mut values: Vec<f64> = part.iter().map(|sample| sample.resident_kib).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let memory = [median(&samples[1..=third]), median(&samples[samples.len() - third..])];
    let slack = SLACK_KIB + if time < SHORT { JOURNAL_KIB } else { 0.0 };
    let minutes = (last.at - first.at).as_secs() / 60;
    vec![
        Finding {
            subject: format!(
                "resident memory of the agent's own on the {which}, KiB, over {minutes} minutes"
            ),
            ok: memory[1] <= memory[0] + slack,
            figures: memory.map(|kib| format!("{kib:.0}")),
        },
        Finding {
            subject: format!("descriptors of the agent on the {which}"),
            ok: last.descriptors <= first.descriptors,
            figures: [first, last].map(|sample| sample.descriptors.to_string()),
        },
    ]
}

/// Kernel objects of a running agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Node {
    pins: BTreeSet<String>,
    attached: Vec<String>,
    rules: Vec<String>,
    held: u64,
}

impl Node {
    pub(super) fn of(lab: &Lab, agent: &Agent) -> Result<Self> {
        let status: Value = serde_json::from_str(&agent.run(&["status", "--json"])?)?;
        let mut pins = BTreeSet::new();
        walk(agent.pins(), agent.pins(), &mut pins)?;
        let interfaces = status["agent"]["enforcement"]["interfaces"].as_array();
        let attached = interfaces.into_iter().flatten().map(|interface| interface["name"].to_string());
        Ok(Self {
            pins,
            attached: attached.collect(),
            rules: rules(lab.b())?,
            held: status["agent"]["pool"]["held"].as_u64().context("how many ports are held")?,
        })
    }

    pub(super) fn compare(&self, after: &Self) -> Vec<Finding> {
        vec![
            differing("pins", &self.pins, &after.pins),
            differing("interfaces", &self.attached, &after.attached),
            differing("rules of iptables and nftables", &self.rules, &after.rules),
            Finding::same("ports held", self.held, after.held),
        ]
    }
}

/// Returns the number of entries, and the difference if there is one.
fn differing<'a, T: IntoIterator<Item = &'a String> + Copy>(subject: &str, before: T, after: T) -> Finding {
    let sets = [before, after].map(|list| list.into_iter().collect::<BTreeSet<_>>());
    let only =
        |a: usize, b: usize| sets[a].difference(&sets[b]).map(|one| (*one).clone()).collect::<Vec<_>>();
    let figures = [(0, 1), (1, 0)].map(|(a, b)| match &only(a, b)[..] {
        [] => sets[a].len().to_string(),
        only => format!("{}, only here: {}", sets[a].len(), only.join(" | ")),
    });
    Finding { subject: subject.to_owned(), ok: sets[0] == sets[1], figures }
}

/// Kernel objects of the lab without an agent.
#[derive(Clone, Debug)]
pub(super) struct Bare {
    rules: Vec<String>,
    kernel: Vec<String>,
    pins: BTreeSet<String>,
}

impl Bare {
    pub(super) fn of(lab: &Lab) -> Result<Self> {
        let mut pins = BTreeSet::new();
        let directory = lab.pin_directory()?;
        walk(&directory, &directory, &mut pins)?;
        let mut kernel = Vec::new();
        for (host, name) in [(lab.a(), "LAN host"), (lab.b(), "node")] {
            let reserved = "/proc/sys/net/ipv4/ip_local_reserved_ports";
            let reserved = host.netns.run(|| fs::read_to_string(reserved))?;
            kernel.push(format!("{name}: reserved ports {}", reserved.trim()));
            let mut tc = Command::new("tc");
            tc.args(["qdisc", "show"]);
            kernel.extend(
                host.netns.output(tc)?.lines().filter(|line| line.contains("clsact")).map(Into::into),
            );
            kernel.extend(host.netns.ip("route show table all proto 98")?.lines().map(Into::into));
        }
        Ok(Self { rules: [rules(lab.a())?, rules(lab.b())?].concat(), kernel, pins })
    }

    pub(super) fn compare(&self, after: &Self) -> Vec<Finding> {
        vec![
            differing("after `down`: pins", &self.pins, &after.pins),
            differing("after `down`: rules", &self.rules, &after.rules),
            differing("after `down`: qdiscs, routes, reserved ports", &self.kernel, &after.kernel),
        ]
    }
}

/// Returns every rule of every table, without counters.
fn rules(host: &Host) -> Result<Vec<String>> {
    let mut nft = Command::new("nft");
    nft.args(["--stateless", "list", "ruleset"]);
    let mut table = String::new();
    let text = host.netns.output(nft)?;
    Ok(text
        .lines()
        .filter(|line| !line.trim().is_empty() && !line.starts_with('#'))
        .map(|line| {
            if line.starts_with("table ") {
                table = line.trim_end_matches([' ', '{']).to_owned();
            }
            format!("{table}: {}", line.trim())
        })
        .collect())
}

fn walk(root: &Path, directory: &Path, into: &mut BTreeSet<String>) -> Result<()> {
    let Ok(entries) = fs::read_dir(directory) else { return Ok(()) };
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            walk(root, &path, into)?;
        } else {
            into.insert(path.strip_prefix(root)?.display().to_string());
        }
    }
    Ok(())
}

/// The numbers of all programs, maps and links that an agent was ever seen to have: the kernel gives none of them twice.
#[derive(Debug, Default)]
pub(super) struct Ids(Mutex<BTreeMap<&'static str, BTreeSet<u32>>>);

impl Ids {
    /// Notes the present objects of these processes.
    pub(super) fn note(&self, pids: &[&AtomicU32]) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for pid in pids.iter().map(|pid| pid.load(Ordering::Relaxed)) {
            let entries = fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten().flatten();
            for text in entries.filter_map(|entry| fs::read_to_string(entry.path()).ok()) {
                for kind in ["map_id", "prog_id", "link_id"] {
                    let id = text.lines().find_map(|line| line.strip_prefix(kind)?.strip_prefix(':'));
                    if let Some(id) = id.and_then(|id| id.trim().parse().ok()) {
                        known.entry(kind).or_default().insert(id);
                    }
                }
            }
        }
    }

    /// Whether none of them is left.
    pub(super) fn finding(&self, patience: Duration) -> Result<Finding> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let left = || -> Result<Vec<String>> {
            let mut left = Vec::new();
            for (kind, object) in [("map_id", "map"), ("prog_id", "prog"), ("link_id", "link")] {
                let output = Command::new("bpftool").args(["--json", object, "show"]).output()?;
                let list: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
                let there = list.as_array().into_iter().flatten().filter_map(|one| one["id"].as_u64());
                let ids = known.get(kind);
                let ours = there
                    .filter(|id| u32::try_from(*id).is_ok_and(|id| ids.is_some_and(|ids| ids.contains(&id))));
                left.extend(ours.map(|id| format!("{object} {id}")));
            }
            Ok(left)
        };
        eventually(patience, || left().is_ok_and(|left| left.is_empty()).then_some(()));
        let (left, ever) = (left()?, known.values().map(BTreeSet::len).sum::<usize>());
        let subject = "after `down`: programs, maps and links, of all that agents ever had".to_owned();
        let figures = [ever.to_string(), format!("{} {}", left.len(), left.join(", ")).trim().to_owned()];
        Ok(Finding { subject, ok: left.is_empty() && ever > 0, figures })
    }
}
