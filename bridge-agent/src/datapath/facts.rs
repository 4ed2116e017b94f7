//! Single entries of the maps, for questions about one connection.

use std::net::IpAddr;

use bridge_common::filter::{
    address::Address,
    flow::{Flow, FlowKey},
    interface::tunnel,
};

use super::{
    error::{Error, Result},
    flows::is_usable,
    maps::{Maps, now},
};
use crate::kernel::bpf;

impl Maps {
    /// Returns the flow with this key, if packets may belong to it; from the half-open table, or from the established one.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn usable_flow(&self, half_open: bool, key: &FlowKey) -> Result<Option<Flow>> {
        let [.., unanswered] = self.flow_tables();
        let (name, map) = if half_open { unanswered } else { self.established_table(key) };
        let mut flow: Option<Flow> = bpf::lookup(bpf::fd(map), key).map_err(Error::map(name))?;
        if flow.is_none() && !half_open {
            flow = self.overflowed(key)?;
        }
        let settings = self.active_settings()?;
        Ok(flow.filter(|flow| is_usable(flow, &settings, now())))
    }

    /// Returns the index of the interface that leads to a pod of this node, as the programs know it.
    #[must_use]
    pub fn hosted_interface(&self, pod: IpAddr) -> Option<u32> {
        self.hosted.get(&Address::from(pod), 0).ok().filter(|interface| *interface != 0)
    }

    /// Whether a tunnel of the node receives such outer packets.
    #[must_use]
    pub fn has_tunnel(&self, protocol: u8, port: u16) -> bool {
        self.tunnels.get(&tunnel(protocol, port), 0).is_ok()
    }
}
