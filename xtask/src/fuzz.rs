//! `cargo xtask fuzz`: coverage-guided fuzzing of the agent's parsers.
//!
//! libFuzzer drives it, guided by the coverage counters of an LLVM pass that a stable compiler has too. Its sanitizers
//! need another compiler and would find little in parsers without unsafe code.

use std::{
    env, fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::SystemTime,
};

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;

use crate::{
    build, cmd,
    setup::{self, Scope},
    steps::Steps,
    workspace::{self, Metadata},
};

/// Compiler flags that insert the coverage counters.
const FLAGS: [&str; 7] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "--cfg",
    "fuzzing",
];

/// An input may take no longer, in seconds: one that does when it is run once more, alone, is a finding.
const SLOW: u32 = 1;
/// Seconds after which an unfinished input counts as a hang.
const TIMEOUT: u32 = 20;
/// The process may need no more memory, in MiB.
const MEMORY: u32 = 1024;
/// Longest input, in bytes.
const LONGEST: u32 = 64 << 10;
/// Number of a fuzzer's last lines that are shown with a finding.
const SHOWN: usize = 60;

/// Fuzz targets: each is a function of `bridge-agent/src/fuzzing` and a program of `fuzz/fuzz_targets`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Target {
    /// The configuration file
    Config,
    /// HTTP on the agent's socket
    Api,
    /// Messages of discovery
    Discovery,
    /// The cluster file
    Cluster,
    /// Files that the agent writes and reads again, and saved iptables rules
    State,
}

impl Target {
    const fn name(self) -> &'static str {
        match self {
            Self::Config => "config",
            Self::Api => "api",
            Self::Discovery => "discovery",
            Self::Cluster => "cluster",
            Self::State => "state",
        }
    }
}

/// Fuzzes one target, or all one after the other.
///
/// # Errors
/// The build fails, or an input was found that is not taken as it must be.
pub(crate) fn main(only: Option<Target>, seconds: u32) -> Result<()> {
    let ready = setup::ensure(Scope::Build)?;
    // cc's rule: CXX is the compiler, if it is set.
    if env::var_os("CXX").is_none() {
        setup::programs(&setup::FUZZ)?;
    }
    build::objects(&ready.ebpf)?;
    let place = Place::new()?;
    place.build()?;
    let mut steps = Steps::default();
    for target in Target::value_variants() {
        if only.is_none_or(|only| only == *target) {
            let seen = steps.step(target.name(), || place.fuzz(*target, seconds));
            steps.closing(seen);
        }
    }
    steps.finish()
}

struct Place {
    source: PathBuf,
    /// Programs, corpus and findings.
    target: PathBuf,
    /// Target triple: named, so that build scripts are built without counters.
    host: String,
}

impl Place {
    fn new() -> Result<Self> {
        let target = Metadata::read()?.target_directory()?.join("fuzz");
        Ok(Self { source: workspace::root().join("fuzz"), target, host: Metadata::host()? })
    }

    fn build(&self) -> Result<()> {
        lock(&workspace::root().join("Cargo.lock"), &self.source.join("Cargo.lock"))?;
        let mut cargo = cmd::cargo();
        cargo
            .args(["build", "--bins", "--target", &self.host, "--target-dir"])
            .arg(&self.target)
            .env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\x1f"))
            .current_dir(&self.source);
        cmd::run(&mut cargo)
    }

    fn program(&self, target: Target) -> PathBuf {
        self.target.join(&self.host).join("debug").join(target.name())
    }

    /// Fuzzes one target and returns a summary.
    fn fuzz(&self, target: Target, seconds: u32) -> Result<String> {
        let name = target.name();
        let (corpus, found) = (self.target.join("corpus").join(name), self.target.join("found").join(name));
        for folder in [&corpus, &found] {
            fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        }
        let program = self.program(target);
        let mut command = self.command(&program);
        // libFuzzer writes new inputs to the first folder, and tries the findings of earlier runs again.
        command.args([&corpus, &self.source.join("seeds").join(name), &found]);
        if target == Target::Config {
            command.arg(workspace::root().join("deploy/examples"));
        }
        let words = self.source.join(format!("{name}.dict"));
        if words.exists() {
            command.arg(format!("-dict={}", words.display()));
        }
        command.args([
            format!("-artifact_prefix={}/", found.display()),
            format!("-max_total_time={seconds}"),
            format!("-max_len={LONGEST}"),
            format!("-report_slow_units={SLOW}"),
            "-print_final_stats=1".to_owned(),
        ]);
        let start = SystemTime::now();
        let (seen, succeeded) = watch(&mut command)?;
        if !succeeded {
            for line in &seen.last {
                eprintln!("{line}");
            }
        }
        let mut findings: Vec<PathBuf> = Vec::new();
        for path in written_since(&found, start)? {
            if is_slow(&path) && !self.is_slow_alone(&program, &path)? {
                fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
            } else {
                findings.push(path);
            }
        }
        let summary = seen.summary(findings.len());
        if succeeded && findings.is_empty() {
            return Ok(summary);
        }
        let mut text = summary;
        for input in findings {
            let mut again = self.command(&program);
            again.arg(&input);
            text.push_str(&format!("\n  {}\n  again: {}", input.display(), cmd::show(&again)));
        }
        bail!(text)
    }

    /// Returns the command of one target, with the limits that hold for each input.
    fn command(&self, program: &Path) -> Command {
        let mut command = cmd::command(program);
        command.args([format!("-timeout={TIMEOUT}"), format!("-rss_limit_mb={MEMORY}")]);
        command.current_dir(&self.target);
        command
    }

    /// Whether an input that took long takes long by itself: the machine may have had other things to do.
    fn is_slow_alone(&self, program: &Path, input: &Path) -> Result<bool> {
        let (seen, _) = watch(self.command(program).arg(input))?;
        // A run without a time did not finish.
        Ok(seen.milliseconds.is_none_or(|taken| taken > u64::from(SLOW) * 1000))
    }
}

/// Pins the fuzzed code to the dependencies of the release: starts from the workspace's versions, to which cargo adds
/// libFuzzer's.
fn lock(workspace: &Path, own: &Path) -> Result<()> {
    let modified = |path: &Path| fs::metadata(path).and_then(|data| data.modified()).ok();
    if modified(own) < modified(workspace) {
        fs::copy(workspace, own).with_context(|| format!("cannot write {}", own.display()))?;
    }
    Ok(())
}

/// Runs a fuzzer to its end; whether it has found nothing.
fn watch(command: &mut Command) -> Result<(Seen, bool)> {
    let shown = cmd::show(command);
    let mut child =
        command.stderr(Stdio::piped()).spawn().with_context(|| format!("cannot start `{shown}`"))?;
    let mut seen = Seen::default();
    let pipe = child.stderr.take().context("the fuzzer has no standard error")?;
    for line in BufReader::new(pipe).split(b'\n') {
        seen.line(&String::from_utf8_lossy(&line?));
    }
    Ok((seen, child.wait()?.success()))
}

fn is_slow(input: &Path) -> bool {
    input.file_name().is_some_and(|name| name.to_string_lossy().starts_with("slow-unit-"))
}

fn written_since(folder: &Path, start: SystemTime) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for file in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let file = file?;
        if file.metadata()?.modified()? >= start {
            files.push(file.path());
        }
    }
    files.sort();
    Ok(files)
}

/// Statistics that libFuzzer prints.
#[derive(Default)]
struct Seen {
    executions: Option<u64>,
    per_second: Option<u64>,
    /// Edges, by corpus and seeds and at the end.
    edges: Option<(u64, u64)>,
    /// Time for a single input.
    milliseconds: Option<u64>,
    last: Vec<String>,
}

impl Seen {
    fn line(&mut self, line: &str) {
        let number = |of: &str| line.split_once(of)?.1.split_whitespace().next()?.parse::<u64>().ok();
        if let Some(edges) = number(" cov: ") {
            let first = self.edges.filter(|_| !line.contains("INITED")).map_or(edges, |(first, _)| first);
            self.edges = Some((first, edges));
            return;
        }
        self.executions = number("stat::number_of_executed_units:").or(self.executions);
        self.per_second = number("stat::average_exec_per_sec:").or(self.per_second);
        if line.starts_with("Executed ") {
            self.milliseconds = number(" in ").or(self.milliseconds);
        }
        if self.last.len() == SHOWN {
            self.last.remove(0);
        }
        self.last.push(line.to_owned());
    }

    fn summary(&self, findings: usize) -> String {
        let known = |number: Option<u64>| number.map_or("?".to_owned(), |number| number.to_string());
        let (first, last) = self.edges.unzip();
        format!(
            "{} executions, {} per second; edges: {} by corpus and seeds, {} at the end; findings: {findings}",
            known(self.executions),
            known(self.per_second),
            known(first),
            known(last)
        )
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn output_of_libfuzzer_is_parsed() {
        let mut seen = Seen::default();
        for line in [
            "#2\tINITED cov: 812 ft: 813 corp: 1/1b exec/s: 0 rss: 40Mb",
            "#90\tNEW    cov: 1024 ft: 1100 corp: 2/9b lim: 4 exec/s: 0 rss: 41Mb L: 3/3 MS: 1 ChangeBit-",
            "stat::number_of_executed_units: 12345",
            "stat::average_exec_per_sec:     600",
            "Executed found/slow-unit-1 in 1234 ms",
        ] {
            seen.line(line);
        }
        let summary =
            "12345 executions, 600 per second; edges: 812 by corpus and seeds, 1024 at the end; findings: 1";
        assert_eq!(seen.summary(1), summary);
        assert_eq!(seen.milliseconds, Some(1234));
    }

    #[test]
    fn every_target_has_seeds_and_a_program() {
        let fuzz = workspace::root().join("fuzz");
        for target in Target::value_variants() {
            let name = target.name();
            let seeds = fuzz.join("seeds").join(name);
            assert!(seeds.read_dir().is_ok_and(|mut files| files.next().is_some()), "{name}");
            assert!(fuzz.join(format!("fuzz_targets/{name}.rs")).exists(), "{name}");
        }
        let programs = fuzz.join("fuzz_targets").read_dir().map(Iterator::count).ok();
        assert_eq!(programs, Some(Target::value_variants().len()));
    }

    #[test]
    fn versions_are_taken_over_whenever_those_of_the_workspace_change() {
        let folder = tempfile::tempdir().unwrap();
        let (workspace, own) = (folder.path().join("workspace"), folder.path().join("own"));
        let write = |path: &Path, text: &str, ago| {
            fs::write(path, text).unwrap();
            let file = fs::File::options().write(true).open(path).unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(ago)).unwrap();
        };
        let locked = || {
            lock(&workspace, &own).unwrap();
            fs::read_to_string(&own).unwrap()
        };
        write(&workspace, "1", 30);
        assert_eq!(locked(), "1");
        write(&own, "1 and libFuzzer", 20);
        assert_eq!(locked(), "1 and libFuzzer");
        write(&workspace, "2", 10);
        assert_eq!(locked(), "2");
    }
}
