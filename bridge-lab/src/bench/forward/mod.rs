//! bridge beside the usual alternatives: the same traffic through the same node, under the same policy.
//!
//! Packets are made by the kernel on one CPU, at the far end of the node's cable, faster than the other CPU forwards
//! them; those that reach the pod are counted. Their rate is by the time that the forwarding CPU was at it, so other
//! work on the machine disturbs it little. Real sockets are measured by wall-clock time.

mod beside;
mod clock;
mod compare;
mod contender;
mod figures;
pub(super) mod limits;
mod packets;
mod place;
mod plot;
mod ruleset;
mod table;
mod traffic;

use std::fs::{self, File};
use std::path::Path;
use std::thread::available_parallelism;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::{Args, builder::PossibleValuesParser};
use rustix::system::uname;

use self::beside::Beside;
use self::compare::{Scope, compare};
use self::contender::Contender;
pub use self::figures::Record;
use self::figures::{Figure, Figures};
use self::traffic::{Effort, Traffic};
use super::Limit;

const LOCK: &str = "/run/bridge-bench.lock";

/// A part of the comparison, for contributors; options that are absent keep their defaults.
#[derive(Args, Clone, Debug, Default)]
#[group(id = "part", multiple = true)]
pub struct Part {
    /// Of the comparison only these numbers of rules
    #[arg(long, value_delimiter = ',', value_name = "N")]
    rules: Vec<u32>,
    /// Of the comparison only these, and no firewall
    #[arg(long, value_delimiter = ',', value_parser = PossibleValuesParser::new(Contender::ALL.map(Contender::key)))]
    contender: Vec<String>,
    /// Of the comparison only this traffic
    #[arg(long, value_delimiter = ',', value_parser = PossibleValuesParser::new(Traffic::ALL.map(Traffic::key)))]
    traffic: Vec<String>,
    /// How often everybody has their turn
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    rounds: Option<u16>,
}

impl Part {
    fn of(&self, whole: Scope) -> Scope {
        let chosen = |all: &[String], key: &str| all.is_empty() || all.iter().any(|chosen| chosen == key);
        Scope {
            sizes: if self.rules.is_empty() { whole.sizes } else { self.rules.clone() },
            contenders: whole
                .contenders
                .into_iter()
                .enumerate()
                .filter(|(index, contender)| *index == 0 || chosen(&self.contender, contender.key()))
                .map(|(_, contender)| contender)
                .collect(),
            traffic: whole.traffic.into_iter().filter(|kind| chosen(&self.traffic, kind.key())).collect(),
            rounds: self.rounds.map_or(whole.rounds, usize::from),
            ..whole
        }
    }
}

/// A comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Traffic that rules allow.
    Forward,
    /// New flows alone.
    New,
    /// Floods of packets that no rule allows, and legitimate connections beside them.
    Denied,
}

impl Work {
    /// All of them; [`Work::New`] is a part of [`Work::Forward`].
    pub const ALL: [Self; 3] = [Self::Forward, Self::New, Self::Denied];

    /// Its name in commands.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::New => "new",
            Self::Denied => "denied",
        }
    }

    fn scope(self, quick: bool) -> Scope {
        let whole = if quick { quick_scope() } else { thorough_scope() };
        let sizes = vec![1, 1000, 10_000];
        match self {
            Self::Forward => whole,
            Self::New => Scope { sizes, traffic: vec![Traffic::NewFlows], ..whole },
            Self::Denied => Scope {
                sizes,
                traffic: Traffic::DENIED.to_vec(),
                contenders: Contender::DENIED.to_vec(),
                beside: true,
                ..whole
            },
        }
    }
}

/// Result of a comparison.
pub struct Comparison {
    work: Work,
    base: Contender,
    besides: Vec<Beside>,
    figures: Figures,
    machine: String,
    how: String,
}

impl Comparison {
    /// Compares `part`: thoroughly, in about ten minutes for all of forwarding, or `quick`, in five.
    ///
    /// # Errors
    /// Not root, fewer than two CPUs, no lab, or traffic that does not arrive without a firewall. A fault of a single
    /// contender is not an error; the table reports it.
    pub fn run(work: Work, quick: bool, part: &Part) -> Result<Self> {
        let cpus = available_parallelism()?.get();
        ensure!(cpus >= 2, "one CPU makes packets and another forwards them: {cpus} is too few");
        let _alone = alone()?;
        let scope = part.of(work.scope(quick));
        let how = format!("medians of {} rounds, contenders in turn", scope.rounds);
        eprintln!("comparing: {}", work.name());
        let (figures, besides) = compare(&scope)?;
        let base = scope.contenders[0];
        Ok(Self { work, base, besides, figures, machine: machine()?, how })
    }

    /// One for each measurement.
    #[must_use]
    pub fn records(&self) -> Vec<Record> {
        self.figures.0.iter().map(Figure::record).collect()
    }

    /// One for each contender with legitimate connections beside a flood.
    #[must_use]
    pub fn besides(&self) -> Vec<serde_json::Value> {
        self.besides.iter().filter_map(|beside| serde_json::to_value(beside).ok()).collect()
    }

    /// Tables in Markdown.
    #[must_use]
    pub fn markdown(&self) -> String {
        let table = table::markdown(&self.figures, self.base, &self.machine, &self.how);
        table + &beside::markdown(&self.besides)
    }

    /// Shows the tables in the documents that have a place for them: a summary in README.md, all of them in
    /// docs/benchmark.md.
    ///
    /// # Errors
    /// A document cannot be read or written, or has no such place.
    pub fn publish(&self, root: &Path) -> Result<()> {
        let summary = table::summary(&self.figures, &self.machine, &self.how);
        let (readme, benchmark) = (("README.md", summary), ("docs/benchmark.md", self.markdown()));
        let (begin, documents) = match self.work {
            Work::Forward => (table::BEGIN, vec![readme, benchmark]),
            Work::Denied => (table::BEGIN_DENIED, vec![benchmark]),
            Work::New => return Ok(()),
        };
        for (name, text) in documents {
            let file = root.join(name);
            let document = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
            let document = table::replace(&document, begin, &text)
                .with_context(|| format!("{name} has no lines {begin} and {}", table::END))?;
            fs::write(&file, document).with_context(|| format!("write {}", file.display()))?;
        }
        Ok(())
    }

    /// Returns the limits of these figures.
    #[must_use]
    pub fn limits(&self) -> Vec<Limit> {
        match self.work {
            Work::Forward => limits::limits(&self.figures),
            Work::New => limits::new_flows(&self.figures),
            Work::Denied => limits::denied(&self.figures),
        }
    }

    /// Writes `table.md` and `plot.svg`, or `table-denied.md` or `table-new.md`.
    ///
    /// # Errors
    /// The directory cannot be written to.
    pub fn write(&self, directory: &Path) -> Result<()> {
        let write = |name: String, text: String| {
            let file = directory.join(name);
            fs::write(&file, text).with_context(|| format!("write {}", file.display()))
        };
        if self.work != Work::Forward {
            return write(format!("table-{}.md", self.work.name()), self.markdown());
        }
        write("table.md".to_owned(), self.markdown())?;
        write("plot.svg".to_owned(), plot::svg(&self.figures, &self.machine))
    }
}

/// Locks the machine for this comparison until the file is dropped: two at a time would share the CPUs.
fn alone() -> Result<File> {
    let file = File::create(LOCK).with_context(|| format!("make {LOCK}"))?;
    if file.try_lock().is_err() {
        eprintln!("waiting for another comparison on this machine to end ({LOCK})");
        file.lock().with_context(|| format!("lock {LOCK}"))?;
    }
    Ok(file)
}

fn thorough_scope() -> Scope {
    Scope {
        sizes: vec![1, 100, 1000, 10_000, 100_000],
        contenders: Contender::FORWARD.to_vec(),
        traffic: Traffic::ALLOWED.to_vec(),
        rounds: 7,
        beside: false,
        effort: Effort {
            packets: Duration::from_millis(150),
            sockets: Duration::from_millis(300),
            new_flows: 100_000,
        },
    }
}

fn quick_scope() -> Scope {
    Scope {
        sizes: vec![1, 1000, 10_000],
        rounds: 7,
        effort: Effort {
            packets: Duration::from_millis(60),
            sockets: Duration::from_millis(100),
            new_flows: 50_000,
        },
        ..thorough_scope()
    }
}

/// For instance `AMD EPYC, 2 CPUs, Linux 6.18.1`.
fn machine() -> Result<String> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo")?;
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let model = model.map_or("unknown processor", |(_, model)| model);
    let release = uname().release().to_string_lossy().into_owned();
    Ok(format!("{model}, {} CPUs, Linux {release}", available_parallelism()?))
}
