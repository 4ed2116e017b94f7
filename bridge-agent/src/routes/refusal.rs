//! Reasons for refusing a desired route, and their remedies.

use std::net::IpAddr;

use ipnet::IpNet;
use thiserror::Error;

/// A reason. `route` is the desired route, in the words of [`super::DesiredRoute`]; the other route is named in the
/// words of `ip route`.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Refusal {
    /// The whole address space.
    #[error("{route} would take over the default route{}; write the networks of the pods instead", existing.as_ref().map(|e| format!(" `{e}`")).unwrap_or_default())]
    Default {
        /// The desired route.
        route: String,
        /// The default route of the host, if it has one.
        existing: Option<String>,
    },
    /// It shares addresses with the host or a network the host is connected to.
    #[error(
        "{route} overlaps `{local}`, a network of this host itself; write only networks that lie behind the next hop"
    )]
    Local {
        /// The desired route.
        route: String,
        /// The local or connected route.
        local: String,
    },
    /// It shares addresses with a route of another program.
    #[error(
        "{route} overlaps `{foreign}`, which bridge did not make; remove one of the two{}",
        hint.map(|net| format!(", or write `allowInside: [{net}]` if the narrower one shall win")).unwrap_or_default()
    )]
    Foreign {
        /// The desired route.
        route: String,
        /// The other route.
        foreign: String,
        /// The network to allow, if the desired one lies inside the foreign one.
        hint: Option<IpNet>,
    },
    /// No connected network holds the next hop.
    #[error(
        "{route}: next hop {via} is not on-link: {why}; write a next hop that shares a network with this host"
    )]
    NotOnLink {
        /// The desired route.
        route: String,
        /// Its next hop.
        via: IpAddr,
        /// The state that was found instead.
        why: String,
    },
    /// The next hop is this host.
    #[error(
        "{route}: next hop {via} is this host's own address ({dev}); write the address of the cluster node"
    )]
    OwnAddress {
        /// The desired route.
        route: String,
        /// Its next hop.
        via: IpAddr,
        /// The interface that has it.
        dev: String,
    },
    /// The next hop is not the address of one host.
    #[error("{route}: next hop {via} is a {kind} address, not a host; write the address of the cluster node")]
    NotAHost {
        /// The desired route.
        route: String,
        /// Its next hop.
        via: IpAddr,
        /// Broadcast, multicast, unspecified, loopback.
        kind: &'static str,
    },
    /// IPv4 through IPv6 on a kernel that cannot.
    #[error(
        "{route}: this kernel cannot send IPv4 through the IPv6 next hop {via} (it takes Linux 5.2 with IPv6 on); write an IPv4 next hop"
    )]
    Ipv4ViaIpv6 {
        /// The desired route.
        route: String,
        /// Its next hop.
        via: IpAddr,
    },
    /// IPv6 through IPv4, which no kernel does.
    #[error("{route}: an IPv6 network cannot have the IPv4 next hop {via}; write an IPv6 next hop")]
    Ipv6ViaIpv4 {
        /// The desired route.
        route: String,
        /// Its next hop.
        via: IpAddr,
    },
    /// A link-local next hop does not say on which link.
    #[error("{route}: the link-local next hop {via} exists on every link; write `dev` with it")]
    LinkLocalWithoutDev {
        /// The desired route.
        route: String,
        /// Its next hop.
        via: IpAddr,
    },
    /// The interface does not exist.
    #[error("{route}: there is no interface {dev}; `ip link` lists those there are")]
    NoSuchDevice {
        /// The desired route.
        route: String,
        dev: String,
    },
    /// Addresses that are never routed between hosts.
    #[error("{route}: {network} is never routed; write the networks of the pods")]
    NotRoutable {
        /// The desired route.
        route: String,
        /// Loopback, multicast or link-local.
        network: String,
    },
    /// Something that is not a route at all.
    #[error("{route}: {fault}")]
    Malformed {
        /// The desired route.
        route: String,
        /// The fault and its remedy.
        fault: String,
    },
}

impl Refusal {
    /// A short name for metrics and events.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Default { .. } => "default_route",
            Self::Local { .. } => "overlaps_local",
            Self::Foreign { .. } => "overlaps_foreign",
            Self::NotOnLink { .. } => "next_hop_not_on_link",
            Self::OwnAddress { .. } => "next_hop_is_own_address",
            Self::NotAHost { .. } => "next_hop_not_a_host",
            Self::Ipv4ViaIpv6 { .. } => "ipv4_via_ipv6",
            Self::Ipv6ViaIpv4 { .. } => "ipv6_via_ipv4",
            Self::LinkLocalWithoutDev { .. } => "link_local_without_dev",
            Self::NoSuchDevice { .. } => "no_such_device",
            Self::NotRoutable { .. } => "not_routable",
            Self::Malformed { .. } => "malformed",
        }
    }
}
