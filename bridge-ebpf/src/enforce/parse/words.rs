//! Reads a packet by words, from the network header on.

use core::mem::MaybeUninit;

use aya_ebpf::{bindings::__sk_buff, helpers::generated::bpf_skb_load_bytes_relative};

use crate::maps::INTERFACES;

/// Offsets count from the network header, so that devices with and without a link layer header read alike.
const BPF_HDR_START_NET: u32 = 1;

/// Length of an Ethernet header.
pub(super) const ETHERNET: usize = 14;
pub(super) const ETH_P_IP: u16 = 0x0800;
pub(super) const ETH_P_IPV6: u16 = 0x86dd;

/// Whether a packet that begins with this byte begins with an Ethernet header. On a device that has none, the IP header
/// is there.
#[inline(always)]
pub(super) fn is_ethernet(skb: *mut __sk_buff, first: u8) -> bool {
    if !matches!(first >> 4, 4 | 6) {
        return true;
    }
    // SAFETY: the context is valid while the program runs.
    let ifindex = unsafe { (*skb).ifindex };
    // SAFETY: only copied.
    unsafe { INTERFACES.get(&ifindex) }.is_some_and(|interface| interface.link_header == ETHERNET as u32)
}

/// Reads `N` words of the packet, each as it lies there. By words, since the target has no unaligned access, and moves
/// bytes one by one where it knows nothing of their alignment.
#[inline(always)]
pub(super) fn load<const N: usize>(skb: *mut __sk_buff, offset: u32) -> Option<[Word; N]> {
    // Not zeroed first: that would be a loop.
    let mut words = MaybeUninit::<[Word; N]>::uninit();
    // SAFETY: the helper writes as many bytes as the array has, and checks the offset against the packet.
    let result = unsafe {
        bpf_skb_load_bytes_relative(
            skb.cast(),
            offset,
            words.as_mut_ptr().cast(),
            size_of::<[Word; N]>() as u32,
            BPF_HDR_START_NET,
        )
    };
    // SAFETY: the helper has filled it, and any bits are a word.
    (result == 0).then(|| unsafe { words.assume_init() })
}

/// Four bytes of a packet, as they lie there.
#[repr(C, align(4))]
#[derive(Clone, Copy)]
pub(super) struct Word(pub(super) u32);

impl Word {
    #[inline(always)]
    pub(super) fn bytes(self) -> [u8; 4] {
        self.0.to_ne_bytes()
    }

    /// As a number in network byte order.
    #[inline(always)]
    pub(super) fn number(self) -> u32 {
        u32::from_be(self.0)
    }

    /// As two numbers in network byte order.
    #[inline(always)]
    pub(super) fn halves(self) -> [u16; 2] {
        let number = self.number();
        [(number >> 16) as u16, number as u16]
    }

    /// As two ports, which stay in network byte order.
    #[inline(always)]
    pub(super) fn ports(self) -> [[u8; 2]; 2] {
        let [a, b, c, d] = self.bytes();
        [[a, b], [c, d]]
    }
}
