//! Seeing and sending frames on an interface (packet(7)).
//!
//! Where a capture sits: on the way in before TC's ingress hook, on the way out after its egress hook. So a
//! packet that a program on `eth0` of a node denies is seen coming in there, and never seen going out of a
//! `cali…` interface.

use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

use etherparse::{LaxPacketHeaders, NetHeaders, TransportHeader};
use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, SockFilter, Socket, Type};
use std::net::{IpAddr, SocketAddr};

use crate::lab::Netns;

/// Room for frames that wait to be looked at; with less, a burst is lost.
pub(crate) const BUFFER: libc::c_int = 32 << 20;
/// The longest frame: an IP packet of 64 KiB (segmentation offload makes such), and its Ethernet header.
const LONGEST: usize = 66 << 10;
const VLAN_TAG: usize = 4;

/// A frame that was seen.
#[derive(Clone, Debug)]
pub struct Frame {
    /// From the destination MAC address on, VLAN tags in their place. Checksums of packets that a socket on this
    /// machine sent may not be filled in (checksum offload).
    pub bytes: Vec<u8>,
    /// Whether it left by the interface; else it came in.
    pub outgoing: bool,
}

impl Frame {
    /// The headers, as far as they can be understood.
    pub fn headers(&self) -> Option<LaxPacketHeaders<'_>> {
        LaxPacketHeaders::from_ethernet(&self.bytes).ok()
    }

    /// Source and destination address. `None`: not IP.
    pub fn addresses(&self) -> Option<(IpAddr, IpAddr)> {
        match self.headers()?.net? {
            NetHeaders::Ipv4(ip, _) => Some((ip.source.into(), ip.destination.into())),
            NetHeaders::Ipv6(ip, _) => Some((ip.source.into(), ip.destination.into())),
            NetHeaders::Arp(_) => None,
        }
    }

    /// Source and destination address and port. `None`: neither TCP nor UDP, or a fragment.
    pub fn endpoints(&self) -> Option<(SocketAddr, SocketAddr)> {
        let (source, destination) = self.addresses()?;
        let (from, to) = match self.headers()?.transport? {
            TransportHeader::Tcp(tcp) => (tcp.source_port, tcp.destination_port),
            TransportHeader::Udp(udp) => (udp.source_port, udp.destination_port),
            _ => return None,
        };
        Some((SocketAddr::new(source, from), SocketAddr::new(destination, to)))
    }

    /// The TCP header, if there is one.
    pub fn tcp(&self) -> Option<etherparse::TcpHeader> {
        match self.headers()?.transport? {
            TransportHeader::Tcp(tcp) => Some(tcp),
            _ => None,
        }
    }
}

/// Sees every frame that comes in or goes out by an interface, from its start on.
#[derive(Debug)]
pub struct Capture {
    socket: Socket,
    /// Room for the longest frame, used again and again.
    buffer: Vec<u8>,
}

impl Capture {
    /// Starts to capture.
    pub fn start(netns: &Netns, interface: &str) -> io::Result<Self> {
        let socket = bound(netns, interface, libc::ETH_P_ALL)?;
        set(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, BUFFER)?;
        set(&socket, libc::SOL_PACKET, libc::PACKET_AUXDATA, 1)?;
        Ok(Self { socket, buffer: vec![0; LONGEST] })
    }

    /// From now on sees only the frames that a classic BPF program lets through: the kernel throws the others
    /// away before they take room.
    pub fn filter(&self, program: &[SockFilter]) -> io::Result<()> {
        self.socket.attach_filter(program)
    }

    /// The next frame; `None` if there is none within `deadline`.
    pub fn next(&mut self, deadline: Duration) -> io::Result<Option<Frame>> {
        // A timeout of zero would mean for ever.
        self.socket.set_read_timeout(Some(deadline.max(Duration::from_micros(1))))?;
        match receive(&self.socket, &mut self.buffer) {
            Ok(frame) => Ok(Some(frame)),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// The first frame that `wanted` is true of, passing over others; `None` if none comes within `deadline`.
    pub fn find(
        &mut self,
        deadline: Duration,
        mut wanted: impl FnMut(&Frame) -> bool,
    ) -> io::Result<Option<Frame>> {
        let end = Instant::now() + deadline;
        while let Some(frame) = self.next(end.saturating_duration_since(Instant::now()))? {
            if wanted(&frame) {
                return Ok(Some(frame));
            }
        }
        Ok(None)
    }

    /// Returns all frames up to and including the first for which `is_last` is true. To show that a packet did *not*
    /// arrive, send another after it that does, and check the frames before it.
    ///
    /// # Errors
    /// No such frame within `deadline`, or frames were lost for want of room.
    pub fn until(
        &mut self,
        deadline: Duration,
        mut is_last: impl FnMut(&Frame) -> bool,
    ) -> io::Result<Vec<Frame>> {
        let mut frames = Vec::new();
        let last = self.find(deadline, |frame| {
            frames.push(frame.clone());
            is_last(frame)
        })?;
        if last.is_none() {
            let text = format!("{} frames, and not the last one, in {deadline:?}", frames.len());
            return Err(io::Error::new(io::ErrorKind::TimedOut, text));
        }
        match self.lost()? {
            0 => Ok(frames),
            lost => Err(io::Error::other(format!("{lost} frames were lost"))),
        }
    }

    /// Frames lost for want of room since the last call.
    pub fn lost(&self) -> io::Result<u32> {
        let mut statistics = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
        let mut length = length_of::<libc::tpacket_stats>();
        // SAFETY: the kernel writes at most `length` octets to a struct of that size, valid for any content.
        let result = unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut statistics).cast(),
                &raw mut length,
            )
        };
        if result == 0 { Ok(statistics.tp_drops) } else { Err(io::Error::last_os_error()) }
    }
}

/// Sends frames as they are.
#[derive(Debug)]
pub struct Injector {
    socket: Socket,
}

impl Injector {
    /// Sends out of `interface`: a frame injected into `eth0` of a LAN host arrives on `eth0` of the node.
    pub fn new(netns: &Netns, interface: &str) -> io::Result<Self> {
        // Protocol 0: it receives nothing.
        Ok(Self { socket: bound(netns, interface, 0)? })
    }

    /// Sends one frame, from the destination MAC address on.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        match self.socket.send(frame)? {
            sent if sent == frame.len() => Ok(()),
            sent => Err(io::Error::other(format!("sent {sent} of {} octets", frame.len()))),
        }
    }
}

fn bound(netns: &Netns, interface: &str, protocol: libc::c_int) -> io::Result<Socket> {
    netns.run(|| open(interface, protocol))
}

/// A packet socket on one interface of the namespace that the thread is in. It is made deaf, then bound: it never
/// hears another interface.
pub(crate) fn open(interface: &str, protocol: libc::c_int) -> io::Result<Socket> {
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(0)))?;
    let index = rustix::net::netdevice::name_to_index(&socket, interface)?;
    let protocol = u16::try_from(protocol).map_err(io::Error::other)?;
    socket.bind(&link_address(protocol, index.cast_signed()))?;
    Ok(socket)
}

fn link_address(protocol: u16, index: i32) -> SockAddr {
    let mut storage = SockAddrStorage::zeroed();
    // SAFETY: sockaddr_ll is one of the types that a sockaddr_storage is there to hold.
    let address = unsafe { storage.view_as::<libc::sockaddr_ll>() };
    address.sll_family = u16::try_from(libc::AF_PACKET).unwrap_or_default();
    address.sll_protocol = protocol.to_be();
    address.sll_ifindex = index;
    // SAFETY: the storage holds a sockaddr_ll of this length, just written.
    unsafe { SockAddr::new(storage, length_of::<libc::sockaddr_ll>()) }
}

fn length_of<T>() -> libc::socklen_t {
    libc::socklen_t::try_from(size_of::<T>()).unwrap_or_default()
}

/// An option of a socket that is a number.
pub(crate) fn set(
    socket: &Socket,
    level: libc::c_int,
    option: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    // SAFETY: the kernel reads as many octets from `value` as its size says.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            length_of::<libc::c_int>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Receives one frame and puts back the VLAN tag that the kernel has taken out of it.
fn receive(socket: &Socket, buffer: &mut [u8]) -> io::Result<Frame> {
    /// Aligned as cmsg(3) demands, with room for the one message that is asked for.
    #[repr(align(8))]
    struct Control([u8; 64]);

    let mut control = Control([0; 64]);
    let mut vector = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: plain data, for which all zeroes is a value.
    let mut from: libc::sockaddr_ll = unsafe { zeroed() };
    // SAFETY: as above.
    let mut message: libc::msghdr = unsafe { zeroed() };
    message.msg_name = (&raw mut from).cast();
    message.msg_namelen = length_of::<libc::sockaddr_ll>();
    message.msg_iov = &raw mut vector;
    message.msg_iovlen = 1;
    message.msg_control = control.0.as_mut_ptr().cast();
    message.msg_controllen = control.0.len();
    // SAFETY: every pointer in `message` is to a live buffer of the length beside it.
    let length = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, 0) };
    let Ok(length) = usize::try_from(length) else { return Err(io::Error::last_os_error()) };
    let mut bytes = buffer[..length].to_vec();
    if let Some(tag) = vlan_tag(&message) {
        let at = 2 * size_of::<[u8; 6]>();
        if bytes.len() >= at {
            bytes.splice(at..at, tag);
        }
    }
    Ok(Frame { bytes, outgoing: from.sll_pkttype == libc::PACKET_OUTGOING })
}

/// The tag beside a received frame, as it would stand in it (IEEE 802.1Q).
fn vlan_tag(message: &libc::msghdr) -> Option<[u8; VLAN_TAG]> {
    // SAFETY: recvmsg has filled in the control buffer and its length.
    let first = unsafe { libc::CMSG_FIRSTHDR(message) };
    // SAFETY: null, or a header inside the control buffer, which is aligned for it.
    let header = unsafe { first.as_ref() }?;
    if (header.cmsg_level, header.cmsg_type) != (libc::SOL_PACKET, libc::PACKET_AUXDATA) {
        return None;
    }
    // SAFETY: the data of a PACKET_AUXDATA message is a tpacket_auxdata; read as if it had no alignment.
    let auxiliary = unsafe { libc::CMSG_DATA(header).cast::<libc::tpacket_auxdata>().read_unaligned() };
    if auxiliary.tp_status & libc::TP_STATUS_VLAN_VALID == 0 {
        return None;
    }
    let [a, b] = auxiliary.tp_vlan_tpid.to_be_bytes();
    let [c, d] = auxiliary.tp_vlan_tci.to_be_bytes();
    Some([a, b, c, d])
}
