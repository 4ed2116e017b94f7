//! The same routes for hosts that cannot run the agent: as commands, or as a file of another program.
//!
//! Exports are made from desired routes alone, without looking at this host: they are for another one. What a format
//! cannot say is an error, not a route that is silently something else.

mod bird;
mod files;
mod iproute2;
mod line;
mod routers;
mod windows;

use line::Line;
pub use line::{ExportError, Format};

use super::model::{DesiredRoute, Target};
use super::settings::Settings;

/// Writes the routes in a format. `dev` is the interface of the other host that faces the nodes.
///
/// Backup next hops are left out: only the agent knows when to use them.
pub fn export<'a>(
    format: Format,
    routes: impl IntoIterator<Item = &'a DesiredRoute>,
    settings: &Settings,
    dev: Option<&str>,
) -> Result<String, ExportError> {
    let lines: Vec<_> = routes.into_iter().map(|route| line(route, settings)).collect();
    let dev = || dev.ok_or(ExportError::NeedsDevice(format));
    match format {
        Format::Iproute2 => Ok(iproute2::batch(&lines)),
        Format::SystemdNetworkd => files::systemd_networkd(&lines, dev()?),
        Format::Netplan => files::netplan(&lines, dev()?),
        Format::NetworkManager => files::network_manager(&lines),
        Format::Ifcfg => files::ifcfg(&lines, dev()?),
        Format::Bird => Ok(bird::config(&lines)),
        Format::Windows => windows::script(&lines, dev()?),
        Format::Routeros => routers::routeros(&lines),
        Format::Ios => routers::ios(&lines),
        Format::Frr => routers::frr(&lines),
        Format::Openwrt => routers::openwrt(&lines, dev()?),
        Format::DhcpOption121 => routers::dhcp(&lines),
    }
}

fn line(route: &DesiredRoute, settings: &Settings) -> Line {
    let via = match &route.target {
        Target::Forward { via, .. } => via.clone(),
        Target::Blackhole => Vec::new(),
    };
    let comment = if route.origin.is_empty() {
        route.source.to_string()
    } else {
        format!("{} {}", route.source, route.origin)
    };
    Line {
        to: route.to,
        via,
        metric: route.metric.unwrap_or(settings.metric),
        table: route.table.unwrap_or(settings.table),
        // Names come from outside, and a comment ends with its line.
        comment: comment.chars().map(|c| if c.is_control() { ' ' } else { c }).collect(),
    }
}

#[cfg(test)]
mod tests;
