//! The places in the packet path that programs are attached to.

use aya::programs::TcAttachType;
use aya_obj::generated::bpf_attach_type;
use bridge_common::filter::interface::role;
use serde::Serialize;

/// The side of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Towards the LAN.
    External,
    /// Towards pods.
    Internal,
    /// Towards pods: a bridge that they are ports of.
    Bridge,
    /// Towards one pod: a port of a bridge.
    Port,
    /// Towards pods by their routes; programs of the network plugin bring packets from there to the interfaces of pods.
    Gateway,
}

impl Role {
    /// As the kernel side knows it: [`bridge_common::filter::interface::role`].
    #[must_use]
    pub const fn number(self) -> u32 {
        match self {
            Self::External => role::EXTERNAL,
            Self::Internal => role::INTERNAL,
            Self::Bridge => role::BRIDGE,
            Self::Port => role::PORT,
            Self::Gateway => role::GATEWAY,
        }
    }

    /// Returns the hooks of an interface of this role. Egress hooks come first: they must be there before the first packet
    /// is marked at an ingress hook.
    #[must_use]
    pub const fn hooks(self) -> &'static [Hook] {
        match self {
            Self::External => &[Hook::ExternalEgress, Hook::ExternalIngress],
            Self::Internal | Self::Bridge => &[Hook::InternalEgress, Hook::InternalIngress],
            // Packets to the pod leave by the bridge.
            Self::Port => &[Hook::InternalIngress],
            Self::Gateway => &[],
        }
    }
}

/// A program, and the direction on its interface that it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Hook {
    /// LAN -> node.
    ExternalIngress,
    /// Node -> LAN.
    ExternalEgress,
    /// Pod -> node.
    InternalIngress,
    /// Node -> pod.
    InternalEgress,
}

impl Hook {
    /// Every hook.
    pub const ALL: [Self; 4] =
        [Self::ExternalIngress, Self::ExternalEgress, Self::InternalIngress, Self::InternalEgress];

    /// Name of the program.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::ExternalIngress => "external_ingress",
            Self::ExternalEgress => "external_egress",
            Self::InternalIngress => "internal_ingress",
            Self::InternalEgress => "internal_egress",
        }
    }

    /// The hook whose program has this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|hook| hook.name() == name)
    }

    pub(crate) const fn attach_type(self) -> TcAttachType {
        match self {
            Self::ExternalIngress | Self::InternalIngress => TcAttachType::Ingress,
            Self::ExternalEgress | Self::InternalEgress => TcAttachType::Egress,
        }
    }

    /// The same of TCX.
    pub(crate) const fn tcx(self) -> bpf_attach_type {
        match self {
            Self::ExternalIngress | Self::InternalIngress => bpf_attach_type::BPF_TCX_INGRESS,
            Self::ExternalEgress | Self::InternalEgress => bpf_attach_type::BPF_TCX_EGRESS,
        }
    }
}
