//! `bridge-agent down`: remove every trace.

use clap::Args;

use super::{Error, Global, nobody_keeps_routes, print, print_json};
use crate::agent;
use crate::config;
use crate::datapath;
use crate::pool::kernel;
use crate::pool::run::{self, StopError};
use crate::routes::{carry_out, withdrawal};
use crate::{firewall::Firewall as _, iptables, nftables};

/// Stop enforcing: remove every program, map, rule and route of bridge.
#[derive(Debug, Args)]
pub struct Down {}

impl Down {
    #[expect(clippy::unused_self, reason = "as every command")]
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        nobody_keeps_routes(global)?;
        let places = agent::pool_places(&global.pin_root, &global.state_directory());
        // First: without enforcement, only the pool shows that an agent runs.
        let pool = run::stop(&places);
        if let Err(StopError::Locked(error)) = pool {
            return Err(error.into());
        }
        let of_exec = kernel::remove_of_exec(&global.pin_root);
        let (removed, result) = datapath::down(&global.pins(), &crate::pool::pins::is_of_a_pool);
        // A running agent would put everything back.
        if matches!(result, Err(datapath::Error::Locked { .. })) {
            return result.map_err(Error::from);
        }
        agent::forget_trial(&global.config, &global.state_directory());
        // Teardown continues after an error, and reports all errors.
        let (notes, errors) = remove_iptables(global);
        let of_nftables = remove_nftables(global);
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

/// Removes the table of nftables and the file of saved rules; returns every failure.
fn remove_nftables(global: &Global) -> Vec<nftables::Error> {
    let settings = config::load(&global.config).map(|loaded| agent::nftables_settings(&loaded.config));
    match nftables::Nftables::new(settings.unwrap_or_default()) {
        Ok(mut firewall) => firewall.teardown().errors,
        // Without nft there is no table of its.
        Err(error) => {
            tracing::debug!(%error, "no nftables");
            Vec::new()
        }
    }
}

/// Removes the iptables rules. The configuration may be gone or invalid: it only says whether saved files are touched.
fn remove_iptables(global: &Global) -> (Vec<String>, Vec<iptables::Error>) {
    let settings = config::load(&global.config)
        .map(|loaded| agent::firewall_settings(&loaded.config))
        .unwrap_or_default();
    match iptables::Iptables::new(settings) {
        Ok(mut firewall) => {
            let remains = firewall.teardown();
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
