//! Cutting a packet into fragments (RFC 791, section 3.2; RFC 8200, section 4.5).

use super::Packet;

impl Packet {
    /// Cuts the payload into fragments of at most `size` octets of payload each.
    ///
    /// # Panics
    /// `size` is not a positive multiple of 8, or the payload is too long to be cut.
    pub fn fragments(&self, size: usize, id: u32) -> Vec<Self> {
        assert!(size > 0 && size.is_multiple_of(8), "fragments are cut at multiples of 8 octets");
        let last = self.payload.len().div_ceil(size).saturating_sub(1);
        let cut = |(i, part): (usize, &[u8])| {
            let offset = u16::try_from(i * size / 8).expect("a payload of at most 64 KiB");
            self.clone().raw(self.protocol, part).fragment(offset, i != last, id)
        };
        self.payload.chunks(size).enumerate().map(cut).collect()
    }
}
