//! Properties of the interfaces that packets of pods pass.

/// Value of the interface table, by interface index.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct Interface {
    /// One of [`role`].
    pub role: u32,
    /// Length of the link layer header in bytes: 14 for Ethernet, 0 for devices that have none.
    pub link_header: u32,
    /// Bits of [`crate::filter::fast_path::ability`].
    pub fast_path: u32,
    /// Index of the bridge that it is a port of; 0: none.
    pub upper: u32,
    /// Of the interface of a pod, bits of [`family`]: the pod's addresses of this family are in the table of hosted addresses.
    pub bound: u32,
    /// 1: the inner side of a tunnel, whose outer packets come from believed nodes only. 0: not.
    pub tunnel: u32,
}

/// Bits of [`Interface::bound`].
pub mod family {
    /// IPv4.
    pub const V4: u32 = 1;
    /// IPv6.
    pub const V6: u32 = 2;
}

/// Values of [`Interface::role`].
pub mod role {
    /// Towards the LAN.
    pub const EXTERNAL: u32 = 1;
    /// Towards pods.
    pub const INTERNAL: u32 = 2;
    /// A bridge whose ports lead to pods.
    pub const BRIDGE: u32 = 3;
    /// A port of such a bridge: a pod is identified by it.
    pub const PORT: u32 = 4;
    /// Routes to pods lead to it, and programs of the network plugin bring packets from there to the interfaces of the
    /// pods. It has no programs of bridge.
    pub const GATEWAY: u32 = 5;
}

/// Returns the key of the table of tunnels for outer packets of this IP protocol, with this UDP destination port (host byte
/// order; 0 for protocols without ports).
#[must_use]
#[inline(always)]
pub const fn tunnel(protocol: u8, port: u16) -> u32 {
    (protocol as u32) << 16 | port as u32
}

crate::plain_old_data!(Interface: 24);
