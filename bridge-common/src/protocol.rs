//! IP protocol numbers.

/// RFC 792.
pub const ICMP: u8 = 1;
/// RFC 9293.
pub const TCP: u8 = 6;
/// RFC 768.
pub const UDP: u8 = 17;
/// RFC 4443.
pub const ICMPV6: u8 = 58;
/// RFC 9260.
pub const SCTP: u8 = 132;
/// RFC 3828.
pub const UDP_LITE: u8 = 136;
