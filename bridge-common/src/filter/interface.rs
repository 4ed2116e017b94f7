//! Properties of the interfaces that packets of pods pass.

/// Value of the interface table, by interface index.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Interface {
    /// One of [`role`].
    pub role: u32,
    /// Length of the link layer header in bytes: 14 for Ethernet, 0 for devices that have none.
    pub link_header: u32,
    /// Bits of [`crate::filter::fast_path::ability`].
    pub fast_path: u32,
}

/// Values of [`Interface::role`].
pub mod role {
    /// Towards the LAN.
    pub const EXTERNAL: u32 = 1;
    /// Towards pods.
    pub const INTERNAL: u32 = 2;
    /// A bridge whose ports lead to pods. No program is attached to it.
    pub const BRIDGE: u32 = 3;
}

crate::plain_old_data!(Interface: 12);
