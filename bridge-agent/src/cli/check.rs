//! `bridge-agent check`: validates a configuration file or manifests of Kubernetes, and prints the result.

use std::io::Read;
use std::path::Path;

use clap::Args;

use super::{Error, Global, print, print_diagnostics, print_json, table};
use crate::agent::PacketFilterKind;
use crate::config::{self, Config, ConfigErrors, Loaded, Manifests, Role};
use crate::explain::{
    Offline,
    cases::{Cases, Difference},
};
use crate::model::{Action, PortRange};

/// Validate a configuration file, or manifests with BridgePolicies, without privileges.
///
/// The file may be the output of `kustomize build`: each BridgePolicy in it is checked, and each ConfigMap with a bridge.yaml.
#[derive(Debug, Args)]
pub struct Check {
    /// Print the JSON schema of the configuration file instead
    #[arg(long)]
    schema: bool,
    /// Check that connections get the verdicts that this file expects
    ///
    /// A list of connections with verdict and rule, see docs/operations.md. Exit code 1 with a
    /// table of those that differ.
    #[arg(long, value_name = "CASES", conflicts_with = "schema")]
    expect: Option<std::path::PathBuf>,
    /// The file to check, `-` for standard input [default: the file of --config]
    #[arg(value_name = "FILE", conflicts_with = "schema")]
    file: Option<std::path::PathBuf>,
}

impl Check {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        if self.schema {
            return print_json(&config::schema());
        }
        let path = self.file.as_deref().unwrap_or(&global.config);
        let (text, name) = read(path)?;
        if config::is_manifest(&text) {
            if self.expect.is_some() {
                let text = "--expect needs a configuration file, whose networks say who is a pod: name the bridge.yaml";
                return Err(Error::Question(text.to_owned()));
            }
            return show_manifests(&config::manifests(&text, name)?, name, global);
        }
        let Loaded { config, warnings } = config::parse(&text, Some(name))?;
        if let Some(problem) = config.api.occupied() {
            return Err(ConfigErrors::of_file(name, problem).into());
        }
        let misnamed = || config.kubernetes.as_ref().filter(|_| config.role == Role::Node)?.misnamed();
        if let Some(problem) = misnamed() {
            return Err(ConfigErrors::of_file(name, problem).into());
        }
        if let Some(cases) = &self.expect {
            print_diagnostics(&warnings)?;
            return expect(cases, &config, global);
        }
        let effective = config.effective();
        let chosen = PacketFilterKind::chosen(&config);
        if global.json {
            let auto = chosen.map(|(kind, why)| serde_json::json!({ "engine": kind.name(), "why": why }));
            return print_json(&serde_json::json!({
                "ok": true,
                "auto": auto,
                "diagnostics": warnings.list,
                "leftOff": warnings.left_off,
                "config": effective,
            }));
        }
        print_diagnostics(&warnings)?;
        let yaml = effective.to_yaml().map_err(|error| Error::Format(error.to_string()))?;
        let auto = chosen
            .map(|(kind, why)| format!("# engine auto is {} on this node: {why}\n", kind.name()))
            .unwrap_or_default();
        print(&format!("# {} is valid: {}\n{auto}{yaml}", path.display(), summary(&config)))
    }
}

/// Reads a file, or standard input; returns its text, and its name for messages.
pub(super) fn read(path: &Path) -> Result<(String, &Path), Error> {
    if path != Path::new("-") {
        return Ok((config::read_text(path)?, path));
    }
    let mut text = String::new();
    let read = std::io::stdin().lock().read_to_string(&mut text);
    read.map_err(|source| Error::Stream { action: "cannot read standard input", source })?;
    Ok((text, Path::new("<stdin>")))
}

/// Compares the verdicts of a configuration with those that a file expects.
fn expect(path: &Path, config: &Config, global: &Global) -> Result<(), Error> {
    let failed = |error: &dyn std::fmt::Display| Error::Question(format!("{}: {error}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|error| failed(&format!("cannot be read: {error}")))?;
    let cases = Cases::parse(&text).map_err(|error| failed(&error))?;
    let differences = cases.check(&Offline::new(config, Vec::new())).map_err(|error| failed(&error))?;
    let all = cases.cases.len();
    if global.json {
        print_json(
            &serde_json::json!({ "ok": differences.is_empty(), "cases": all, "differences": differences }),
        )?;
        return if differences.is_empty() { Ok(()) } else { Err(Error::Silent) };
    }
    if differences.is_empty() {
        return print(&format!("{}: {all} cases are as expected\n", path.display()));
    }
    let mut table = table::table(&["case", "connection", "expected", "found", "why"]);
    for Difference { number, name, expected, found, explanation } in &differences {
        let nearly = explanation.nearly.first().map(|nearly| format!("; nearly {}", nearly.rule));
        table.add_row([
            name.clone().unwrap_or_else(|| format!("#{number}")),
            explanation.question.to_string(),
            expected.clone(),
            found.clone(),
            format!("{}{}", explanation.reason.as_deref().unwrap_or("-"), nearly.unwrap_or_default()),
        ]);
    }
    print(&table::render(&table))?;
    Err(Error::Expectations { differing: differences.len(), all })
}

fn show_manifests(found: &Manifests, name: &Path, global: &Global) -> Result<(), Error> {
    if global.json {
        let policies = found.policies.iter();
        let policies =
            policies.map(|(name, rules)| serde_json::json!({ "name": name, "rules": rules.len() }));
        return print_json(&serde_json::json!({
            "ok": true,
            "diagnostics": found.warnings.list,
            "leftOff": found.warnings.left_off,
            "policies": policies.collect::<Vec<_>>(),
            "configs": found.configs,
            "skipped": found.skipped,
        }));
    }
    print_diagnostics(&found.warnings)?;
    let mut lines = format!("{} is valid:\n", name.display());
    for (name, rules) in &found.policies {
        lines += &format!("  BridgePolicy {name}: {} rules\n", rules.len());
    }
    for name in &found.configs {
        lines += &format!("  bridge.yaml in ConfigMap {name}\n");
    }
    if found.skipped > 0 {
        lines += &format!("  {} objects of other kinds, not checked\n", found.skipped);
    }
    print(&lines)
}

fn summary(config: &Config) -> String {
    if config.role == Role::Host {
        let routes = config.routes.as_ref().map_or(0, |routes| routes.fixed.len());
        let pool =
            config.port_pool.as_ref().map_or(0, |pool| pool.available().iter().map(PortRange::count).sum());
        return format!("a host with {routes} static routes and {pool} pool ports");
    }
    let denies = config.rules.iter().filter(|rule| rule.action == Action::Deny).count();
    match (config.rules.len(), config.kubernetes.is_some()) {
        (0, false) => "a node without rules: no flow between pods and LAN hosts may be opened".into(),
        (all, _) => format!("a node with {all} rules, {} allow and {denies} deny", all - denies),
    }
}
