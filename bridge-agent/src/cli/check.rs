//! `bridge-agent check`: validate, and print what the configuration comes to.

use std::io::Read;
use std::path::Path;

use clap::Args;

use super::{Error, Global, print, print_diagnostics, print_json};
use crate::config::{self, Config, Loaded, Role};
use crate::model::{Action, PortRange};

/// Validate the configuration and print what it comes to; needs no privilege.
#[derive(Debug, Args)]
pub struct Check {
    /// Print the JSON schema of the configuration file instead
    #[arg(long)]
    schema: bool,
}

impl Check {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        if self.schema {
            return print_json(&config::schema());
        }
        let Loaded { config, warnings } = load(&global.config)?;
        let effective = config.effective();
        if global.json {
            return print_json(&serde_json::json!({
                "ok": true,
                "diagnostics": warnings.list,
                "leftOff": warnings.left_off,
                "config": effective,
            }));
        }
        print_diagnostics(&warnings)?;
        let yaml = effective.to_yaml().map_err(|error| Error::Format(error.to_string()))?;
        print(&format!("# {} is valid: {}\n{yaml}", global.config.display(), summary(&config)))
    }
}

fn load(path: &Path) -> Result<Loaded, Error> {
    if path != Path::new("-") {
        return Ok(config::load(path)?);
    }
    let mut text = String::new();
    let read = std::io::stdin().lock().read_to_string(&mut text);
    read.map_err(|source| Error::Stream { what: "cannot read standard input", source })?;
    Ok(config::parse(&text, Some(Path::new("<stdin>")))?)
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
