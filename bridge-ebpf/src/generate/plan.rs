// Layouts that the packet source and its user side share: included by both.

/// Length of a frame in bytes: Ethernet, IPv4 and TCP without options, ten bytes of data.
pub const FRAME: usize = 64;

/// How many addresses packets may end at.
pub const SINKS: usize = 2;

/// The packets that the source sends.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// The frame with its varying fields, one address and its port and both checksums, zero. Whole words, because the
    /// kernel side copies it so; in the order of the wire.
    pub frame: [u64; FRAME / 8],
    /// Interface to send by, in the namespace of who runs the program.
    pub interface: u32,
    /// Flows to go round in, at least 1.
    pub flows: u32,
    /// The first value of the varying fields; host byte order. Ports change fastest.
    pub first_address: u32,
    /// Sum of the 16-bit words of the IP header (RFC 1071), without the varying fields.
    pub ip_sum: u32,
    /// Likewise of the TCP segment and its pseudo header.
    pub tcp_sum: u32,
    /// Host byte order.
    pub first_port: u16,
    /// Ports for each address.
    pub ports: u16,
    /// The varying fields: 0: source address and port; 1: destination address and port.
    pub destination: u32,
    /// Which sink they are meant for.
    pub sink: u32,
    /// CPUs that packets may arrive on, for `window`.
    pub cpus: [u32; 2],
    /// No packet is made whose number is this or greater.
    pub end: u64,
    /// No packet is made while this many packets have not arrived; 0: without a limit.
    pub window: u64,
    /// Number of packets that had arrived before packet 0.
    pub arrived: u64,
}

const _: () = assert!(size_of::<Plan>() == 128);
