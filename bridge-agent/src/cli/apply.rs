//! `bridge-agent apply`, `confirm` and `revert`: apply a configuration through the running agent.

use std::{
    io::Read as _,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::Args;
use serde_json::json;

use super::{Error, Global, block_on, get, print, print_diagnostics, print_json, time};
use crate::api::{Apply as Body, client::Client};
use crate::config::{self, Loaded};
use crate::state::{Applied, Probe, ProbeStatus, Status, TrialOutcome};

/// Between two looks at a trial that confirms itself.
const GLANCE: Duration = Duration::from_millis(100);

/// The limit of a trial with a packet filter alone.
const WITHOUT_EBPF: &str =
    "Without eBPF the agent goes back at that time; if it is dead by then, its next start does.\n";

/// Apply a configuration and make it the agent's configuration file; with --confirm, on trial first.
#[derive(Debug, Args)]
pub struct Apply {
    /// The new configuration; `-` is standard input
    file: PathBuf,
    /// Go back after this time, such as 60s, unless `bridge-agent confirm` comes first; with eBPF the kernel does so
    /// even if the agent is dead
    #[arg(long, value_name = "TIME", value_parser = time)]
    confirm: Option<Duration>,
    /// Confirm it as soon as a new connection to each of these is accepted, such as tcp://192.168.31.67:22; may be
    /// repeated. Waits for the end of the trial; exit code 1: it was not confirmed
    #[arg(long = "probe", value_name = "tcp://HOST:PORT", requires = "confirm")]
    probes: Vec<Probe>,
}

/// Make the configuration on trial the agent's configuration file, for good.
#[derive(Debug, Args)]
pub struct Confirm {}

/// Go back from the configuration on trial to the one before it, now.
#[derive(Debug, Args)]
pub struct Revert {}

impl Apply {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let text = read(&self.file)?;
        // Its mistakes are shown with their lines, and by this version of the program.
        let Loaded { warnings, .. } = config::parse(&text, Some(&self.file))?;
        if !global.json {
            print_diagnostics(&warnings)?;
        }
        let body = Body {
            config: text,
            confirm_ms: self.confirm.map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX)),
            probes: self.probes.iter().map(ToString::to_string).collect(),
        };
        let applied: Applied = post(global, "/v1/apply", &body)?;
        if !self.probes.is_empty() {
            return wait(global, &applied);
        }
        if global.json {
            return print_json(&applied);
        }
        let generation = generation(&applied);
        match applied.deadline {
            None => print(&format!("Applied{generation}, and the agent's configuration file.\n")),
            Some(deadline) => {
                // Only eBPF has generations.
                let dead = if applied.generation.is_some() { "" } else { WITHOUT_EBPF };
                print(&format!(
                    "Applied{generation} until {deadline}. Confirm it with `bridge-agent confirm` by then, or the \
                     configuration before it comes back.\n{dead}"
                ))
            }
        }
    }
}

impl Confirm {
    #[expect(clippy::unused_self, reason = "as every command")]
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let applied = post(global, "/v1/confirm", &json!({}))?;
        show(global, &applied, "Confirmed: applied for good, and the agent's configuration file")
    }
}

impl Revert {
    #[expect(clippy::unused_self, reason = "as every command")]
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let applied = post(global, "/v1/revert", &json!({}))?;
        show(global, &applied, "Rolled back: the former configuration is active")
    }
}

fn show(global: &Global, applied: &Applied, text: &str) -> Result<(), Error> {
    if global.json { print_json(applied) } else { print(&format!("{text}{}.\n", generation(applied))) }
}

fn generation(applied: &Applied) -> String {
    applied.generation.map(|number| format!(" (generation {number})")).unwrap_or_default()
}

fn read(file: &Path) -> Result<String, Error> {
    if file == Path::new("-") {
        let mut text = String::new();
        let read = std::io::stdin().lock().read_to_string(&mut text);
        read.map_err(|source| Error::Stream { action: "cannot read standard input", source })?;
        return Ok(text);
    }
    Ok(config::read_text(file)?)
}

fn post<B: serde::Serialize>(global: &Global, path: &str, body: &B) -> Result<Applied, Error> {
    block_on(async { Ok(Client::connect(&global.agent_socket()).await?.post(path, body).await?) })
}

/// Waits until the trial has ended, and prints its result.
fn wait(global: &Global, applied: &Applied) -> Result<(), Error> {
    let mut waiting: Vec<ProbeStatus> = Vec::new();
    let status = loop {
        let status: Status = get(global, "/v1/status")?;
        match &status.trial {
            Some(trial) => waiting.clone_from(&trial.probes),
            None => break status,
        }
        std::thread::sleep(GLANCE);
    };
    match status.last_trial.map(|end| end.outcome) {
        Some(TrialOutcome::Confirmed | TrialOutcome::ConfirmedByProbes) => show(
            global,
            &Applied { deadline: None, ..applied.clone() },
            "Every probe has answered: applied for good",
        ),
        _ => {
            let silent = waiting
                .iter()
                .filter(|probe| !probe.answered)
                .map(|probe| format!("{}: {}", probe.target, probe.error.as_deref().unwrap_or("no answer")));
            Err(Error::NotConfirmed(silent.collect::<Vec<_>>().join("; ")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_without_a_unit_is_told_to_say_it() {
        assert_eq!(time("60s"), Ok(Duration::from_secs(60)));
        assert!(time("60").unwrap_err().contains("60s"));
    }
}
