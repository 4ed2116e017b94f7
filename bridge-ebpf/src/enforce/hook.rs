//! The hooks that the programs are attached to.

/// Numbers of the hooks, which subprograms take.
pub(crate) struct Hook;

impl Hook {
    /// LAN to node.
    pub(crate) const EXTERNAL_INGRESS: u32 = 0;
    /// Pod to node.
    pub(crate) const INTERNAL_INGRESS: u32 = 1;
    /// Node to pod.
    pub(crate) const INTERNAL_EGRESS: u32 = 2;
    /// Node to LAN.
    pub(crate) const EXTERNAL_EGRESS: u32 = 3;
}
