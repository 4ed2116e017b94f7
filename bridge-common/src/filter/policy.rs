//! The compiled policy: the tables by which the first packet of a flow is judged.
//!
//! Every address has a class (longest prefix match). Rules are sorted into sets by how they name the two sides:
//! rules that name neither side are in the global set of their direction, rules that name one side are in the set
//! of that address class, rules that name both in the set of the pair of classes. A packet is judged by at most
//! these four sets; a set answers by port, in a fixed number of steps. Among the answers a deny wins, then the rule
//! with the smallest index. So the cost does not depend on how many rules there are.

/// Which side opens a flow; index of per-direction tables.
pub mod direction {
    /// A LAN host to a pod.
    pub const INBOUND: u8 = 0;
    /// A pod to a LAN host.
    pub const OUTBOUND: u8 = 1;
    /// A LAN host to a NodePort of this node.
    pub const NODE_PORT: u8 = 2;
    /// How many there are.
    pub const COUNT: usize = 3;
    /// The directions by number, as they are shown.
    pub const NAMES: [&str; COUNT] = ["inbound", "outbound", "nodeport"];
}

/// The properties of an address, by its longest matching prefix.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct AddressInfo {
    /// Addresses of one class are named by the same rules.
    pub class: u32,
    /// Bits of [`side`].
    pub side: u16,
    /// Index into the policy's table of origins, for addresses of pods and LAN hosts; see [`origin`].
    pub origin: u16,
    /// Sets of the rules that name this side only, by direction (inbound, outbound); 0: none.
    pub sets: [u32; 2],
}

/// Bits of [`AddressInfo::side`]; none: a foreign address.
pub mod side {
    /// Address of a pod.
    pub const POD: u16 = 1;
    /// Address of a LAN host.
    pub const EXTERNAL: u16 = 2;
    /// Address of this node: in scope as destination on a NodePort only.
    pub const LOCAL: u16 = 4;
    /// Address of another node of the cluster.
    pub const NODE: u16 = 8;
}

/// Values of [`AddressInfo::origin`]: the number by which a packet carries the identity of its source past address
/// translation.
pub mod origin {
    /// There are more distinct properties of addresses than numbers. The highest index.
    pub const OVERFLOW: u16 = (1 << 13) - 1;
}

/// Key of the sets of rules that name both sides.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct PairKey {
    /// Class of the LAN host's address.
    pub external: u32,
    /// Class of the pod's address.
    pub pod: u32,
}

/// Sets of the rules that name both sides, by direction (inbound, outbound); 0: none.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct PairSets {
    /// Index of a [`RuleSet`], by direction.
    pub sets: [u32; 2],
}

/// Index of [`RuleSet::roots`]: the protocols that rules distinguish.
pub mod class {
    /// TCP.
    pub const TCP: usize = 0;
    /// UDP.
    pub const UDP: usize = 1;
    /// SCTP.
    pub const SCTP: usize = 2;
    /// ICMP over IPv4, ICMPv6 over IPv6.
    pub const ICMP: usize = 3;
    /// Every other IP protocol.
    pub const OTHER: usize = 4;
    /// How many there are.
    pub const COUNT: usize = 5;
}

/// The rules of a set, by protocol: a [`reference`] each, to be resolved by destination port, and if the
/// result is again no leaf, by source port.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct RuleSet {
    /// By [`protocol`].
    pub roots: [u32; class::COUNT],
    /// The same, of the rules in audit mode, which decide nothing.
    pub audited: [u32; class::COUNT],
}

/// References between the tables of port lookup: a tag in the two highest bits, an index or a verdict below.
pub mod reference {
    /// Bits that hold the index or verdict.
    pub const VALUE: u32 = (1 << 30) - 1;
    /// A verdict: 0 is "no rule matches", else [`DENY`] and the index of the rule plus one.
    pub const LEAF: u32 = 0;
    /// Index of a [`super::PortIntervals`].
    pub const INTERVALS: u32 = 1 << 30;
    /// Index of a [`super::PortPage`] by the high byte of the port; its entries are references.
    pub const DIRECTORY: u32 = 2 << 30;
    /// Only inside the page of a [`DIRECTORY`]: index of a [`super::PortPage`] by the low byte of the port.
    pub const PAGE: u32 = 3 << 30;
    /// In a leaf: the rule denies.
    pub const DENY: u32 = 1 << 29;
    /// In a leaf: index of the rule, plus one.
    pub const RULE: u32 = DENY - 1;

    /// The tag of a reference.
    #[must_use]
    #[inline(always)]
    pub const fn tag(reference: u32) -> u32 {
        reference & !VALUE
    }
}

/// How many intervals a [`PortIntervals`] holds.
pub const INTERVALS: usize = 10;

/// A partition of the ports into few intervals: one cache line.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct PortIntervals {
    /// First port of each interval, host byte order, ascending; the first is 0. Unused ones repeat the last.
    pub first: [u16; INTERVALS],
    /// The reference of each interval. Unused ones repeat the last.
    pub references: [u32; INTERVALS],
    /// Zero.
    pub padding: u32,
}

/// A table of 256 references; see [`reference::DIRECTORY`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct PortPage {
    /// By high or low byte of the port.
    pub references: [u32; 256],
}

/// How often a rule decided about the first packet of a flow.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct RuleHits {
    pub packets: u64,
    /// Their lengths from the link layer header on, in bytes.
    pub bytes: u64,
}

/// Name of a rule, for readers of the maps.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct RuleInfo {
    /// UTF-8, filled up with zeros.
    pub name: [u8; 64],
    /// One of [`direction`].
    pub direction: u32,
    /// 1: the rule denies.
    pub deny: u32,
    /// 1: the rule is in audit mode: it decides nothing, and is counted and reported as if it did.
    pub audit: u32,
}

crate::plain_old_data!(
    AddressInfo: 16,
    PairKey: 8,
    PairSets: 8,
    RuleSet: 40,
    PortIntervals: 64,
    PortPage: 1024,
    RuleHits: 16,
    RuleInfo: 76,
);
