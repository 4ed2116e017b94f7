//! The same routes for hosts that cannot run the agent: as commands, or as a file of another program.
//!
//! Exports are made from desired routes alone, without looking at this host: they are for another one. What a format
//! cannot say is an error, not a route that is silently something else.

mod bird;
mod files;
mod iproute2;
mod routers;
mod windows;

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use thiserror::Error;

use super::model::{DesiredRoute, NextHop, Target};
use super::settings::Settings;

/// A format of `routes export`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Format {
    /// Input of `ip -batch`.
    Iproute2,
    /// Sections for a `.network` file.
    SystemdNetworkd,
    /// A file for `/etc/netplan`.
    Netplan,
    /// Lines for the `[ipv4]` and `[ipv6]` sections of a connection profile.
    #[value(name = "networkmanager")]
    NetworkManager,
    /// `route-DEV` and `route6-DEV` of network-scripts.
    Ifcfg,
    /// BIRD 2: static protocols to include.
    Bird,
    /// A PowerShell script.
    Windows,
    /// MikroTik RouterOS 7: a script to import.
    Routeros,
    /// Cisco IOS: lines of the configuration.
    Ios,
    /// FRR: the configuration of staticd.
    Frr,
    /// Sections of `/etc/config/network`.
    Openwrt,
    /// Classless static routes for the DHCP server of the LAN.
    #[value(name = "dhcp-option-121")]
    DhcpOption121,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Iproute2 => "iproute2",
            Self::SystemdNetworkd => "systemd-networkd",
            Self::Netplan => "netplan",
            Self::NetworkManager => "networkmanager",
            Self::Ifcfg => "ifcfg",
            Self::Bird => "bird",
            Self::Windows => "windows",
            Self::Routeros => "routeros",
            Self::Ios => "ios",
            Self::Frr => "frr",
            Self::Openwrt => "openwrt",
            Self::DhcpOption121 => "dhcp-option-121",
        })
    }
}

/// Why routes cannot be said in a format.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ExportError {
    /// The format has no words for it.
    #[error("{format} cannot express {what} of {to}; export it in another format, or leave it out")]
    Inexpressible {
        /// The format.
        format: Format,
        /// What it lacks.
        what: &'static str,
        /// Which route.
        to: IpNet,
    },
    /// An option of DHCP has 255 bytes.
    #[error("the routes take {length} bytes in {format}, and there are 255; export fewer, or wider networks")]
    TooLong {
        /// The format.
        format: Format,
        /// Bytes.
        length: usize,
    },
    /// The format names an interface.
    #[error("{0} files name the interface; write `--dev NAME`")]
    NeedsDevice(Format),
}

/// A route as every format sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Line {
    to: IpNet,
    /// Empty: blackhole.
    via: Vec<NextHop>,
    metric: u32,
    table: u32,
    comment: String,
}

/// Writes the routes in a format. `dev` is the interface of the other host that faces the nodes.
///
/// Backup next hops are left out: without the agent nobody would know when to use them.
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

impl Line {
    /// The only next hop; an error if there are several, or none.
    fn only(&self, format: Format) -> Result<&NextHop, ExportError> {
        match self.via.as_slice() {
            [only] => Ok(only),
            [] => Err(ExportError::Inexpressible { format, what: "the blackhole", to: self.to }),
            _ => Err(ExportError::Inexpressible { format, what: "several next hops", to: self.to }),
        }
    }

    const fn v6(&self) -> bool {
        matches!(self.to, IpNet::V6(_))
    }

    /// Whether an IPv4 network has an IPv6 next hop.
    fn mixed(&self) -> bool {
        self.via.iter().any(|hop| matches!((self.to, hop.via), (IpNet::V4(_), IpAddr::V6(_))))
    }

    fn not_mixed(&self, format: Format) -> Result<(), ExportError> {
        if self.mixed() {
            Err(ExportError::Inexpressible { format, what: "the IPv6 next hop", to: self.to })
        } else {
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests;
