//! Why packets passed or did not, and how many.

/// Number of packets and bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct Counter {
    pub packets: u64,
    /// Their lengths from the link layer header on, in bytes.
    pub bytes: u64,
}

/// Defines [`Reason`], and the fields of [`Counters`] in the same order.
macro_rules! reasons {
    ($($name:ident, $number:literal, $text:literal;)+) => {
        crate::named! {
            /// Why a packet passed (below [`FIRST_DENY`]) or was denied; the index into [`Counters`].
            Reason { $($name, $number, $text;)+ }
        }

        /// Packets judged, by reason: one such record for each direction and CPU.
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
        pub struct Counters {
            $(#[doc = $text] pub $name: Counter,)+
        }

        impl Counters {
            /// The counter of `reason`.
            #[must_use]
            pub const fn get(&self, reason: Reason) -> Counter {
                match reason { $(Reason::$name => self.$name,)+ }
            }
        }
    };
}

reasons! {
    established, 0, "Belongs to a flow that was let through before.";
    new_flow, 1, "A rule allows the flow that it opens.";
    related, 2, "ICMP error that quotes a known flow.";
    later_fragment, 3, "Fragment other than the first, between hosts of which a first fragment was let through.";
    no_rule, 4, "No rule matches.";
    deny_rule, 5, "A rule denies.";
    not_syn, 6, "TCP without a flow, and not the SYN that would open one.";
    invalid_state, 7, "TCP that does not fit the state of its flow.";
    invalid_flags, 8, "Combination of TCP flags that no sender makes.";
    not_init, 9, "SCTP without an association, and not the INIT that would open one.";
    icmp_unrelated, 10, "ICMP error that quotes no known flow.";
    icmp_unsolicited, 11, "ICMP reply without a query.";
    icmp_type, 12, "ICMP that is neither query, reply nor error.";
    fragment_short, 13, "First fragment that does not hold the whole layer 4 header (RFC 1858, RFC 7112).";
    fragment_overlap, 14, "Fragment at offset 8 bytes, which could overwrite TCP flags (RFC 3128).";
    malformed_ip, 15, "IP header or extension header that is cut off, inconsistent, or nested too deep.";
    malformed_l4, 16, "Layer 4 header that is cut off or inconsistent.";
    spoofed, 17, "The source address does not belong to the interface that the packet came in by.";
    table_full, 18, "The flow table took no new entry.";
    fragment_unknown, 19, "Fragment other than the first, between hosts of which no first fragment was let through.";
    unattributed, 20, "Forwarded under an address of this node, and its real source is unknown.";
}

/// Number of the first reason that denies.
pub const FIRST_DENY: u8 = Reason::no_rule as u8;

impl Reason {
    /// Whether a packet with this reason is denied.
    #[must_use]
    #[inline(always)]
    pub const fn denies(self) -> bool {
        self as u8 >= FIRST_DENY
    }
}

crate::plain_old_data!(Counter: 16, Counters: 336);
const _: () = assert!(size_of::<Counters>() == Reason::ALL.len() * size_of::<Counter>());
