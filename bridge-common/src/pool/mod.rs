//! The port pool: types and code that the connect hooks and the agent share.
//!
//! The pool lives in one array of 64-bit words that both sides change with atomic operations only, so that a port is
//! claimed by the kernel (a connect hook) and by the agent (a lease) in the same place. The array begins with the
//! bitmap of free slots, their number, the number of all slots and a cursor, then come the slots, all alike
//! ([`Geometry::stride`] words each):
//!
//! ```text
//! header (17) state, live claims, eight ports that were given back lately, and when (owner slots only), the key in the
//!             tables (3), the time of the last use; of owner slots also: ports that are in use, warm or rest, ports that rest,
//!             and the time of the last search among those
//! summary (S) bit w is set while word w of `free` may have a set bit
//! free (W)    bit i is set while port `base + i` may be taken
//! touched (W) bit i is set when port `base + i` came back since the last sweep (owner slots only)
//! ```
//!
//! A *destination slot* belongs to a (destination address, destination port, protocol) and holds the ports that
//! are free. An *owner slot* belongs to a destination slot and a network namespace and holds that namespace's
//! *warm* ports: closed, but maybe still known to conntrack on this node, and therefore only for the same namespace.
//! The live claims of a destination slot include one for each of its owner slots.

pub mod bitmap;
mod room;
pub mod shares;
pub mod slots;
pub mod uses;

use bitmap::Bitmap;

use crate::protocol;
pub use bitmap::MAX_WORDS;

/// Changes whenever a type or the layout in this module does; part of the path under which the maps are pinned.
pub const ABI_VERSION: u32 = 2;

/// Protocols with ports that leave without a hook of the pool: `IPPROTO_DCCP`, `IPPROTO_SCTP`, `IPPROTO_UDPLITE`.
pub const UNSERVED: [u8; 3] = [33, 132, 136];

/// Words of the bitmap of free slots.
pub const ALLOCATOR_WORDS: u32 = 1024;
/// Summary words of the bitmap of free slots.
pub const ALLOCATOR_SUMMARY: u32 = ALLOCATOR_WORDS / 64;
/// Index of the number of free slots.
pub const FREE_SLOTS: u32 = ALLOCATOR_SUMMARY + ALLOCATOR_WORDS;
/// Index of the number of all slots, templates included.
pub const ALL_SLOTS: u32 = FREE_SLOTS + 1;
/// Index of the slot where the next search for an idle slot begins.
pub const CURSOR: u32 = ALL_SLOTS + 1;
/// Most slots there can be.
pub const MAX_SLOTS: u32 = ALLOCATOR_WORDS * 64;
/// Words before the summary of a slot.
pub const HEADER_WORDS: u32 = 2 + CLOSING_WORDS + KEY_WORDS + 4;
/// Words of a slot's key in the tables.
pub const KEY_WORDS: u32 = 3;
/// Words of a slot that remember a port that was given back lately.
pub const CLOSING_WORDS: u32 = 8;

/// The slot whose free ports a new TCP destination begins with: every port of the pool.
pub const TEMPLATE_TCP: u32 = 0;
/// The slot whose free ports a new UDP destination begins with.
pub const TEMPLATE_UDP: u32 = 1;
/// The slot whose free ports are for unconnected UDP. Disjoint from [`TEMPLATE_UDP`]: an unconnected socket may send to
/// every destination, and no bitmap of one destination could know.
pub const TEMPLATE_UDP_ANY: u32 = 2;
/// The slot without any port that an owner slot begins with.
pub const TEMPLATE_EMPTY: u32 = 3;
/// Slots below are templates and never handed out.
pub const FIRST_SLOT: u32 = 4;

/// Slot state: not in use. Zero, so that a fresh map says it.
pub const SLOT_FREE: u64 = 0;
/// Slot state: ports may be claimed in it.
pub const SLOT_OPEN: u64 = 1;
/// Slot state, in addition to [`SLOT_OPEN`]: the slot is being taken away by the hook or the agent that set this.
pub const SLOT_CLOSED: u64 = 2;
/// Slot state, in addition to [`SLOT_OPEN`]: the agent reads the slot, which is not taken away meanwhile.
pub const SLOT_PINNED: u64 = 4;

/// [`Lease::state`]: the socket holds its port.
pub const LEASE_HELD: u64 = 1;
/// [`Lease::state`]: the last descriptor of the socket is gone.
pub const LEASE_FILE_CLOSED: u64 = 2;
/// [`Lease::state`]: TCP has entered CLOSE.
pub const LEASE_TCP_CLOSED: u64 = 4;
/// [`Lease::state`]: the socket is an unconnected UDP socket; its port is good for every destination.
pub const LEASE_ANY: u64 = 8;

/// [`Lease::state`]: TCP sent a SYN from the port.
pub const LEASE_CONNECTING: u64 = 16;
/// [`Lease::state`]: both ends of the connection use TCP timestamps (RFC 7323), so its tuple can be used again at once.
pub const LEASE_TIMESTAMPS: u64 = 32;
/// [`Lease::state`]: this end closed first, so the kernel keeps the tuple in TIME_WAIT.
pub const LEASE_TIME_WAIT: u64 = 64;
/// [`Lease::state`]: the port was free for everybody when it was claimed.
pub const LEASE_FRESH: u64 = 128;
/// [`Lease::state`]: the socket was bound to port 0 and got its port, which it does not hold towards a destination yet. Only
/// `netns_cookie` and `index` are set.
pub const LEASE_BOUND: u64 = 256;
/// The bits of [`Lease::state`] that belong to one connection of a socket.
pub const LEASE_OF_CONNECTION: u64 =
    LEASE_FILE_CLOSED | LEASE_TCP_CLOSED | LEASE_CONNECTING | LEASE_TIMESTAMPS | LEASE_TIME_WAIT;

/// Shortest time, in nanoseconds, that the kernel keeps a tuple in TIME_WAIT (`TCP_TIMEWAIT_LEN`, include/net/tcp.h).
pub const TIME_WAIT_NS: u64 = 60_000_000_000;
/// [`Config::flags`]: a socket that is bound outside the pool must not connect to a destination of the pool.
pub const FLAG_STRICT: u32 = 1;
/// [`Config::flags`]: UDP sockets that bind port 0 get a port of the pool.
pub const FLAG_BIND_UDP: u32 = 2;

/// Layout of the pool and its settings; the only element of map `POOL_CONFIG`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct Config {
    /// Lowest port of the span, host byte order; a multiple of 64.
    pub base: u32,
    /// Words of a slot's `free`; 1 to [`MAX_WORDS`]. The span has 64 times as many ports.
    pub words: u32,
    /// Slots there are, templates included; at most [`MAX_SLOTS`].
    pub slots: u32,
    /// `FLAG_*`.
    pub flags: u32,
    /// Most ports that one namespace may keep from others towards one destination; 0 for no limit; or [`shares::SHARE`]
    /// with its flags.
    pub quota: u32,
    /// Ports of [`TEMPLATE_UDP_ANY`].
    pub unconnected: u32,
}

/// Where the words of a slot lie; follows from [`Config`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// See [`Config::words`].
    pub words: u32,
}

impl Geometry {
    /// Words of a slot's summary.
    #[inline(always)]
    #[must_use]
    pub const fn summary(self) -> u32 {
        self.words.div_ceil(64)
    }

    /// Words from one slot to the next.
    #[inline(always)]
    #[must_use]
    pub const fn stride(self) -> u32 {
        HEADER_WORDS + self.summary() + 2 * self.words
    }

    /// Index of the first word (the state) of a slot.
    #[inline(always)]
    #[must_use]
    pub const fn slot(self, slot: u32) -> u32 {
        CURSOR + 1 + slot * self.stride()
    }

    /// Index of the count of live claims of a slot.
    #[inline(always)]
    #[must_use]
    pub const fn live(self, slot: u32) -> u32 {
        self.slot(slot) + 1
    }

    /// Index of the word that remembers when a port was given back.
    #[inline(always)]
    #[must_use]
    pub const fn closing(self, slot: u32, index: u32) -> u32 {
        self.slot(slot) + 2 + index % CLOSING_WORDS
    }

    /// Index of the first word of a slot's key.
    #[inline(always)]
    #[must_use]
    pub const fn key(self, slot: u32) -> u32 {
        self.slot(slot) + 2 + CLOSING_WORDS
    }

    /// Index of the time (`CLOCK_MONOTONIC`, in nanoseconds) when a port of a slot was last given back, or the slot was made.
    #[inline(always)]
    #[must_use]
    pub const fn used(self, slot: u32) -> u32 {
        self.key(slot) + KEY_WORDS
    }

    /// Index of the number of ports that the namespace of an owner slot keeps from others: in use, warm, or at rest.
    #[inline(always)]
    #[must_use]
    pub const fn owned(self, slot: u32) -> u32 {
        self.used(slot) + 1
    }

    /// Index of the number of all ports of the pool: a template has no owner.
    #[inline(always)]
    #[must_use]
    pub const fn ports(self) -> u32 {
        self.owned(TEMPLATE_TCP)
    }

    /// Index of the number of ports of an owner slot that rest.
    #[inline(always)]
    #[must_use]
    pub const fn resting(self, slot: u32) -> u32 {
        self.used(slot) + 2
    }

    /// Index of the time (as [`Geometry::used`]) of the last search among the ports of an owner slot that rest; 0 if it found
    /// one that the kernel has released.
    #[inline(always)]
    #[must_use]
    pub const fn searched(self, slot: u32) -> u32 {
        self.used(slot) + 3
    }

    /// The bitmap of ports that may be taken from a slot.
    #[inline(always)]
    #[must_use]
    pub const fn free(self, slot: u32) -> Bitmap {
        Bitmap { at: self.slot(slot) + HEADER_WORDS, summary: self.summary(), words: self.words }
    }

    /// Index of the first `touched` word of a slot.
    #[inline(always)]
    #[must_use]
    pub const fn touched(self, slot: u32) -> u32 {
        self.slot(slot) + HEADER_WORDS + self.summary() + self.words
    }

    /// Returns the number of words of the whole array for this number of slots.
    #[inline(always)]
    #[must_use]
    pub const fn total(self, slots: u32) -> u32 {
        self.slot(slots)
    }
}

/// The bitmap of free slots.
pub const ALLOCATOR: Bitmap = Bitmap { at: 0, summary: ALLOCATOR_SUMMARY, words: ALLOCATOR_WORDS };

/// A destination, towards which a source port must be unique. Key of map `POOL_DESTINATIONS`; its value is a slot
/// (`u32`).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct Destination {
    /// Network byte order; an IPv4 address is v4-mapped (RFC 4291 section 2.5.5.2).
    address: [u8; 16],
    /// Network byte order.
    port: [u8; 2],
    /// [`protocol::TCP`] or [`protocol::UDP`].
    protocol: u8,
    /// Zero.
    padding: u8,
}

impl Destination {
    /// A destination from the bytes of a packet or a `sockaddr`: address and port in network byte order.
    #[inline(always)]
    #[must_use]
    pub const fn from_network(address: [u8; 16], port: [u8; 2], protocol: u8) -> Self {
        Self { address, port, protocol, padding: 0 }
    }

    /// An IPv4 destination from the bytes of a packet or a `sockaddr_in`: address and port in network byte order.
    #[inline(always)]
    #[must_use]
    pub const fn from_network_v4(a: [u8; 4], port: [u8; 2], protocol: u8) -> Self {
        Self::from_network([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a[0], a[1], a[2], a[3]], port, protocol)
    }

    /// Stands for all destinations of an unconnected UDP socket.
    pub const ANY_UDP: Self = Self::from_network([0; 16], [0; 2], protocol::UDP);

    /// Whether the address is an IPv4 address.
    #[inline(always)]
    #[must_use]
    pub const fn is_v4(&self) -> bool {
        let [first, second, _] = self.words();
        first == 0
            && second.to_ne_bytes()[0] == 0
            && second.to_ne_bytes()[1] == 0
            && second.to_ne_bytes()[2] == 0xff
            && second.to_ne_bytes()[3] == 0xff
    }

    /// Network byte order, IPv4 as v4-mapped.
    #[must_use]
    pub const fn address(&self) -> [u8; 16] {
        self.address
    }

    /// The destination as three words, the third one below 2^32.
    #[inline(always)]
    #[must_use]
    pub const fn words(&self) -> [u64; 3] {
        let a = &self.address;
        [
            u64::from_ne_bytes([a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]]),
            u64::from_ne_bytes([a[8], a[9], a[10], a[11], a[12], a[13], a[14], a[15]]),
            u64::from_le_bytes([self.port[0], self.port[1], self.protocol, 0, 0, 0, 0, 0]),
        ]
    }

    /// The inverse of [`Destination::words`].
    #[inline(always)]
    #[must_use]
    pub const fn from_words(words: [u64; 3]) -> Self {
        let (a, b, c) = (words[0].to_ne_bytes(), words[1].to_ne_bytes(), words[2].to_le_bytes());
        let address =
            [a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]];
        Self::from_network(address, [c[0], c[1]], c[2])
    }

    /// Host byte order.
    #[must_use]
    pub const fn port(&self) -> u16 {
        u16::from_be_bytes(self.port)
    }

    /// [`protocol::TCP`] or [`protocol::UDP`].
    #[must_use]
    pub const fn protocol(&self) -> u8 {
        self.protocol
    }
}

/// Key of map `POOL_OWNERS`; its value is a slot (`u32`).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct Owner {
    /// `SO_NETNS_COOKIE` of the namespace; never 0.
    pub netns_cookie: u64,
    /// Slot of the destination.
    pub slot: u32,
    /// Zero.
    pub padding: u32,
}

/// The port a socket holds, and for whom; kept in the socket's own storage (map `POOL_LEASES`).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct Lease {
    /// `LEASE_*`; changed by atomic operations only. The side that clears [`LEASE_HELD`] gives the port back.
    pub state: u64,
    /// `SO_NETNS_COOKIE` of the socket's namespace.
    pub netns_cookie: u64,
    /// Id of the cgroup (version 2) of the connecting process: the inode number of its directory.
    pub cgroup_id: u64,
    /// `CLOCK_MONOTONIC`, in nanoseconds, of the claim.
    pub since_ns: u64,
    /// Slot of the destination.
    pub slot: u32,
    /// Slot of the namespace's warm ports.
    pub owner_slot: u32,
    /// The port, counted from [`Config::base`].
    pub index: u32,
    /// Process id, in the initial namespace, of the connecting process.
    pub pid: u32,
    /// User id, in the initial namespace, of the connecting process.
    pub uid: u32,
    /// Where the port leads to.
    pub destination: Destination,
    /// Name of the connecting thread, padded with zeros.
    pub comm: [u8; 16],
    /// Index of the interface that the socket is bound to; 0: none. Since the SYN.
    pub device: u32,
    /// Source address, in network byte order, IPv4 as v4-mapped. Since the SYN.
    pub source: [u8; 16],
    /// Zero.
    pub padding: u32,
}

const _: () = assert!(core::mem::offset_of!(Lease, destination) == 52);

/// A port that the agent has claimed for a client that will bind it itself. Key of map `POOL_GRANTS`.
///
/// The hook takes the port over by removing the entry, the agent ends an unused grant by removing it: whose removal
/// succeeds owns the port.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct Grant {
    /// Where the port leads to.
    pub destination: Destination,
    /// The port, counted from [`Config::base`], in the byte order of the host.
    index: [u8; 4],
}

impl Grant {
    /// The grant of the port `index` (counted from [`Config::base`]) towards `destination`.
    #[inline(always)]
    #[must_use]
    pub const fn new(destination: Destination, index: u32) -> Self {
        Self { destination, index: index.to_ne_bytes() }
    }

    /// The port, counted from [`Config::base`].
    #[must_use]
    pub const fn index(&self) -> u32 {
        u32::from_ne_bytes(self.index)
    }
}

/// Value of map `POOL_GRANTS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct Granted {
    /// The namespace the port was granted to; no other may use it.
    pub netns_cookie: u64,
    /// Slot of the destination.
    pub slot: u32,
    /// Slot of the namespace's warm ports.
    pub owner_slot: u32,
}

/// A port that rests: the kernel would refuse it, so no socket gets it. Key of map `POOL_RESTING`.
///
/// It is in no bitmap meanwhile and counts as a live claim of both slots. The hook or the agent ends the rest by removing
/// the entry; the one whose removal succeeds releases the port.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct RestingPort {
    /// Slot of the destination.
    pub slot: u32,
    /// The port, counted from [`Config::base`].
    pub index: u32,
}

/// Value of map `POOL_RESTING`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct Rest {
    /// `CLOCK_MONOTONIC`, in nanoseconds, of the time when the kernel has normally released the port.
    pub usable_ns: u64,
    /// The same of its end: by then the kernel has released the port even if the peer has closed late.
    pub until_ns: u64,
    /// [`Lease::cgroup_id`] of the socket.
    pub group: u64,
    /// Slot of the namespace's warm ports.
    pub owner_slot: u32,
    /// As [`Lease::device`].
    pub device: u32,
    /// As [`Lease::source`]; all zeros: no socket had the port, and it may serve at once if there is no other.
    pub source: [u8; 16],
}

/// Most ports that rest at once, over all destinations.
pub const MAX_RESTS: u32 = 262_144;

/// Why a connect failed for want of a port (`EADDRNOTAVAIL` to the program, except for [`Refusal::KERNEL`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct Refusal(pub u32);

impl Refusal {
    /// Every port of the pool is in use towards the destination, or warm with another namespace.
    pub const EXHAUSTED: Self = Self(1);
    /// The socket is bound to a port outside the pool.
    pub const OUTSIDE: Self = Self(2);
    /// The socket is bound to a port that another connection to the destination uses.
    pub const TAKEN: Self = Self(3);
    /// The namespace keeps as many ports towards the destination as its quota allows.
    pub const QUOTA: Self = Self(4);
    /// No slot is left for one more destination or namespace.
    pub const TABLE_FULL: Self = Self(5);
    /// Every port that was tried is bound exclusively by a socket that does not use the pool.
    pub const BIND: Self = Self(6);
    /// The kernel had no memory for the socket's storage.
    pub const MEMORY: Self = Self(7);
    /// A socket of a protocol of [`UNSERVED`] must not be created.
    pub const PROTOCOL: Self = Self(8);
    /// Every port that is not in use towards the destination is in TIME_WAIT, at a peer without TCP timestamps.
    pub const RESTING: Self = Self(9);
    /// The namespace uses its share of the slots for destinations, or of the ports, and others use the pool.
    pub const SHARE: Self = Self(10);
    /// The kernel refused the connection after it had got a port: no SYN was sent. The program sees the kernel's own error.
    pub const KERNEL: Self = Self(11);
    /// One above the highest that hooks count.
    pub const COUNT: u32 = 12;
    /// The client of the API holds as many leases as it may. Of the agent alone.
    pub const LEASES: Self = Self(12);
    /// One above the highest.
    pub const END: u32 = 13;

    /// The name used in metrics and events.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::EXHAUSTED => "exhausted",
            Self::OUTSIDE => "outside",
            Self::TAKEN => "taken",
            Self::QUOTA => "quota",
            Self::TABLE_FULL => "table-full",
            Self::BIND => "bind",
            Self::MEMORY => "memory",
            Self::PROTOCOL => "protocol",
            Self::RESTING => "resting",
            Self::SHARE => "share",
            Self::KERNEL => "kernel",
            Self::LEASES => "leases",
            _ => "unknown",
        }
    }
}

/// Indexes into the per-CPU counters of map `POOL_COUNTERS`.
pub mod counter {
    /// Ports claimed by the hooks, taken over from the agent included.
    pub const CLAIMS: u32 = 0;
    /// Ports given back by the hooks.
    pub const RELEASES: u32 = 1;
    /// Claims of a port that the program had bound itself.
    pub const ADOPTIONS: u32 = 2;
    /// Binds of a claimed port that the kernel refused, because of a socket outside the pool.
    pub const BIND_RETRIES: u32 = 3;
    /// Events that were not written: the ring was full, or one was written less than 10 ms before on the CPU.
    pub const EVENTS_LOST: u32 = 4;
    /// Ports that began to rest.
    pub const RESTS: u32 = 5;
    /// Connects that the kernel refused after the hook had bound a port: no SYN was sent.
    pub const CONNECT_FAILURES: u32 = 6;
    /// Ports that should have rested, and did not: the control group has its share of such ports, or there is no memory.
    pub const RESTS_DENIED: u32 = 7;
    /// Counters of refusals begin here, in the order of [`super::Refusal`].
    pub const REFUSALS: u32 = 8;
    /// How many there are.
    pub const COUNT: u32 = REFUSALS + super::Refusal::COUNT;
}

/// A refused connect, in ring buffer `POOL_EVENTS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct Event {
    /// `CLOCK_MONOTONIC`, in nanoseconds.
    pub time_ns: u64,
    /// `SO_NETNS_COOKIE` of the socket's namespace.
    pub netns_cookie: u64,
    /// Id of the cgroup (version 2) of the process.
    pub cgroup_id: u64,
    /// A [`Refusal`].
    pub refusal: u32,
    /// Process id in the initial namespace.
    pub pid: u32,
    /// User id in the initial namespace.
    pub uid: u32,
    /// Where the program wanted to connect to.
    pub destination: Destination,
    /// Name of the thread, padded with zeros.
    pub comm: [u8; 16],
}

crate::plain_old_data!(
    Config: 24,
    Destination: 20,
    Owner: 16,
    Lease: 112,
    Grant: 24,
    Granted: 16,
    RestingPort: 8,
    Rest: 48,
    Event: 72,
);
