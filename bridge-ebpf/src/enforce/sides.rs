//! The two sides of a packet in scope.

use bridge_common::filter::policy::AddressInfo;

/// The two sides of a packet in scope.
#[repr(C)]
pub(crate) struct Sides {
    /// Of the LAN host.
    pub(crate) external: AddressInfo,
    /// Of the pod, or of the node for a NodePort.
    pub(crate) internal: AddressInfo,
    /// One of [`bridge_common::filter::policy::direction`].
    pub(crate) direction: u32,
}
