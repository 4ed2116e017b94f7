//! One desired route against one observation: the route as the kernel shall have it, or why not.

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::rc::Rc;

use ipnet::IpNet;

use super::model::Hop;
use super::model::{
    DesiredRoute, KernelHop, KernelRoute, NextHop, Observed, PROTOCOL, RouteKey, RouteKind, TABLE_LOCAL,
    TABLE_MAIN, Target,
};
use super::prefix_map::{PrefixMap, host};
use super::refusal::Refusal;
use super::settings::Settings;
use crate::config::special::never_routed;

/// What a desired route comes to.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Resolved {
    /// `None`: nothing usable.
    pub(super) route: Option<KernelRoute>,
    /// Why there is none, or why a next hop was left out of it.
    pub(super) refusal: Option<Refusal>,
    /// No route because no next hop answers.
    pub(super) down: bool,
}

/// Where a next hop is on-link: asked from this table, for this address, on this interface if one is named.
type Question = (u32, IpAddr, Option<u32>);

/// The foreign part of an observation, indexed.
pub(super) struct Surroundings<'a> {
    observed: &'a Observed,
    settings: &'a Settings,
    foreign: PrefixMap<Vec<&'a KernelRoute>>,
    own_addresses: HashMap<IpAddr, u32>,
    devices: HashMap<&'a str, u32>,
    // Thousands of routes share few next hops on few links, and a /32 per pod shares its node with all others.
    on_link: RefCell<HashMap<Question, Result<u32, Rc<str>>>>,
}

impl<'a> Surroundings<'a> {
    pub(super) fn new(observed: &'a Observed, settings: &'a Settings) -> Self {
        let mut foreign = PrefixMap::<Vec<&KernelRoute>>::default();
        for route in observed.routes.iter().filter(|route| !route.is_own()) {
            foreign.or_default(route.key.to).push(route);
        }
        for routes in foreign.values_mut() {
            routes.sort_by_key(|route| (route.key.metric, route.key.table));
        }
        let own_addresses =
            observed.addresses.iter().map(|address| (address.net.addr(), address.ifindex)).collect();
        let devices = observed.links.iter().map(|(index, link)| (link.name.as_str(), *index)).collect();
        Self { observed, settings, foreign, own_addresses, devices, on_link: RefCell::default() }
    }

    /// Where the route lives in the kernel, if it may.
    pub(super) fn key(&self, desired: &DesiredRoute) -> RouteKey {
        let metric = match (desired.metric.unwrap_or(self.settings.metric), desired.to) {
            // IPv6 has no metric 0: the kernel turns it into IP6_RT_PRIO_USER.
            (0, IpNet::V6(_)) => 1024,
            (metric, _) => metric,
        };
        let table = desired.table.unwrap_or(self.settings.table);
        RouteKey { table, to: desired.to.trunc(), tos: 0, metric }
    }

    pub(super) fn resolve(&self, desired: &DesiredRoute) -> Resolved {
        let key = self.key(desired);
        if let Err(refusal) = self.check_destination(desired, key) {
            return Resolved { route: None, refusal: Some(refusal), down: false };
        }
        let blackhole = || KernelRoute {
            key,
            protocol: PROTOCOL,
            kind: RouteKind::Blackhole,
            hops: Vec::new(),
            altered: false,
        };
        let (via, backup) = match &desired.target {
            Target::Blackhole => return Resolved { route: Some(blackhole()), refusal: None, down: false },
            Target::Forward { via, backup } => (via, backup),
        };
        let mut first_refusal = None;
        let mut some_down = false;
        for tier in [via, backup] {
            let mut hops = Vec::with_capacity(tier.len());
            for hop in tier {
                match self.check_next_hop(desired, key, hop) {
                    Ok(ifindex) if self.observed.down.contains(&(hop.via, ifindex)) => some_down = true,
                    Ok(ifindex) => {
                        // One next hop carries everything, whatever its weight: the kernel keeps none for it.
                        let weight = if tier.len() == 1 { 1 } else { hop.weight };
                        hops.push(KernelHop { via: Some(hop.via), ifindex, weight });
                    }
                    Err(refusal) => _ = first_refusal.get_or_insert(refusal),
                }
            }
            if let [only] = hops.as_mut_slice() {
                only.weight = 1;
            }
            if !hops.is_empty() {
                hops.sort_unstable();
                hops.dedup_by_key(|hop| (hop.via, hop.ifindex));
                let route =
                    KernelRoute { key, protocol: PROTOCOL, kind: RouteKind::Unicast, hops, altered: false };
                return Resolved { route: Some(route), refusal: first_refusal, down: false };
            }
        }
        if via.is_empty() && backup.is_empty() {
            let what = "it names no next hop; write `via`, or `blackhole: true`".to_owned();
            first_refusal = Some(Refusal::Malformed { route: desired.to_string(), fault: what });
        }
        let route = (some_down && self.settings.on_withdraw == super::OnWithdraw::Blackhole).then(blackhole);
        Resolved { route, refusal: first_refusal, down: some_down }
    }

    /// Whether a foreign route of the table shares addresses with `to`.
    pub(super) fn is_contested(&self, key: RouteKey) -> bool {
        self.contest(key).is_some()
    }

    fn check_destination(&self, desired: &DesiredRoute, key: RouteKey) -> Result<(), Refusal> {
        if key.to.prefix_len() == 0 {
            let existing = self.foreign.get(key.to).and_then(|routes| routes.first());
            return Err(Refusal::Default {
                route: desired.to_string(),
                existing: existing.map(|r| self.observed.show(r)),
            });
        }
        if let Some(network) = never_routed(&key.to) {
            return Err(Refusal::NotRoutable { route: desired.to_string(), network });
        }
        if key.table == TABLE_LOCAL || key.table == 0 {
            let what = format!(
                "table {} is not for routes; write 254 for the main table, or a number of your own",
                key.table
            );
            return Err(Refusal::Malformed { route: desired.to_string(), fault: what });
        }
        match self.contest(key) {
            None => Ok(()),
            Some(other) if other.is_local() => {
                Err(Refusal::Local { route: desired.to_string(), local: self.observed.show(other) })
            }
            Some(other) => Err(Refusal::Foreign {
                route: desired.to_string(),
                foreign: self.observed.show(other),
                hint: (other.key.to != key.to && other.key.to.contains(&key.to)).then_some(other.key.to),
            }),
        }
    }

    /// The foreign route that forbids `key`, the most telling one first.
    fn contest(&self, key: RouteKey) -> Option<&'a KernelRoute> {
        let inside = self.foreign.inside(key.to);
        let covering = self.foreign.covering(key.to).filter(|(net, _)| {
            // A default route is meant to be narrowed, and so is what the operator names.
            net.prefix_len() > 0 && !(*net != key.to && self.settings.allow_inside.contains(net))
        });
        covering.chain(inside).flat_map(|(_, routes)| routes.iter().copied()).find(|route| {
            // What the host is connected to is looked at in every table: a rule may put ours before it.
            route.key.table == key.table || route.is_local()
        })
    }

    fn check_next_hop(&self, desired: &DesiredRoute, key: RouteKey, hop: &NextHop) -> Result<u32, Refusal> {
        let (route, via) = (|| desired.to_string(), hop.via);
        match (desired.to, via) {
            (IpNet::V6(_), IpAddr::V4(_)) => return Err(Refusal::Ipv6ViaIpv4 { route: route(), via }),
            (IpNet::V4(_), IpAddr::V6(_)) if !self.observed.v4_via_v6 => {
                return Err(Refusal::Ipv4ViaIpv6 { route: route(), via });
            }
            _ => {}
        }
        if !(1..=256).contains(&hop.weight) {
            let what = format!("next hop {via} has the weight {}; write 1 to 256", hop.weight);
            return Err(Refusal::Malformed { route: route(), fault: what });
        }
        if desired.to.contains(&via) {
            let what = format!(
                "next hop {via} lies inside the network that is reached through it; write the node's LAN address"
            );
            return Err(Refusal::Malformed { route: route(), fault: what });
        }
        if let Some(ifindex) = self.own_addresses.get(&via) {
            let dev = self
                .observed
                .links
                .get(ifindex)
                .map_or_else(|| ifindex.to_string(), |link| link.name.clone());
            return Err(Refusal::OwnAddress { route: route(), via, dev });
        }
        if let Some(kind) = self.not_a_host(via) {
            return Err(Refusal::NotAHost { route: route(), via, kind });
        }
        let device = match &hop.dev {
            None => None,
            Some(dev) => match self.devices.get(dev.as_str()) {
                None => return Err(Refusal::NoSuchDevice { route: route(), dev: dev.clone() }),
                Some(index) => Some(*index),
            },
        };
        if device.is_none() && matches!(via, IpAddr::V6(via) if via.is_unicast_link_local()) {
            return Err(Refusal::LinkLocalWithoutDev { route: route(), via });
        }
        let question = (key.table, via, device);
        let find = || self.find_link(via, device, key.table).map_err(Rc::from);
        let found = self.on_link.borrow_mut().entry(question).or_insert_with(find).clone();
        found.map_err(|why| Refusal::NotOnLink { route: route(), via, why: why.to_string() })
    }

    fn not_a_host(&self, via: IpAddr) -> Option<&'static str> {
        if via.is_unspecified() {
            return Some("unspecified");
        }
        if via.is_loopback() {
            return Some("loopback");
        }
        if via.is_multicast() {
            return Some("multicast");
        }
        let exact = self.foreign.get(host(via)).into_iter().flatten();
        exact.filter(|route| route.key.table == TABLE_LOCAL).find_map(|route| match route.kind {
            RouteKind::Broadcast => Some("broadcast"),
            RouteKind::Anycast => Some("anycast"),
            _ => None,
        })
    }

    /// Every next hop that was found on-link so far, whether it answers or not.
    pub(super) fn next_hops(&self) -> BTreeSet<Hop> {
        let found = self.on_link.borrow();
        found.iter().filter_map(|((_, via, _), link)| Some((*via, *link.as_ref().ok()?))).collect()
    }

    /// The interface whose connected network holds `via`, found as the kernel finds it: longest prefix first.
    fn find_link(&self, via: IpAddr, device: Option<u32>, table: u32) -> Result<u32, String> {
        for (_, routes) in self.foreign.covering(host(via)) {
            let candidates = routes.iter().filter(|route| {
                (route.key.table == TABLE_MAIN || route.key.table == table)
                    && device.is_none_or(|device| route.hops.iter().any(|hop| hop.ifindex == device))
            });
            let mut through = None;
            for route in candidates {
                if route.is_connected() {
                    let up = route.hops.iter().map(|hop| hop.ifindex).find(|index| {
                        device.is_none_or(|device| device == *index)
                            && self.observed.links.get(index).is_some_and(|link| link.up)
                    });
                    if let Some(ifindex) = up {
                        return Ok(ifindex);
                    }
                } else {
                    through = Some(*route);
                }
            }
            if let Some(route) = through {
                return Err(self
                    .down_link(via)
                    .unwrap_or_else(|| format!("it is reached by `{}`", self.observed.show(route))));
            }
        }
        Err(self.down_link(via).unwrap_or_else(|| {
            match device.and_then(|index| self.observed.links.get(&index)) {
                Some(link) => format!("{} is not connected to its network", link.name),
                None => "no connected network holds it".to_owned(),
            }
        }))
    }

    fn down_link(&self, via: IpAddr) -> Option<String> {
        let address = self.observed.addresses.iter().find(|address| {
            address.net.contains(&via)
                && self.observed.links.get(&address.ifindex).is_some_and(|link| !link.up)
        })?;
        let link = self.observed.links.get(&address.ifindex)?;
        Some(format!("interface {} ({}) is down", link.name, address.net))
    }
}
