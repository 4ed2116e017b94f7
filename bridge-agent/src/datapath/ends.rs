//! FINs of LAN hosts, as the kernel side notes them before the pod has acknowledged them.

use std::{
    net::IpAddr,
    os::fd::{AsFd, BorrowedFd},
};

use aya::maps::{MapData, RingBuf};
use bridge_common::filter::{
    flow::{END_LOW, FlowKey, state},
    policy::direction,
};
use zerocopy::FromBytes as _;

use super::{
    error::{Error, Result},
    maps::{Maps, typed},
};
use crate::kernel::bpf;

/// A connection with a FIN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended(FlowKey);

/// One end of a connection: address, and port in host byte order.
pub type End = (IpAddr, u16);

/// Returns the initiator and the responder of a flow.
pub(super) fn ends(key: &FlowKey, initiator: u8) -> (End, End) {
    let low = (IpAddr::from(key.low), u16::from_be_bytes(key.low_port));
    let high = (IpAddr::from(key.high), u16::from_be_bytes(key.high_port));
    if initiator == END_LOW { (low, high) } else { (high, low) }
}

/// A connection that goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unended {
    /// Whether the pod opened it.
    pub outbound: bool,
    /// The pod.
    pub pod: End,
    /// The LAN host.
    pub peer: End,
    /// IP protocol number.
    pub protocol: u8,
}

/// Takes FINs from the ring buffer.
pub struct EndReader(RingBuf<MapData>);

impl EndReader {
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn new(maps: &Maps) -> Result<Self> {
        typed(&maps.pins, "ends").map(Self)
    }
}

/// The FINs that were noted and not yet taken.
impl Iterator for EndReader {
    type Item = Ended;

    fn next(&mut self) -> Option<Ended> {
        let record = self.0.next()?;
        FlowKey::read_from_prefix(&record).ok().map(|(key, _)| Ended(key))
    }
}

/// Readable while there are FINs.
impl AsFd for EndReader {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Maps {
    /// Returns the connection, if it still counts as established: no FIN of it was acknowledged.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn unended(&self, Ended(key): &Ended) -> Result<Option<Unended>> {
        use bridge_common::filter::flow::Flow;
        let flow: Option<Flow> = bpf::lookup(bpf::fd(&self.flows), key).map_err(Error::map("flows"))?;
        let Some(flow) = flow.filter(|flow| flow.state == state::ESTABLISHED) else { return Ok(None) };
        let (initiator, responder) = ends(key, flow.initiator);
        let outbound = flow.direction == direction::OUTBOUND;
        let (pod, peer) = if outbound { (initiator, responder) } else { (responder, initiator) };
        Ok(Some(Unended { outbound, pod, peer, protocol: key.protocol }))
    }
}
