//! The table of pods of this node, by which packets are attributed to them.

use crate::kernel::bpf;
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use bridge_common::{
    filter::{
        address::Address,
        flow::{Flow, FlowKey},
        interface::{family, tunnel},
    },
    protocol::UDP,
};

use super::{
    error::{Error, Result},
    load::Datapath,
    maps::Maps,
};
use crate::model::Tunnel;
use crate::model::{Role, Target};

impl Datapath {
    /// Returns the pods of this node that the kernel side knows: interface index, by address.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn hosted(&self) -> Result<BTreeMap<IpAddr, u32>> {
        self.maps
            .hosted
            .iter()
            .map(|entry| entry.map(|(address, interface)| (address.into(), interface)))
            .collect::<Result<_, _>>()
            .map_err(Error::aya_map("hosted"))
    }

    /// Makes exactly these the pods of this node. Call after [`Datapath::attach`] with the same `targets`. Returns the
    /// addresses that no longer lead to the same interface.
    ///
    /// # Errors
    ///
    /// [`Error::Map`]: not all could be written. Packets of a pod that is missing are attributed by the routing table.
    pub fn host(&mut self, pods: &BTreeMap<IpAddr, u32>, targets: &[Target]) -> Result<BTreeSet<IpAddr>> {
        let before = self.hosted()?;
        let mut gone = BTreeSet::new();
        for (address, interface) in &before {
            if pods.get(address) != Some(interface) {
                gone.insert(*address);
                self.maps.hosted.remove(&Address::from(*address)).map_err(Error::aya_map("hosted"))?;
            }
        }
        for (address, interface) in pods {
            if before.get(address) != Some(interface) {
                self.maps
                    .hosted
                    .insert(Address::from(*address), *interface, 0)
                    .map_err(Error::aya_map("hosted"))?;
            }
        }
        self.bind(pods, targets)?;
        Ok(gone)
    }

    /// Makes exactly these the tunnels of this node, whose outer packets only nodes of the cluster may send.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn set_tunnels(&mut self, tunnels: impl IntoIterator<Item = Tunnel>) -> Result<()> {
        let wanted: BTreeSet<u32> = tunnels
            .into_iter()
            .map(|outer| match outer {
                Tunnel::Udp(port) => tunnel(UDP, port),
                Tunnel::Protocol(protocol) => tunnel(protocol, 0),
            })
            .collect();
        let known: BTreeSet<u32> =
            self.maps.tunnels.keys().collect::<Result<_, _>>().map_err(Error::aya_map("tunnels"))?;
        for key in wanted.difference(&known) {
            self.maps.tunnels.insert(key, 1, 0).map_err(Error::aya_map("tunnels"))?;
        }
        for key in known.difference(&wanted) {
            self.maps.tunnels.remove(key).map_err(Error::aya_map("tunnels"))?;
        }
        Ok(())
    }

    /// Notes for each interface of a pod which families of addresses it is bound to.
    fn bind(&mut self, pods: &BTreeMap<IpAddr, u32>, targets: &[Target]) -> Result<()> {
        let mut families: BTreeMap<u32, u32> = BTreeMap::new();
        for (address, interface) in pods {
            let family = if address.is_ipv4() { family::V4 } else { family::V6 };
            *families.entry(*interface).or_default() |= family;
        }
        for target in targets.iter().filter(|target| matches!(target.role, Role::Internal | Role::Port)) {
            let bound = families.get(&target.index).copied().unwrap_or(0);
            let Ok(known) = self.maps.interfaces.get(&target.index, 0) else { continue };
            if known.bound != bound {
                let value = target.entry(known.fast_path, bound);
                self.maps.interfaces.insert(target.index, value, 0).map_err(Error::aya_map("interfaces"))?;
            }
        }
        Ok(())
    }
}

impl Maps {
    /// Forgets the flows of addresses: they may soon be those of other pods. Returns the number of flows.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn forget_addresses(&self, addresses: &BTreeSet<IpAddr>) -> Result<u64> {
        let addresses: BTreeSet<Address> = addresses.iter().map(|address| (*address).into()).collect();
        let mut forgotten = 0;
        for (name, map) in self.flow_tables() {
            let mut doomed = Vec::new();
            bpf::for_each(bpf::fd(map), |key: FlowKey, _: Flow| {
                if addresses.contains(&key.low) || addresses.contains(&key.high) {
                    doomed.push(key);
                }
            })
            .map_err(Error::map(name))?;
            for key in doomed {
                forgotten += u64::from(bpf::delete(bpf::fd(map), &key).map_err(Error::map(name))?);
                self.forget_cached(&key);
            }
        }
        Ok(forgotten)
    }
}
