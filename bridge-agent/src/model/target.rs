//! The interfaces that programs are attached to.

use bridge_common::filter::interface::Interface;

use super::Role;

/// An interface that programs are attached to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Target {
    /// Index of the interface.
    pub index: u32,
    pub name: String,
    /// Pods or LAN.
    pub role: Role,
    /// Length of its link layer header in bytes.
    pub link_header: u32,
    /// How the fast path may use it, bits of [`bridge_common::filter::fast_path::ability`], unless foreign programs are in
    /// the way.
    pub fast_path: u32,
    /// Index of the bridge that it is a port of; 0: none.
    pub upper: u32,
    /// Whether it is a tunnel of this node.
    pub tunnel: bool,
}

impl Target {
    /// Returns its entry in the table of interfaces.
    pub(crate) const fn entry(&self, fast_path: u32, bound: u32) -> Interface {
        Interface {
            role: self.role.number(),
            link_header: self.link_header,
            fast_path,
            upper: self.upper,
            bound,
            tunnel: self.tunnel as u32,
        }
    }
}
