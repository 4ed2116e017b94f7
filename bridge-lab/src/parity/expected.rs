//! What should become of a packet, and where the engines are meant to differ.

/// Names of the engines.
pub const ENGINES: [&str; 4] = ["eBPF", "eBPF behind the shield", "iptables", "nftables"];

/// Why the engines treat a packet differently, and are meant to. docs/parity.md has the reasons.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Difference {
    /// The first fragment lacks part of the layer 4 header, or the second begins at octet 8.
    ShortFragment,
    /// An IPv6 authentication header.
    AuthenticationHeader,
    /// A TCP segment outside the window.
    Window,
    /// A wrong TCP or UDP checksum, or a UDP length that is not the packet's.
    Damage,
    /// A SYN from the side that was asked, while the connection stands.
    TurnedRound,
    /// An ICMP error of a LAN router about a flow between others that was never seen.
    UntrackedError,
    /// Two hosts ping each other with the same identifier.
    CrossingQueries,
    /// An IPv6 routing header that leads on to another host.
    SourceRoute,
    /// More VLAN tags than any sender needs.
    Tags,
    /// An SCTP HEARTBEAT or SHUTDOWN ACK with a wrong verification tag.
    Tag,
    /// To a Service whose pod is of another node, from a source that stays as it is.
    Relayed,
}

impl Difference {
    /// All there are.
    pub const ALL: [Self; 11] = [
        Self::ShortFragment,
        Self::AuthenticationHeader,
        Self::Window,
        Self::Damage,
        Self::TurnedRound,
        Self::UntrackedError,
        Self::CrossingQueries,
        Self::SourceRoute,
        Self::Tags,
        Self::Tag,
        Self::Relayed,
    ];

    /// As docs/parity.md calls it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::ShortFragment => "short fragment",
            Self::AuthenticationHeader => "authentication header",
            Self::Window => "outside the window",
            Self::Damage => "damage",
            Self::TurnedRound => "connection turned round",
            Self::UntrackedError => "error about what is not followed",
            Self::CrossingQueries => "crossing pings",
            Self::SourceRoute => "segments left",
            Self::Tags => "many VLAN tags",
            Self::Tag => "verification tag",
            Self::Relayed => "Service with a pod of another node",
        }
    }
}

/// Whether a packet passes, by engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected {
    /// By eBPF alone, behind the shield or not.
    pub ebpf: bool,
    /// By iptables alone, and by nftables alone: both rely on connection tracking.
    pub iptables: bool,
    reason: Option<Difference>,
}

impl Expected {
    /// Where `reason` may make a difference.
    pub(super) const fn differing(reason: Difference, ebpf: bool, iptables: bool) -> Self {
        Self { ebpf, iptables, reason: Some(reason) }
    }

    /// Whether the packet passes each of [`ENGINES`] alone.
    #[must_use]
    pub const fn by_engine(&self) -> [bool; ENGINES.len()] {
        [self.ebpf, self.ebpf, self.iptables, self.iptables]
    }

    /// Whether it passes every engine.
    pub(super) const fn passes_all(&self) -> bool {
        self.ebpf && self.iptables
    }

    /// Whether nothing about the packet is odd.
    pub(super) const fn is_plain(&self) -> bool {
        self.reason.is_none()
    }

    /// Why the engines differ over this packet; `None`: they agree.
    #[must_use]
    pub fn difference(&self) -> Option<Difference> {
        self.reason.filter(|_| self.ebpf != self.iptables)
    }
}

impl From<bool> for Expected {
    fn from(passes: bool) -> Self {
        Self { ebpf: passes, iptables: passes, reason: None }
    }
}
