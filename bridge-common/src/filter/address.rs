//! IP addresses as map keys hold them.

/// An IP address in network byte order; IPv4 as `::ffff:a.b.c.d` (RFC 4291, 2.5.5.2).
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct Address {
    /// The sixteen bytes, most significant first.
    pub octets: [u8; 16],
}

impl Address {
    /// From the four bytes of an IPv4 header field.
    #[must_use]
    #[inline(always)]
    pub const fn from_v4(v4: [u8; 4]) -> Self {
        Self::from_v4_word(u32::from_ne_bytes(v4))
    }

    /// From an IPv4 header field, as it lies in memory.
    #[must_use]
    #[inline(always)]
    pub const fn from_v4_word(v4: u32) -> Self {
        Self::from_words([0, 0, u32::from_be(0xffff), v4])
    }

    /// From its four words, as they lie in memory.
    #[must_use]
    #[inline(always)]
    pub const fn from_words(words: [u32; 4]) -> Self {
        // By halves: a CPU that is to read a half of which both words were written just now must wait.
        let halves = [pair(words[0], words[1]), pair(words[2], words[3])];
        // SAFETY: of the same size, and any bits are octets.
        Self { octets: unsafe { core::mem::transmute::<[u64; 2], [u8; 16]>(halves) } }
    }

    /// From the sixteen bytes of an IPv6 header field.
    #[must_use]
    #[inline(always)]
    pub const fn from_v6(v6: [u8; 16]) -> Self {
        Self { octets: v6 }
    }

    /// The last four bytes: the IPv4 address, where it is one.
    #[must_use]
    #[inline(always)]
    pub const fn v4(&self) -> [u8; 4] {
        let o = &self.octets;
        [o[12], o[13], o[14], o[15]]
    }

    /// Whether this stands for an IPv4 address.
    #[must_use]
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        let (high, low) = self.halves();
        high == 0 && low >> 32 == 0xffff
    }

    /// The address as two words, as they lie in memory.
    #[must_use]
    #[inline(always)]
    pub const fn words(&self) -> [u64; 2] {
        // SAFETY: of the same size; it is aligned as its words, and any bits are words.
        unsafe { core::mem::transmute::<[u8; 16], [u64; 2]>(self.octets) }
    }

    /// Copies another address, word by word: where the two might overlap, the compiler calls a loop over bytes to assign one.
    #[inline(always)]
    pub fn set(&mut self, other: &Self) {
        let [first, second] = other.words();
        let words = (&raw mut *self).cast::<u64>();
        // SAFETY: it has two words, and is aligned as they are.
        unsafe {
            words.write_volatile(first);
            words.add(1).write_volatile(second);
        }
    }

    /// The address as two numbers, the more significant first.
    #[must_use]
    #[inline(always)]
    pub const fn halves(&self) -> (u64, u64) {
        let o = &self.octets;
        (
            u64::from_be_bytes([o[0], o[1], o[2], o[3], o[4], o[5], o[6], o[7]]),
            u64::from_be_bytes([o[8], o[9], o[10], o[11], o[12], o[13], o[14], o[15]]),
        )
    }
}

/// Two words as they lie in memory, one after the other.
#[inline(always)]
const fn pair(first: u32, second: u32) -> u64 {
    let (first, second) = (first as u64, second as u64);
    if cfg!(target_endian = "little") { second << 32 | first } else { first << 32 | second }
}

#[cfg(feature = "user")]
impl From<core::net::IpAddr> for Address {
    fn from(address: core::net::IpAddr) -> Self {
        match address {
            core::net::IpAddr::V4(v4) => Self::from_v4(v4.octets()),
            core::net::IpAddr::V6(v6) => Self::from_v6(v6.octets()),
        }
    }
}

#[cfg(feature = "user")]
impl From<Address> for core::net::IpAddr {
    fn from(address: Address) -> Self {
        if address.is_v4() { Self::V4(address.v4().into()) } else { Self::V6(address.octets.into()) }
    }
}

crate::plain_old_data!(Address: 16);
