//! Kinds of ICMP packets, by their type.

use crate::packet::Kind;

/// RFC 792, RFC 950.
#[inline(always)]
pub(super) fn icmp_kind(icmp_type: u8) -> Option<Kind> {
    match icmp_type {
        8 | 13 | 15 | 17 => Some(Kind::Query),
        0 | 14 | 16 | 18 => Some(Kind::Reply),
        3 | 4 | 5 | 11 | 12 => Some(Kind::Error),
        _ => None,
    }
}

/// RFC 4443.
#[inline(always)]
pub(super) fn icmpv6_kind(icmp_type: u8) -> Option<Kind> {
    match icmp_type {
        128 => Some(Kind::Query),
        129 => Some(Kind::Reply),
        1..=4 => Some(Kind::Error),
        _ => None,
    }
}
