//! `bridge-agent down`: remove every trace.

use std::{fs, path::Path};

use clap::Args;

use super::{
    Error, Global, nobody_keeps_routes,
    output::{confirmed, print, print_json},
};
use crate::agent;
use crate::config;
use crate::datapath::{self, Maps};
use crate::kernel::pins as kernel_pins;
use crate::pool::kernel;
use crate::pool::run::{self, StopError};
use crate::routes::{carry_out, withdrawal};
use crate::{firewall::Firewall as _, iptables, nftables};

/// Stop enforcing: remove every program, map, rule and route of bridge.
#[derive(Debug, Args)]
pub struct Down {
    /// Show the parts to remove, and remove nothing
    #[arg(long)]
    dry_run: bool,
    /// Do not ask on a terminal
    #[arg(long)]
    yes: bool,
}

/// Traces of bridge that `down` removes.
#[derive(Debug, Default, serde::Serialize)]
#[serde(rename_all = "camelCase")]
struct Traces {
    /// Interfaces with programs.
    interfaces: Vec<String>,
    /// Rules of the eBPF policy.
    rules: u32,
    /// Pins below the pin root.
    pins: Vec<String>,
    /// Rules with hits in iptables.
    iptables_rules: usize,
    /// The table of nftables.
    #[serde(skip_serializing_if = "Option::is_none")]
    nftables: Option<String>,
    /// Routes.
    routes: Vec<String>,
}

impl Traces {
    fn find(global: &Global) -> Result<Self, Error> {
        let (observed, operations) = withdrawal()?;
        let mut traces = Self {
            routes: operations.iter().map(|operation| operation.show(&observed)).collect(),
            iptables_rules: super::rules::iptables_hits(global).map_or(0, |hits| hits.len()),
            nftables: nftables(global).and_then(|firewall| firewall.present().ok().flatten()),
            pins: pins(&global.pin_root),
            ..Self::default()
        };
        if let Ok(maps) = Maps::open(&global.pins()) {
            traces.interfaces = maps.attached_interfaces()?;
            traces.rules = maps.active_settings()?.rule_count;
        }
        Ok(traces)
    }

    fn show(&self) -> String {
        let Self { interfaces, rules, pins, iptables_rules, nftables, routes } = self;
        let mut text = String::new();
        for interface in interfaces {
            text += &format!("- programs on {interface}\n");
        }
        if *rules > 0 {
            text += &format!("- eBPF policy with {rules} rules\n");
        }
        if !pins.is_empty() {
            text += &format!("- {} pinned maps and links\n", pins.len());
        }
        if *iptables_rules > 0 {
            text += &format!("- {iptables_rules} rules in iptables\n");
        }
        if let Some(table) = nftables {
            text += &format!("- {table} in nftables\n");
        }
        for route in routes {
            text += &format!("{route}\n");
        }
        if text.is_empty() { "Nothing to remove.\n".to_owned() } else { text }
    }
}

/// Paths of all files below a directory.
fn pins(directory: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => found.extend(pins(&entry.path())),
            _ => found.push(entry.path().display().to_string()),
        }
    }
    found.sort();
    found
}

impl Down {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        if self.dry_run {
            let traces = Traces::find(global)?;
            return if global.json { print_json(&traces) } else { print(&traces.show()) };
        }
        if !self.yes {
            confirmed("Stop enforcing, and remove every program, map, rule and route of bridge?")?;
        }
        nobody_keeps_routes(global)?;
        let places = agent::pool_places(&global.pin_root, &global.state_directory());
        // First: without enforcement, only the pool shows that an agent runs.
        let pool = run::stop(&places);
        if let Err(StopError::Locked(error)) = pool {
            return Err(datapath::Error::from(error).into());
        }
        let of_exec = kernel::remove_of_exec(&global.pin_root);
        let (removed, result) = datapath::down(&global.pins(), &crate::pool::pins::is_of_a_pool);
        // A running agent would put everything back.
        if matches!(result, Err(datapath::Error::Pins(kernel_pins::Error::Locked { .. }))) {
            return result.map_err(Error::from);
        }
        agent::forget_trial(&global.config, &global.state_directory());
        // Teardown continues after an error, and reports all errors.
        let (mut notes, errors) = remove_iptables(global);
        let (note, of_nftables) = remove_nftables(global);
        notes.extend(note);
        let routes = remove_routes();
        result?;
        pool?;
        of_exec.map_err(|error| StopError::Left(vec![error.to_string()]))?;
        if let Some(error) = errors.into_iter().next() {
            return Err(error.into());
        }
        if let Some(error) = of_nftables.into_iter().next() {
            return Err(error.into());
        }
        let routes = routes?;
        if global.json {
            return print_json(
                &serde_json::json!({ "ok": true, "removed": removed, "routes": routes, "notes": notes }),
            );
        }
        for note in &notes {
            print(&format!("{note}\n"))?;
        }
        if routes > 0 {
            print(&format!("Withdrew {routes} routes.\n"))?;
        }
        match removed.attachments + removed.maps {
            0 => print("There was no eBPF enforcement to remove.\n"),
            _ => {
                print(&format!("Detached {} programs, removed {} maps.\n", removed.attachments, removed.maps))
            }
        }
    }
}

/// Removes every route with bridge's protocol number; returns their number.
fn remove_routes() -> Result<usize, Error> {
    let (observed, operations) = withdrawal()?;
    super::routes::partly(&carry_out(&operations)?, &observed)?;
    Ok(operations.len())
}

/// Returns the driver of nftables; `None` without nft: then there is no table of bridge.
fn nftables(global: &Global) -> Option<nftables::Nftables> {
    let settings = config::load(&global.config).map(|loaded| agent::nftables_settings(&loaded.config));
    nftables::Nftables::new(settings.unwrap_or_default())
        .inspect_err(|error| tracing::debug!(%error, "no nftables"))
        .ok()
}

/// Removes the table of nftables and the file of saved rules; returns a note about the table, and every failure.
fn remove_nftables(global: &Global) -> (Option<String>, Vec<nftables::Error>) {
    let Some(mut firewall) = nftables(global) else { return (None, Vec::new()) };
    let present = firewall.present().ok().flatten();
    let errors = firewall.teardown().errors;
    (present.filter(|_| errors.is_empty()).map(|table| format!("Removed {table}.")), errors)
}

/// Removes the iptables rules. The configuration may be gone or invalid: it only says whether saved files are touched.
fn remove_iptables(global: &Global) -> (Vec<String>, Vec<iptables::Error>) {
    let settings = config::load(&global.config)
        .map(|loaded| agent::firewall_settings(&loaded.config))
        .unwrap_or_default();
    match iptables::Iptables::new(settings) {
        Ok(mut firewall) => {
            let present = firewall.present().ok().flatten();
            let mut remains = firewall.teardown();
            if let (Some(rules), true) = (present, remains.errors.is_empty()) {
                remains.notes.insert(0, format!("Removed {rules}."));
            }
            for error in remains.errors.iter().skip(1) {
                tracing::error!(%error, "not everything could be removed");
            }
            (remains.notes, remains.errors)
        }
        // Without iptables there are no rules of its.
        Err(error) => {
            tracing::debug!(%error, "no iptables");
            (Vec::new(), Vec::new())
        }
    }
}
