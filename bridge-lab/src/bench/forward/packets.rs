//! Packets in, packets out: the kernel makes them at the other end of a cable (`bridge-ebpf/src/generate`), and counts
//! those that come to where they are meant to go.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{Array, MapData, PerCpuArray};
use aya::programs::tc::{SchedClassifier, TcAttachType};
use aya::programs::{TestRun as _, Xdp, XdpMode};
use aya::{Ebpf, EbpfLoader, TestRunAttrs, TestRunOptions};
use etherparse::{Ethernet2Header, IpNumber};
use rustix::net::netdevice::name_to_index;
use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_setaffinity};
use socket2::{Domain, Socket, Type};

use self::plan::{FRAME, Plan, SINKS};
use crate::lab::Netns;
use crate::packet::{Packet, Tcp};

/// The layouts, from where the kernel side has them.
#[expect(unreachable_pub, reason = "it is a file of another crate")]
#[path = "../../../../bridge-ebpf/src/generate/plan.rs"]
mod plan;

static OBJECT: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/bpf/generate"));

// SAFETY: `repr(C)`, integers only, no holes (their sizes are asserted beside them): every bit pattern is a value.
unsafe impl aya::Pod for Plan {}

/// Frames that the kernel makes before it hands them over; more than it takes off a cable at once, it would lose.
const BATCH: u32 = 64;
/// Frames of one system call, made or not: each call waits for RCU at its end, tens of milliseconds on a busy machine.
const CALL: u32 = 1 << 18;
/// While one waits, another makes frames. A CPU runs one call's batch at a time.
const THREADS: usize = 3;
/// How many frames a cable surely holds (`VETH_RING_SIZE` is 256).
const HELD: u64 = 128;
/// How long a frame may take to arrive.
const DEADLINE: Duration = Duration::from_secs(20);

/// The CPU that makes packets, and the one that forwards them.
pub(super) const GENERATING: usize = 1;
pub(super) const FORWARDING: usize = 0;

/// SCHED_RR priorities of the threads that send and receive, that forward, and that watch both.
pub(super) const SENDING: libc::c_int = 1;
pub(super) const PASSING: libc::c_int = 2;
pub(super) const WATCHING: libc::c_int = 3;

/// Data in a frame, in bytes.
pub(super) const DATA: usize = FRAME - Ethernet2Header::LEN - 40;

/// From where packets start.
#[derive(Clone, Debug)]
pub(super) struct Cable {
    pub(super) netns: Netns,
    /// The far end: frames sent from it arrive at the near end.
    pub(super) interface: String,
    /// Of the far and of the near end.
    pub(super) macs: ([u8; 6], [u8; 6]),
}

/// Packets that differ in one end: the LAN hosts, of which there may be many.
#[derive(Clone, Debug)]
pub(super) struct Stream {
    /// Whether they come from there, or go there.
    pub(super) from_lan: bool,
    /// The first address on the LAN.
    pub(super) lan: Ipv4Addr,
    /// The first port there.
    pub(super) lan_port: u16,
    /// Ports of each address.
    pub(super) ports: u16,
    pub(super) pod: Ipv4Addr,
    pub(super) pod_port: u16,
    /// Flows to go round in.
    pub(super) flows: u32,
    pub(super) load: Load,
}

/// The part of a packet behind its IP header.
#[derive(Clone, Debug)]
pub(super) enum Load {
    /// Flags, sequence numbers and data.
    Tcp(Tcp),
    /// A datagram without a checksum.
    Udp,
    /// A later fragment of a datagram whose first one never comes.
    Fragment,
}

impl Stream {
    /// Returns the frame with its varying fields zeroed, and the plan that fills them.
    fn plan(&self, from: &Cable) -> Result<Plan> {
        let interface = from.netns.run(|| index(&from.interface))?;
        self.plan_by(interface, from.macs)
    }

    fn plan_by(&self, interface: u32, macs: ([u8; 6], [u8; 6])) -> Result<Plan> {
        let zero = Ipv4Addr::UNSPECIFIED;
        let (source, destination) = if self.from_lan { (zero, self.pod) } else { (self.pod, zero) };
        let ports = if self.from_lan { (0, self.pod_port) } else { (self.pod_port, 0) };
        let packet = Packet::new(source, destination).macs(macs.0, macs.1);
        let packet = match &self.load {
            Load::Tcp(tcp) => {
                let mut tcp = tcp.clone();
                (tcp.header.source_port, tcp.header.destination_port) = ports;
                packet.tcp(tcp)
            }
            // No checksum (RFC 768). The source writes that of TCP into the data.
            Load::Udp => {
                const LENGTH: usize = FRAME - Ethernet2Header::LEN - 20;
                let mut datagram = [0; LENGTH];
                datagram[2..4].copy_from_slice(&ports.1.to_be_bytes());
                datagram[4..6].copy_from_slice(&u16::try_from(LENGTH)?.to_be_bytes());
                packet.raw(IpNumber::UDP, &datagram)
            }
            Load::Fragment => {
                packet.raw(IpNumber::UDP, &[0; FRAME - Ethernet2Header::LEN - 20]).fragment(100, true, 1)
            }
        };
        let mut frame = packet.frame();
        let length = frame.len();
        ensure!(length <= FRAME, "a frame of {length} bytes");
        // Shorter ones are padded, as on a wire; the IP header has the length that counts.
        frame.resize(FRAME, 0);
        let (ip, segment) = frame[Ethernet2Header::LEN..].split_at_mut(20);
        ip[10..12].fill(0);
        if let Load::Tcp(_) = self.load {
            segment[16..18].fill(0);
        }
        // RFC 9293, 3.1: the pseudo header has the addresses, the protocol and the length.
        let tcp_length = u32::try_from(length - Ethernet2Header::LEN - 20)?;
        let pseudo = sum(&ip[12..20]) + libc::IPPROTO_TCP.unsigned_abs() + tcp_length;
        let (ip_sum, tcp_sum) = (sum(ip), sum(segment) + pseudo);
        let mut words = [0; FRAME / 8];
        for (word, bytes) in words.iter_mut().zip(frame.as_chunks::<8>().0) {
            *word = u64::from_ne_bytes(*bytes);
        }
        Ok(Plan {
            frame: words,
            interface,
            flows: self.flows,
            first_address: self.lan.to_bits(),
            ip_sum,
            tcp_sum,
            first_port: self.lan_port,
            ports: self.ports,
            destination: (!self.from_lan).into(),
            sink: 0,
            cpus: [u32::try_from(FORWARDING)?, u32::try_from(GENERATING)?],
            end: u64::MAX,
            window: 0,
            arrived: 0,
        })
    }
}

/// The sum of 16-bit words (RFC 1071), not folded.
fn sum(bytes: &[u8]) -> u32 {
    bytes.as_chunks::<2>().0.iter().map(|pair| u32::from(u16::from_be_bytes(*pair))).sum()
}

/// Where [`Packets::drop_at`] drops.
#[derive(Clone, Copy, Debug)]
pub(super) enum DropAt {
    Tc,
    Xdp,
}

/// The programs, loaded once for each lab.
pub(super) struct Packets {
    ebpf: Ebpf,
    /// Attached while it lives.
    drop: Option<Ebpf>,
    plan: Array<MapData, Plan>,
    counts: Counts,
}

/// Packets sent, and those of them that arrived.
pub(super) struct Counts {
    serial: Array<MapData, u64>,
    arrived: PerCpuArray<MapData, u64>,
    sinks: Vec<Ipv4Addr>,
}

impl Counts {
    fn sink(&self, at: Ipv4Addr) -> Result<u32> {
        Ok(u32::try_from(self.sinks.iter().position(|sink| *sink == at).context("no such sink")?)?)
    }

    /// Packets that have come to a sink so far.
    pub(super) fn arrived(&self, at: Ipv4Addr) -> Result<u64> {
        Ok(self.arrived.get(&self.sink(at)?, 0)?.iter().sum())
    }

    /// Number of the next packet.
    pub(super) fn made(&self) -> Result<u64> {
        Ok(self.serial.get(&0, 0)?)
    }
}

impl Packets {
    /// Packets to `sinks` end, and are counted, where they come in by these interfaces.
    pub(super) fn new(sinks: &[(Ipv4Addr, &Netns, &str)]) -> Result<Self> {
        ensure!(sinks.len() <= SINKS, "{} sinks", sinks.len());
        let mut ebpf = Ebpf::load(OBJECT).context("load the packet source")?;
        let mut map = |name| ebpf.take_map(name).with_context(|| format!("no map {name}"));
        let (plan, serial) = (Array::try_from(map("plan")?)?, Array::try_from(map("serial")?)?);
        let arrived = PerCpuArray::try_from(map("arrived")?)?;
        let mut addresses: Array<_, [u8; 4]> = Array::try_from(map("sinks")?)?;
        for (index, (address, ..)) in (0..).zip(sinks) {
            addresses.set(index, address.octets(), 0)?;
        }
        let generate: &mut Xdp = ebpf.program_mut("generate").context("the source")?.try_into()?;
        generate.load().context("load the packet source")?;
        let sink: &mut SchedClassifier = ebpf.program_mut("sink").context("the sink")?.try_into()?;
        sink.load().context("load the sink")?;
        for (_, netns, interface) in sinks {
            netns
                .run(|| sink.attach(interface, TcAttachType::Ingress).map(drop))
                .with_context(|| format!("attach the sink to {interface} in {}", netns.name()))?;
        }
        let sinks = sinks.iter().map(|(address, ..)| *address).collect();
        Ok(Self { ebpf, drop: None, plan, counts: Counts { serial, arrived, sinks } })
    }

    /// Drops the packets to an address that come in by an interface.
    pub(super) fn drop_at(
        &mut self,
        at: DropAt,
        address: Ipv4Addr,
        netns: &Netns,
        interface: &str,
    ) -> Result<()> {
        let mut loader = EbpfLoader::new();
        let address = u32::from_ne_bytes(address.octets());
        let mut ebpf =
            loader.override_global("DROPPED", &address, true).load(OBJECT).context("load a drop")?;
        match at {
            DropAt::Tc => {
                let program: &mut SchedClassifier =
                    ebpf.program_mut("drop_tc").context("a drop")?.try_into()?;
                program.load()?;
                netns.run(|| program.attach(interface, TcAttachType::Ingress).map(drop))?;
            }
            DropAt::Xdp => {
                let program: &mut Xdp = ebpf.program_mut("drop_xdp").context("a drop")?.try_into()?;
                program.load()?;
                netns.run(|| program.attach(interface, XdpMode::Driver).map(drop))?;
            }
        }
        self.drop = Some(ebpf);
        Ok(())
    }

    /// See [`Counts::arrived`].
    #[cfg(test)]
    pub(super) fn arrived(&self, at: Ipv4Addr) -> Result<u64> {
        self.counts.arrived(at)
    }

    /// Sends the first `count` packets of a stream so slowly that none is lost.
    ///
    /// # Errors
    /// One is.
    pub(super) fn deliver(&mut self, stream: &Stream, from: &Cable, to: Ipv4Addr, count: u32) -> Result<()> {
        let (end, before) = (u64::from(count), self.counts.arrived(to)?);
        let plan = stream.plan(from)?;
        let sink = self.counts.sink(to)?;
        self.plan.set(0, Plan { sink, end, window: HELD, arrived: before, ..plan }, 0)?;
        self.counts.serial.set(0, 0, 0)?;
        let (ebpf, counts) = (&self.ebpf, &self.counts);
        from.netns.run(|| {
            claim(0, GENERATING, SENDING)?;
            let start = Instant::now();
            loop {
                make(ebpf)?;
                let arrived = counts.arrived(to)? - before;
                if arrived >= end {
                    return Ok(());
                }
                ensure!(start.elapsed() < DEADLINE, "{arrived} of {end} packets to {to} in {DEADLINE:?}");
            }
        })
    }

    /// Sends a stream, from its packet number `first` on, as fast as one CPU can, for as long as `observe` takes.
    pub(super) fn flood<T: Send>(
        &mut self,
        stream: &Stream,
        from: &Cable,
        first: u64,
        observe: impl FnOnce(&Counts) -> Result<T> + Send,
    ) -> Result<T> {
        let plan = stream.plan(from)?;
        self.plan.set(0, plan, 0)?;
        self.counts.serial.set(0, first, 0)?;
        let nothing = Plan { end: 0, ..plan };
        let (ebpf, over) = (&self.ebpf, AtomicBool::new(false));
        let (plans, counts) = (&mut self.plan, &self.counts);
        std::thread::scope(|scope| {
            let source = || -> Result<()> {
                from.netns.run(|| {
                    claim(0, GENERATING, SENDING)?;
                    while !over.load(Ordering::Relaxed) {
                        make(ebpf)?;
                    }
                    Ok(())
                })
            };
            let sources = [(); THREADS].map(|()| scope.spawn(source));
            let observer = scope.spawn(|| -> Result<T> {
                // Or it would wait for those that it is to watch.
                real_time(0, WATCHING)?;
                let seen = observe(counts);
                over.store(true, Ordering::Relaxed);
                // Of the calls that are under way, no frame is made any more.
                plans.set(0, nothing, 0)?;
                seen
            });
            let seen = observer.join().expect("no panic while packets are counted");
            for source in sources {
                source.join().expect("no panic while packets are made")?;
            }
            seen
        })
    }
}

/// Runs the source, on the calling thread: in its namespace, on its CPU.
fn make(ebpf: &Ebpf) -> Result<()> {
    let generate: &Xdp = ebpf.program("generate").context("the source")?.try_into()?;
    generate.test_run(TestRunOptions {
        data_in: Some(&[0; FRAME]),
        repeat: CALL,
        attrs: TestRunAttrs::new().xdp_live_frames(BATCH),
        ..TestRunOptions::new()
    })?;
    Ok(())
}

/// Binds a thread to a CPU, before whatever else the machine does there: nice values would not do, they weigh only
/// within a session. 0 is the calling thread.
pub(super) fn claim(thread: u32, cpu: usize, priority: libc::c_int) -> Result<()> {
    let mut cpus = CpuSet::new();
    cpus.set(cpu);
    sched_setaffinity(Pid::from_raw(thread.cast_signed()), &cpus)
        .with_context(|| format!("bind thread {thread} to CPU {cpu}"))?;
    real_time(thread, priority)
}

/// Gives a thread a priority of SCHED_RR. 0 is the calling thread.
fn real_time(thread: u32, priority: libc::c_int) -> Result<()> {
    let parameter = libc::sched_param { sched_priority: priority };
    // SAFETY: a pointer to a parameter that lives through the call.
    let result =
        unsafe { libc::sched_setscheduler(thread.cast_signed(), libc::SCHED_RR, &raw const parameter) };
    ensure!(result == 0, "priority of thread {thread}: {}", std::io::Error::last_os_error());
    Ok(())
}

/// Index of an interface in the namespace of the calling thread.
fn index(interface: &str) -> Result<u32> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
    name_to_index(socket, interface).with_context(|| format!("interface {interface}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A frame that the kernel side writes by the plan equals the frame built by hand.
    #[test]
    fn the_checksums_of_a_plan_are_those_of_the_packet() -> Result<()> {
        let (lan, pod) = (Ipv4Addr::new(192, 168, 31, 66), Ipv4Addr::new(10, 200, 1, 92));
        for from_lan in [true, false] {
            for data in [0, 3, DATA] {
                let tcp = Tcp::ack(0, 0, 1001, 5001).payload(&vec![7; data]);
                let stream = Stream {
                    from_lan,
                    lan,
                    lan_port: 10_000,
                    ports: 1,
                    pod,
                    pod_port: 40_000,
                    flows: 1,
                    load: Load::Tcp(tcp.clone()),
                };
                let plan = stream.plan_by(1, ([2; 6], [4; 6]))?;
                let varied = (plan.first_address >> 16) + (plan.first_address & 0xffff);
                let fold = |sum: u32| {
                    let sum = (sum >> 16) + (sum & 0xffff);
                    !u16::try_from((sum >> 16) + (sum & 0xffff)).expect("folded")
                };
                let (source, destination, ports) =
                    if from_lan { (lan, pod, (10_000, 40_000)) } else { (pod, lan, (40_000, 10_000)) };
                let mut tcp = tcp;
                (tcp.header.source_port, tcp.header.destination_port) = ports;
                let wanted = Packet::new(source, destination).tcp(tcp).ip();
                assert_eq!(fold(plan.ip_sum + varied).to_be_bytes(), wanted[10..12]);
                assert_eq!(fold(plan.tcp_sum + varied + 10_000).to_be_bytes(), wanted[36..38]);
            }
        }
        Ok(())
    }
}
