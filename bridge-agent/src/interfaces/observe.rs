//! Reads and watches interfaces through rtnetlink(7).

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
};

use ipnet::IpNet;
use netlink_packet_core::DefaultNla;
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressMessage},
    link::{InfoData, InfoGeneve, InfoKind, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteType},
};

use super::{Device, Link, Route, Selection, Snapshot, stations};
use crate::{kernel::netlink, model::Tunnel};

/// How often something that changed while it was read is read again.
const ATTEMPTS: usize = 10;

/// Reads [`Snapshot`]s.
#[derive(Debug)]
pub struct Observer {
    route: netlink::Route,
}

impl Observer {
    /// Of the network namespace of this thread.
    ///
    /// # Errors
    ///
    /// Of `socket(2)`.
    pub fn open() -> io::Result<Self> {
        Ok(Self { route: netlink::Route::open()? })
    }

    /// Reads the part that matters to `selection`.
    ///
    /// # Errors
    ///
    /// Those of the kernel.
    pub fn snapshot(&mut self, selection: &Selection) -> io::Result<Snapshot> {
        let mut snapshot = Snapshot::default();
        let mut far_ends = FarEnds::new();
        for message in self.dump(&RouteNetlinkMessage::GetLink(LinkMessage::default()))? {
            if let RouteNetlinkMessage::NewLink(link) = message {
                snapshot.links.extend(link_of(&link));
                far_ends.extend(far_end_of(&link));
            }
        }
        for message in self.dump(&RouteNetlinkMessage::GetAddress(AddressMessage::default()))? {
            if let RouteNetlinkMessage::NewAddress(address) = message {
                let own = address_of(&address);
                snapshot.in_use.extend(own.map(|_| address.header.index));
                snapshot.addresses.extend(own);
            }
        }
        if stations::are_needed(&snapshot.links) {
            let mut tables = stations::Tables::default();
            for request in stations::requests() {
                self.dump(&request)?.iter().for_each(|message| tables.add(message));
            }
            snapshot.stations = tables.stations();
        }
        if selection.needs_routes() {
            for family in [AddressFamily::Inet, AddressFamily::Inet6] {
                let mut request = RouteMessage::default();
                request.header.address_family = family;
                for message in self.dump(&RouteNetlinkMessage::GetRoute(request))? {
                    if let RouteNetlinkMessage::NewRoute(route) = message {
                        let Some(route) = route_of(&route, &snapshot.addresses) else { continue };
                        // The kernel makes that of the link alone.
                        if !matches!(route.to, IpNet::V6(net) if net.addr().is_unicast_link_local()) {
                            snapshot.in_use.extend(route.hops.iter().map(|(index, _)| *index));
                        }
                        snapshot.routes.extend(Some(route).filter(|route| selection.concerns(route.to)));
                    }
                }
            }
        }
        if !selection.gateways(&snapshot).is_empty() {
            far_ends.retain(|_, near| snapshot.links.get(near).is_some_and(|link| link.upper == 0));
            self.read_far_ends(&far_ends, &mut snapshot)?;
        }
        Ok(snapshot)
    }

    /// Reads the addresses of pods in their own namespaces: where routes lead to a gateway, no table of this one has them.
    fn read_far_ends(&mut self, far_ends: &FarEnds, snapshot: &mut Snapshot) -> io::Result<()> {
        let namespaces: BTreeSet<i32> = far_ends.keys().map(|(namespace, _)| *namespace).collect();
        for (namespace, family) in namespaces.iter().flat_map(|namespace| {
            [AddressFamily::Inet, AddressFamily::Inet6].map(|family| (*namespace, family))
        }) {
            let mut request = AddressMessage::default();
            request.header.family = family;
            let target = DefaultNla::new(IFA_TARGET_NETNSID, namespace.to_ne_bytes().into());
            request.attributes.push(AddressAttribute::Other(target));
            let messages = match self.dump(&RouteNetlinkMessage::GetAddress(request)) {
                // The pod has gone meanwhile.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => continue,
                result => result?,
            };
            for message in messages {
                let RouteNetlinkMessage::NewAddress(address) = message else { continue };
                if let Some(near) = far_ends.get(&(namespace, address.header.index)) {
                    snapshot.stations.extend(address_of(&address).map(|address| (address, *near)));
                }
            }
        }
        Ok(())
    }

    fn dump(&mut self, request: &RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
        let mut attempts = 0;
        loop {
            attempts += 1;
            match self.route.dump(request.clone()) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted && attempts < ATTEMPTS => {}
                result => return result,
            }
        }
    }
}

/// Interfaces of this namespace whose other end is in another one: by that namespace's id and its interface index there.
type FarEnds = BTreeMap<(i32, u32), u32>;

/// linux/if_addr.h; not in `libc`.
const IFA_TARGET_NETNSID: u16 = 10;

/// Reports when a [`Snapshot`] may have changed.
#[derive(Debug)]
pub struct Watch {
    messages: netlink::Watch,
    novelty: stations::Novelty,
}

impl Watch {
    /// Of the network namespace of this thread, inside a tokio runtime. Open it before the first snapshot is read,
    /// so that no change is missed.
    ///
    /// # Errors
    ///
    /// Of `socket(2)`.
    pub fn open() -> io::Result<Self> {
        Ok(Self { messages: netlink::Watch::open()?, novelty: stations::Novelty::default() })
    }

    /// Waits until something changes that matters to `selection`; of neighbours, those at `bridges`. May be cancelled.
    ///
    /// # Errors
    ///
    /// Of `recv(2)`.
    pub async fn changed(&mut self, selection: &Selection, bridges: &BTreeSet<u32>) -> io::Result<()> {
        let novelty = &mut self.novelty;
        self.messages
            .changed(|message| match message {
                RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route) => {
                    selection.needs_routes()
                        && route_of(route, &BTreeSet::new()).is_some_and(|route| selection.concerns(route.to))
                }
                RouteNetlinkMessage::NewAddress(address) | RouteNetlinkMessage::DelAddress(address) => {
                    address_of(address).is_some()
                }
                RouteNetlinkMessage::NewNeighbour(_) | RouteNetlinkMessage::DelNeighbour(_) => {
                    novelty.is_news(message, bridges)
                }
                _ => true,
            })
            .await
    }
}

fn link_of(message: &LinkMessage) -> Option<(u32, Link)> {
    let name = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.clone()),
        _ => None,
    })?;
    let kind = message.header.link_layer_type.into();
    let loopback = message.header.flags.contains(LinkFlags::Loopback);
    // IFLA_LINK_NETNSID is there if, and only if, the other end is elsewhere (rtnl_fill_link_netnsid, net/core/rtnetlink.c).
    let reaches_out =
        message.attributes.iter().any(|attribute| matches!(attribute, LinkAttribute::LinkNetNsId(_)));
    let unqueued = message
        .attributes
        .iter()
        .any(|attribute| matches!(attribute, LinkAttribute::Qdisc(qdisc) if qdisc == "noqueue"));
    let device = device_of(message);
    let tunnel = tunnel_of(message);
    let upper = message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::Controller(index) => Some(*index),
            _ => None,
        })
        .unwrap_or(0);
    Some((message.header.index, Link { name, kind, loopback, device, reaches_out, unqueued, tunnel, upper }))
}

fn far_end_of(message: &LinkMessage) -> Option<((i32, u32), u32)> {
    let (mut namespace, mut index) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::LinkNetNsId(id) => namespace = Some(*id),
            LinkAttribute::Link(far) => index = Some(*far),
            _ => {}
        }
    }
    Some(((namespace?, index?), message.header.index))
}

fn device_of(message: &LinkMessage) -> Device {
    let kind = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => infos.iter().find_map(|info| match info {
            LinkInfo::Kind(kind) => Some(kind.clone()),
            _ => None,
        }),
        _ => None,
    });
    match kind {
        Some(InfoKind::Veth) => Device::Veth,
        // Devices of hardware are of no kind.
        None | Some(InfoKind::Vlan | InfoKind::Bond | InfoKind::MacVlan) => Device::Ethernet,
        Some(InfoKind::Bridge) => Device::Bridge,
        Some(_) => Device::Other,
    }
}

fn tunnel_of(message: &LinkMessage) -> Option<Tunnel> {
    const IPIP: u8 = 4;
    const GRE: u8 = 47;
    let infos = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => Some(infos),
        _ => None,
    })?;
    infos.iter().find_map(|info| match info {
        LinkInfo::Data(InfoData::Vxlan(data)) => data.iter().find_map(|data| match data {
            InfoVxlan::Port(port) => Some(Tunnel::Udp(*port)),
            _ => None,
        }),
        LinkInfo::Data(InfoData::Geneve(data)) => data.iter().find_map(|data| match data {
            InfoGeneve::Port(port) => Some(Tunnel::Udp(*port)),
            _ => None,
        }),
        LinkInfo::Kind(InfoKind::IpIp) => Some(Tunnel::Protocol(IPIP)),
        LinkInfo::Kind(InfoKind::GreTun | InfoKind::GreTap) => Some(Tunnel::Protocol(GRE)),
        _ => None,
    })
}

/// Returns an address that other hosts can send to: not one of a link alone or of the loopback.
fn address_of(message: &AddressMessage) -> Option<IpAddr> {
    let mut address = None;
    for attribute in &message.attributes {
        match attribute {
            // On a point-to-point link, `Address` is the other end.
            AddressAttribute::Local(local) => address = Some(*local),
            AddressAttribute::Address(other) => address = address.or(Some(*other)),
            _ => {}
        }
    }
    address.filter(|address| match address {
        IpAddr::V4(v4) => !v4.is_loopback(),
        IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local(),
    })
}

/// Returns a unicast route; `own` are the addresses of this node.
fn route_of(message: &RouteMessage, own: &BTreeSet<IpAddr>) -> Option<Route> {
    if message.header.kind != RouteType::Unicast {
        return None;
    }
    let length = message.header.destination_prefix_length;
    let any = match message.header.address_family {
        AddressFamily::Inet => IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED),
        AddressFamily::Inet6 => IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED),
        _ => return None,
    };
    let mut destination = any;
    let mut hops = Vec::new();
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(v4)) => destination = (*v4).into(),
            RouteAttribute::Destination(RouteAddress::Inet6(v6)) => destination = (*v6).into(),
            RouteAttribute::Oif(index) => hops.push((*index, has_gateway(&message.attributes, own))),
            RouteAttribute::MultiPath(paths) => {
                hops.extend(
                    paths.iter().map(|path| (path.interface_index, has_gateway(&path.attributes, own))),
                );
            }
            _ => {}
        }
    }
    Some(Route { to: IpNet::new(destination, length).ok()?, hops })
}

/// Returns whether a route leads through another host. The kernel takes one whose gateway is an own address, such as
/// Cilium's to its pods, as one without (`nhc_scope`, net/ipv4/fib_semantics.c).
fn has_gateway(attributes: &[RouteAttribute], own: &BTreeSet<IpAddr>) -> bool {
    attributes.iter().any(|attribute| match attribute {
        RouteAttribute::Gateway(RouteAddress::Inet(v4)) => !own.contains(&IpAddr::V4(*v4)),
        RouteAttribute::Gateway(_) | RouteAttribute::Via(_) => true,
        _ => false,
    })
}
