//! Values of maps that only the kernel side reads.

use bridge_common::filter::policy::AddressInfo;

/// The properties of an IPv4 address in a policy.
#[repr(C, align(32))]
#[derive(Clone, Copy)]
pub(crate) struct CachedAddress {
    /// As it lies in the header.
    pub(crate) address: u32,
    /// Of the policy; 0: the entry is empty.
    pub(crate) generation: u32,
    pub(crate) info: AddressInfo,
    pub(crate) padding: u64,
}

/// `struct bpf_fib_lookup` (linux/bpf.h), with the members of its unions that matter here.
#[repr(C)]
pub(crate) struct FibLookup {
    pub(crate) family: u8,
    pub(crate) l4_protocol: u8,
    pub(crate) source_port: [u8; 2],
    pub(crate) destination_port: [u8; 2],
    /// In: anything but 0 asks for the MTU of the route; out: the MTU.
    pub(crate) mtu: u16,
    /// In: of the interface that the packet came in by; out: that it leaves by.
    pub(crate) ifindex: u32,
    /// IPv4: type of service in the first byte; IPv6: first word of the header, without the version.
    pub(crate) traffic_class: [u8; 4],
    pub(crate) source: [u8; 16],
    pub(crate) destination: [u8; 16],
    pub(crate) vlan: [u8; 4],
    pub(crate) source_address: [u16; 3],
    pub(crate) destination_address: [u16; 3],
}
const _: () = assert!(size_of::<FibLookup>() == 64);
