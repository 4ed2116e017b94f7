//! Helpers of the tests of the port pool: a pool in a lab, programs in its control group, and a capture on the wire.

mod programs;

use std::{
    collections::{BTreeMap, HashMap},
    fs, io,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use bridge_agent::{
    model::PortRange,
    pool::{KernelPool, Layout, Settings, attach, layout::Occupied},
};
use bridge_common::pool::counter;
use serde::{Deserialize, Serialize};
use socket2::SockFilter;

use crate::{
    lab::{Lab, Netns},
    wait::eventually,
    wire::Capture,
};

pub use self::programs::{end, finish, hold, in_cgroup, line, output, ports, python, serve};

/// The eBPF object of the pool.
pub fn object() -> Result<Vec<u8>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bpf/pool");
    fs::read(&path).with_context(|| format!("{}: build it with `cargo xtask build`", path.display()))
}

/// A pool in the kernel, with a control group of its own; its traces go with the lab.
#[derive(Debug)]
pub struct Stand {
    /// The pool.
    pub pool: KernelPool,
    /// Where its pins are.
    pub base: PathBuf,
    /// The hooked control group.
    pub cgroup: PathBuf,
}

impl Stand {
    /// Loads a pool into the lab and hooks a control group.
    pub fn new(lab: &Lab, settings: &Settings) -> Result<Self> {
        let base = lab.pin_directory()?;
        let cgroup = lab.cgroup("pool")?;
        let layout = Layout::plan(settings, &Occupied::default())?;
        let mut pool = KernelPool::load(&object()?, &base, layout)?;
        pool.set_networks(&settings.destinations)?;
        let mount = attach::mount_point()?;
        pool.attach(&mount, cgroup.strip_prefix(&mount)?)?;
        Ok(Self { pool, base, cgroup })
    }

    /// Puts a command into the hooked control group.
    pub fn hooked(&self, command: Command) -> Command {
        in_cgroup(&self.cgroup, command)
    }

    /// One of the counters of [`counter`].
    pub fn counter(&self, index: u32) -> Result<u64> {
        Ok(self.pool.counters()?[index as usize])
    }

    /// Waits until every port that was claimed is given back; answers how many there were.
    pub fn settled(&self, deadline: Duration) -> Result<u64> {
        let counters =
            || self.pool.counters().map(|c| (c[counter::CLAIMS as usize], c[counter::RELEASES as usize]));
        let settled =
            eventually(deadline, || counters().ok().filter(|(claims, releases)| claims == releases));
        match settled {
            Some((claims, _)) => Ok(claims),
            None => {
                let (claims, releases) = counters()?;
                anyhow::bail!("{claims} claims, {releases} releases: {:?}", self.pool.walk()?)
            }
        }
    }
}

/// Task of `pool_traffic churn`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Churn {
    /// Connections to try.
    pub count: u64,
    /// For the random numbers.
    pub seed: u64,
    /// Most connections kept open at once.
    pub hold: usize,
    /// A `pool_traffic serve`.
    pub server: SocketAddrV4,
    /// Address without a listener.
    pub refused: SocketAddrV4,
    /// Where no route leads.
    pub unreachable: SocketAddrV4,
    /// Address that never answers.
    pub silent: SocketAddrV4,
    /// Lowest port of the pool.
    pub first: u16,
    /// Highest port of the pool.
    pub last: u16,
}

/// Result of a [`Churn`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Churned {
    /// Sockets.
    pub attempts: u64,
    /// Connections.
    pub connected: u64,
    /// ECONNREFUSED.
    pub refused: u64,
    /// ENETUNREACH or EHOSTUNREACH.
    pub unreachable: u64,
    /// Given up without an answer.
    pub silent: u64,
    /// EADDRNOTAVAIL.
    pub exhausted: u64,
    /// Sockets that were connected a second time, after ECONNREFUSED.
    pub again: u64,
    /// Connections that ended before they should.
    pub broken: u64,
    /// Sockets whose own port was outside the pool.
    pub outside: u64,
    /// Everything else, by errno.
    pub other: BTreeMap<i32, u64>,
}

/// Connections that a `pool_traffic serve` has seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Served {
    /// Connections.
    pub accepted: u64,
    /// Of them, those that came from another port than the client had bound.
    pub translated: u64,
}

/// Packets on the wire.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Watched {
    /// Connection requests, repeated ones included.
    pub syns: u64,
    /// Of them, those from a port outside the pool.
    pub outside: Vec<(SocketAddr, SocketAddr)>,
    /// New connections on a 4-tuple whose client had not ended the previous one.
    pub duplicates: Vec<(SocketAddr, SocketAddr)>,
    /// New connections on a 4-tuple whose client had sent a SYN and nothing else: a program that was killed before the
    /// answer came ends such a connection without a word.
    pub abandoned: u64,
    /// New connections on a 4-tuple whose server had not ended the previous one.
    pub early: u64,
    /// Frames the capture lost.
    pub lost: u32,
}

/// Watches connections begin and end on an interface.
#[derive(Debug)]
pub struct Watch {
    stop: Arc<AtomicBool>,
    thread: thread::JoinHandle<io::Result<Watched>>,
}

impl Watch {
    /// Begins to capture. `silent` is the port of the server that never answers: a client that gives up there sends no
    /// end.
    pub fn start(netns: &Netns, interface: &str, ports: PortRange, silent: u16) -> Result<Self> {
        let mut capture = Capture::start(netns, interface)?;
        capture.filter(&begins_and_ends(ports))?;
        let stop = Arc::new(AtomicBool::new(false));
        let thread = {
            let stop = Arc::clone(&stop);
            thread::spawn(move || {
                // Before the programs that it watches: packets beyond its speed are lost.
                rustix::process::setpriority_process(Some(rustix::thread::gettid()), -10)?;
                watch(&mut capture, &stop, ports, silent)
            })
        };
        Ok(Self { stop, thread })
    }

    /// Ends it, when nothing has come for a while.
    pub fn finish(self) -> Result<Watched> {
        self.stop.store(true, Ordering::SeqCst);
        Ok(self.thread.join().map_err(|_| anyhow::anyhow!("the watch panicked"))??)
    }
}

struct Tuple {
    sequence: u32,
    /// The client has sent data, so it has an established connection.
    established: bool,
    client_ended: bool,
    server_ended: bool,
}

fn watch(capture: &mut Capture, stop: &AtomicBool, ports: PortRange, silent: u16) -> io::Result<Watched> {
    let mut seen = Watched::default();
    // By the client's port, not its address: masquerade does not see to a packet that conntrack finds invalid, and an
    // RST may come from the pod's own address.
    let mut tuples: HashMap<(u16, SocketAddr), Tuple> = HashMap::new();
    loop {
        let Some(frame) = capture.next(Duration::from_millis(300))? else {
            if stop.load(Ordering::SeqCst) {
                seen.lost = capture.lost()?;
                return Ok(seen);
            }
            continue;
        };
        let Some(segment) = Segment::parse(&frame.bytes) else { continue };
        let (from, to) = (segment.from, segment.to);
        if segment.has(Segment::SYN) {
            seen.syns += 1;
            if !ports.contains(from.port()) {
                seen.outside.push((from, to));
            }
            let new = Tuple {
                sequence: segment.sequence,
                established: false,
                client_ended: false,
                server_ended: false,
            };
            if let Some(old) = tuples.insert((from.port(), to), new)
                && old.sequence != segment.sequence
                && to.port() != silent
            {
                match (old.client_ended, old.established) {
                    (false, true) => seen.duplicates.push((from, to)),
                    (false, false) => seen.abandoned += 1,
                    (true, _) => seen.early += u64::from(!old.server_ended),
                }
            }
            continue;
        }
        if let Some(tuple) = tuples.get_mut(&(from.port(), to)) {
            tuple.established |= segment.has(Segment::PSH);
            tuple.client_ended |= segment.has(Segment::FIN | Segment::RST);
            tuple.server_ended |= segment.has(Segment::RST);
        }
        if let Some(tuple) = tuples.get_mut(&(to.port(), from)) {
            tuple.server_ended |= segment.has(Segment::FIN | Segment::RST);
            tuple.client_ended |= segment.has(Segment::RST);
        }
    }
}

/// IPv4 TCP over Ethernet with SYN and no ACK, FIN, RST, or PSH from a client.
fn begins_and_ends(ports: PortRange) -> Vec<SockFilter> {
    // Headers are enough.
    const ACCEPT: u32 = 128;
    vec![
        SockFilter::new(0x28, 0, 0, 12),                     // ldh [12]
        SockFilter::new(0x15, 0, 11, 0x0800),                // jne IPv4, reject
        SockFilter::new(0x30, 0, 0, 23),                     // ldb [23]
        SockFilter::new(0x15, 0, 9, 6),                      // jne TCP, reject
        SockFilter::new(0xb1, 0, 0, 14),                     // ldx 4 * ([14] & 15)
        SockFilter::new(0x50, 0, 0, 14 + 13),                // ldb [x + 27]: flags
        SockFilter::new(0x45, 5, 0, 0x05),                   // jset FIN or RST, accept
        SockFilter::new(0x45, 2, 0, 0x08),                   // jset PSH, look at the port
        SockFilter::new(0x54, 0, 0, 0x12),                   // and SYN, ACK
        SockFilter::new(0x15, 2, 3, 0x02),                   // je SYN, accept; else reject
        SockFilter::new(0x48, 0, 0, 14 + 2),                 // ldh [x + 16]: destination port
        SockFilter::new(0x35, 1, 0, u32::from(ports.first)), // jge the pool, reject
        SockFilter::new(0x06, 0, 0, ACCEPT),
        SockFilter::new(0x06, 0, 0, 0),
    ]
}

/// The fields of a frame that the capture reads; etherparse would take too long.
struct Segment {
    from: SocketAddr,
    to: SocketAddr,
    sequence: u32,
    flags: u8,
}

impl Segment {
    const FIN: u8 = 1;
    const SYN: u8 = 2;
    const RST: u8 = 4;
    const PSH: u8 = 8;

    fn parse(frame: &[u8]) -> Option<Self> {
        let ip = frame.get(14..)?;
        let tcp = ip.get(usize::from(ip.first()? & 15) * 4..)?;
        let port = |at: usize| Some(u16::from_be_bytes(*tcp.get(at..)?.first_chunk()?));
        let address = |at: usize| Some(Ipv4Addr::from(*ip.get(at..)?.first_chunk::<4>()?));
        Some(Self {
            from: (address(12)?, port(0)?).into(),
            to: (address(16)?, port(2)?).into(),
            sequence: u32::from_be_bytes(*tcp.get(4..)?.first_chunk()?),
            flags: *tcp.get(13)?,
        })
    }

    fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}
