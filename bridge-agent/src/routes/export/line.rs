//! Formats, and a route as each of them sees it.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use thiserror::Error;

use crate::routes::model::NextHop;

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
pub(super) struct Line {
    pub(super) to: IpNet,
    /// Empty: blackhole.
    pub(super) via: Vec<NextHop>,
    pub(super) metric: u32,
    pub(super) table: u32,
    pub(super) comment: String,
}

impl Line {
    /// The only next hop; an error if there are several, or none.
    pub(super) fn only(&self, format: Format) -> Result<&NextHop, ExportError> {
        match self.via.as_slice() {
            [only] => Ok(only),
            [] => Err(ExportError::Inexpressible { format, what: "the blackhole", to: self.to }),
            _ => Err(ExportError::Inexpressible { format, what: "several next hops", to: self.to }),
        }
    }

    pub(super) const fn v6(&self) -> bool {
        matches!(self.to, IpNet::V6(_))
    }

    /// Whether an IPv4 network has an IPv6 next hop.
    pub(super) fn mixed(&self) -> bool {
        self.via.iter().any(|hop| matches!((self.to, hop.via), (IpNet::V4(_), IpAddr::V6(_))))
    }

    pub(super) fn not_mixed(&self, format: Format) -> Result<(), ExportError> {
        if self.mixed() {
            Err(ExportError::Inexpressible { format, what: "the IPv6 next hop", to: self.to })
        } else {
            Ok(())
        }
    }
}
