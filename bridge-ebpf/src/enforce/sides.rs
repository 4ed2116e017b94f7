//! The two sides of a packet in scope.

use bridge_common::filter::{control::Settings, policy::AddressInfo};

/// The two sides of a packet in scope.
#[repr(C)]
pub(crate) struct Sides {
    /// Of the LAN host.
    pub(crate) external: AddressInfo,
    /// Of the pod, or of the node for a NodePort.
    pub(crate) internal: AddressInfo,
    /// One of [`bridge_common::filter::policy::direction`].
    pub(crate) direction: u32,
    /// The mark of the packet if it passes unjudged.
    pub(crate) mark: u32,
    /// Index of the pod's interface; 0: unknown.
    pub(crate) interface: u32,
    /// Bits of [`bridge_common::filter::flow::flag`] for the flow that it opens, in the lowest byte; [`SETTLED`].
    pub(crate) flags: u32,
}

impl Sides {
    /// Whether a denial at `external_ingress` holds for the whole class: a rule in audit mode is to count each packet.
    #[inline(always)]
    pub(crate) const fn is_settled(&self, settings: &Settings) -> bool {
        self.flags & SETTLED != 0 && settings.has_audited == 0
    }
}

/// Packets between these addresses are judged alike as long as the policy is active and the pod is one of this node.
pub(crate) const SETTLED: u32 = 1 << 8;
