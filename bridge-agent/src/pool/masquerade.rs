//! The nftables table that masquerades connections of the pool to ports of the pool, and its watch.
//!
//! `nft flush ruleset`, which many firewalls run when they start, removes the table of every program. The watch asks the
//! kernel for the generation of the ruleset, and lists the table only if that number has changed.

use std::{
    io::{self, Write as _},
    process::{Command, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use ipnet::IpNet;
use tracing::warn;

use super::{service::Service, tables::lock};
use crate::kernel::nftables::Ruleset;
use crate::model::PortSet;

/// Removes the table of [`script`], also if there is none.
pub const REMOVAL: &str = "table inet bridge-pool\ndelete table inet bridge-pool\n";

/// Pause between two questions; a repair takes some 20 ms more.
const INTERVAL: Duration = Duration::from_millis(250);

/// Renders an nftables table that masquerades packets from `sources` to `destinations` to ports of the pool. Its priority
/// is ahead of `srcnat`, and the first translation of a connection is the only one.
#[must_use]
pub fn script(sources: &[IpNet], destinations: &[IpNet], ports: &PortSet) -> String {
    let mut rules = String::new();
    for v4 in [true, false] {
        let of = |nets: &[IpNet]| {
            let nets: Vec<String> = nets
                .iter()
                .filter(|net| matches!(net, IpNet::V4(_)) == v4)
                .map(ToString::to_string)
                .collect();
            (!nets.is_empty()).then(|| nets.join(", "))
        };
        let (Some(from), Some(to)) = (of(sources), of(destinations)) else { continue };
        let family = if v4 { "ip" } else { "ip6" };
        // A connection from a port of the pool keeps its port if the 4-tuple is free. Each range is one rule, since a
        // translation takes one range only.
        for range in ports.ranges() {
            for protocol in ["tcp", "udp"] {
                rules += &format!(
                    "    {family} saddr {{ {from} }} {family} daddr {{ {to} }} {protocol} sport {range} masquerade to :{range}\n"
                );
            }
        }
        if let Some(range) = ports.ranges().iter().max_by_key(|range| range.last - range.first) {
            for protocol in ["tcp", "udp"] {
                rules += &format!(
                    "    {family} saddr {{ {from} }} {family} daddr {{ {to} }} meta l4proto {protocol} masquerade to :{range}\n"
                );
            }
        }
    }
    format!(
        "{REMOVAL}table inet bridge-pool {{\n  chain postrouting {{\n    type nat hook postrouting priority srcnat - 5\n{rules}  }}\n}}\n"
    )
}

/// Removes the table, if there is one. Without nft, or on a kernel without nf_tables, there is none.
///
/// # Errors
/// The error of nft.
pub fn remove() -> io::Result<()> {
    if list().is_some() { run(REMOVAL) } else { Ok(()) }
}

/// The table of one pool, as it must be.
#[derive(Debug, Default)]
pub struct Masquerade {
    wanted: Mutex<Option<Wanted>>,
}

#[derive(Debug)]
struct Wanted {
    script: String,
    /// The output of `nft list table` right after the script ran.
    listing: String,
}

impl Masquerade {
    /// Installs the table of a [`script`], in one transaction.
    ///
    /// # Errors
    /// There is no nft, or its error. The table is then as before, and is not watched any more.
    pub fn install(&self, script: String) -> io::Result<()> {
        let mut wanted = lock(&self.wanted);
        *wanted = None;
        run(&script)?;
        let listing =
            list().ok_or_else(|| io::Error::other("nft does not list the table that it has made"))?;
        *wanted = Some(Wanted { script, listing });
        Ok(())
    }

    /// Removes the table; see [`remove`].
    ///
    /// # Errors
    /// The error of nft.
    pub fn uninstall(&self) -> io::Result<()> {
        let mut wanted = lock(&self.wanted);
        *wanted = None;
        remove()
    }

    /// Installs the table again if it is not as it must be. Returns how it differed.
    fn repair(&self) -> io::Result<Option<&'static str>> {
        let mut wanted = lock(&self.wanted);
        let Some(wanted) = wanted.as_mut() else { return Ok(None) };
        let difference = match list() {
            Some(listing) if listing == wanted.listing => return Ok(None),
            Some(_) => "changed",
            None => "removed",
        };
        run(&wanted.script)?;
        wanted.listing = list().unwrap_or_default();
        Ok(Some(difference))
    }
}

/// Installs the table again within a second after another program removed or changed it, for as long as it runs.
pub(super) async fn watch(service: Arc<Service>, masquerade: Arc<Masquerade>) {
    // Without nf_tables there is no table.
    let Ok(mut ruleset) = Ruleset::open() else { return };
    let mut generation = None;
    let mut failed = None;
    loop {
        tokio::time::sleep(INTERVAL).await;
        let now = ruleset.generation().ok();
        if now.is_some() && now == generation && failed.is_none() {
            continue;
        }
        let table = Arc::clone(&masquerade);
        let result = tokio::task::spawn_blocking(move || table.repair()).await;
        let error = match result {
            Ok(Ok(None)) => None,
            Ok(Ok(Some(difference))) => {
                warn!(
                    difference,
                    "another program took table inet bridge-pool away; the agent installed it again"
                );
                service.count_masquerade_repair();
                None
            }
            Ok(Err(error)) => Some(error.to_string()),
            Err(error) => Some(error.to_string()),
        };
        // A change during the repair has a later number, so that the next round sees it.
        generation = now;
        if error != failed {
            let sentence = error.as_ref().map(|error| {
                format!(
                    "table inet bridge-pool cannot be installed again ({error}): connections of pods may leave from \
                     ports outside the pool; remedy: repair nft, or set portPool.masquerade to false"
                )
            });
            if let Some(sentence) = &sentence {
                warn!("{sentence}");
            }
            service.set_masquerade_failure(sentence);
            failed = error;
        }
    }
}

fn run(script: &str) -> io::Result<()> {
    let mut command = Command::new("nft");
    command.args(["-f", "-"]).stdin(Stdio::piped()).stderr(Stdio::piped());
    let cannot = |error: io::Error| io::Error::new(error.kind(), format!("cannot run nft: {error}"));
    let mut child = command.spawn().map_err(cannot)?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(script.as_bytes())?;
    }
    let output = child.wait_with_output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(format!("nft: {}", String::from_utf8_lossy(&output.stderr).trim())))
}

fn list() -> Option<String> {
    let output = Command::new("nft").args(["-nn", "list", "table", "inet", "bridge-pool"]).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::PortRange;

    #[test]
    fn the_script_keeps_families_apart() {
        let net = |text: &str| text.parse().unwrap();
        let ports = [PortRange { first: 61001, last: 61100 }].into_iter().collect();
        let text = script(&[net("10.200.1.0/24")], &[net("192.168.31.0/24"), net("fd31::/64")], &ports);
        assert!(text.contains("ip saddr { 10.200.1.0/24 } ip daddr { 192.168.31.0/24 } tcp sport 61001-61100 masquerade to :61001-61100"), "{text}");
        assert!(!text.contains("ip6"), "{text}");
    }
}
