//! The traffic that is sent through the node, and how its rate is measured.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use socket2::SockRef;

use super::clock::cpu_time;
use super::contender::Contender;
use super::packets::{Counts, FORWARDING, GENERATING, SENDING, Stream, claim};
use super::place::{Denied, Place};
use super::ruleset::ALLOWED;
use crate::lab::Netns;

/// A kind of traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Traffic {
    Established,
    EstablishedMany,
    NewFlows,
    Bulk,
    RequestResponse,
    Connect,
    DeniedUdp,
    DeniedSyn,
    Spoofed,
    Fragments,
}

/// How long to look.
#[derive(Clone, Copy, Debug)]
pub(super) struct Effort {
    /// At packets.
    pub(super) packets: Duration,
    /// At sockets.
    pub(super) sockets: Duration,
    /// How many flows may be opened at most before they are forgotten again: connection tracking holds no more than
    /// `nf_conntrack_max`.
    pub(super) new_flows: u64,
}

/// Flows of [`Traffic::EstablishedMany`].
pub(super) const MANY: u32 = 10_000;
/// Part of the time that the node must be at it for a figure to be one; else packets wait more than they are forwarded.
const LEAST_SHARE: f64 = 0.2;
/// As much for packets that it denies.
const FEWEST: u64 = 1000;
/// How often to try for that.
const ATTEMPTS: usize = 4;
/// Until caches are warm, and queues full: of 10,000 flows, a few packets of each.
const WARM_UP: Duration = Duration::from_millis(50);
/// Between two looks at a count.
const GLANCE: Duration = Duration::from_micros(500);
/// A socket that waits so long waits for ever.
const STUCK: Duration = Duration::from_secs(10);
/// Length of a request and of a response.
const MESSAGE: usize = 64;
/// Bytes per write.
const CHUNK: usize = 128 << 10;

impl Traffic {
    pub(super) const ALL: [Self; 10] = [
        Self::Established,
        Self::EstablishedMany,
        Self::NewFlows,
        Self::Bulk,
        Self::RequestResponse,
        Self::Connect,
        Self::DeniedUdp,
        Self::DeniedSyn,
        Self::Spoofed,
        Self::Fragments,
    ];
    /// Traffic that rules allow.
    pub(super) const ALLOWED: [Self; 6] = [
        Self::Established,
        Self::EstablishedMany,
        Self::NewFlows,
        Self::Bulk,
        Self::RequestResponse,
        Self::Connect,
    ];
    /// Traffic that no rule allows.
    pub(super) const DENIED: [Self; 4] = [Self::DeniedUdp, Self::DeniedSyn, Self::Spoofed, Self::Fragments];

    /// As it is written in names of measurements.
    pub(super) fn key(self) -> &'static str {
        match self {
            Self::Established => "established",
            Self::EstablishedMany => "established-10k-flows",
            Self::NewFlows => "new-flows",
            Self::Bulk => "tcp-bulk",
            Self::RequestResponse => "tcp-request-response",
            Self::Connect => "tcp-connect",
            Self::DeniedUdp => "denied-udp",
            Self::DeniedSyn => "denied-syn",
            Self::Spoofed => "denied-spoofed",
            Self::Fragments => "denied-fragments",
        }
    }

    /// As it is called in tables.
    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Established => "established, 1 flow, 64-byte frames",
            Self::EstablishedMany => "established, 10,000 flows, 64-byte frames",
            Self::NewFlows => "new flows, each packet one",
            Self::Bulk => "TCP bulk, one connection",
            Self::RequestResponse => "TCP request and response, 64 bytes each",
            Self::Connect => "TCP connects, one after the other",
            Self::DeniedUdp => "denied: UDP flood, each packet of another port",
            Self::DeniedSyn => "denied: SYN flood, each packet of another port",
            Self::Spoofed => "denied: UDP flood in the name of pods",
            Self::Fragments => "denied: flood of later fragments",
        }
    }

    pub(super) fn unit(self) -> &'static str {
        match self {
            // CPU time of the forwarding CPU; time that other processes take is not counted.
            Self::Established | Self::EstablishedMany => "packets per CPU second",
            Self::DeniedUdp | Self::DeniedSyn | Self::Spoofed | Self::Fragments => "packets per CPU second",
            Self::NewFlows => "flows per CPU second",
            Self::Bulk => "Mbit/s",
            Self::RequestResponse => "transactions/s",
            Self::Connect => "connections/s",
        }
    }

    /// Whether the flows of its place must be established.
    pub(super) fn needs_flows(self) -> bool {
        matches!(self, Self::Established | Self::EstablishedMany)
    }

    /// A rate. The flows of `place` are established.
    ///
    /// # Errors
    /// Nothing came through.
    pub(super) fn sample(self, place: &mut Place, effort: &Effort) -> Result<f64> {
        let rate = match self {
            Self::Established => established(place, 1, effort.packets),
            Self::EstablishedMany => established(place, MANY, effort.packets),
            Self::NewFlows => packets(place, &place.new_flows(), effort.packets, effort.new_flows),
            Self::Bulk => over_tcp(place, effort.sockets, bulk),
            Self::RequestResponse => over_tcp(place, effort.sockets, request_response),
            Self::Connect => over_tcp(place, effort.sockets, connect),
            Self::DeniedUdp => denied(place, Denied::Udp, effort.packets),
            Self::DeniedSyn => denied(place, Denied::Syn, effort.packets),
            Self::Spoofed => denied(place, Denied::Spoofed, effort.packets),
            Self::Fragments => denied(place, Denied::Fragment, effort.packets),
        };
        rate.with_context(|| format!("{}: {}", place.contender.title(), self.title()))
    }
}

fn established(place: &mut Place, flows: u32, window: Duration) -> Result<f64> {
    place.speak(flows)?;
    packets(place, &place.established(flows), window, u64::MAX)
}

/// Packets of which none may arrive that the node takes off the cable in a second of the forwarding CPU.
fn denied(place: &mut Place, kind: Denied, window: Duration) -> Result<f64> {
    let stream = place.denied(kind);
    let (node, sink) = (place.lab.b().netns.clone(), place.sink());
    let firewall = place.contender != Contender::None;
    for _ in 0..ATTEMPTS {
        let (threads, first) = (place.forwarding.clone(), place.next_packet);
        let observe = |counts: &Counts| {
            let arrived = counts.arrived(sink)?;
            thread::sleep(WARM_UP);
            let (before, cpu_before) = (received(&node)?, cpu_time(&threads)?);
            thread::sleep(window);
            let (after, cpu) = (received(&node)?, cpu_time(&threads)? - cpu_before);
            Ok((after - before, cpu, counts.arrived(sink)? - arrived, counts.made()?))
        };
        let (taken, cpu, through, next) = place.packets.flood(&stream, &place.cable, first, observe)?;
        place.next_packet = next;
        ensure!(!firewall || through == 0, "{through} denied packets have arrived in the pod");
        // Few: the threads of the source still waited for RCU.
        if taken > FEWEST && !cpu.is_zero() {
            ensure!(firewall || through > 0, "without a firewall, nothing arrives that could be denied");
            return Ok(taken as f64 / cpu.as_secs_f64());
        }
    }
    bail!("the node takes no packet off the cable")
}

/// Packets that the node has taken off the cable of its LAN interface so far, those that XDP drops included.
pub(super) fn received(node: &Netns) -> Result<u64> {
    let table = node.run(|| fs::read_to_string("/proc/thread-self/net/dev"))?;
    let counts = table.lines().find_map(|line| line.trim().strip_prefix("eth0:"));
    let packets = counts.and_then(|counts| counts.split_ascii_whitespace().nth(1)?.parse().ok());
    packets.context("no count of packets received at eth0")
}

/// Packets that arrive in a second of the forwarding CPU.
fn packets(place: &mut Place, stream: &Stream, window: Duration, most: u64) -> Result<f64> {
    for _ in 0..ATTEMPTS {
        let (sink, threads, first) = (place.sink(), place.forwarding.clone(), place.next_packet);
        let observe = |counts: &Counts| {
            let start = counts.arrived(sink)?;
            thread::sleep(WARM_UP);
            let (before, cpu_before, clock) = (counts.arrived(sink)?, cpu_time(&threads)?, Instant::now());
            while clock.elapsed() < window && counts.arrived(sink)? - start < most {
                thread::sleep(GLANCE);
            }
            let (after, cpu) = (counts.arrived(sink)?, cpu_time(&threads)? - cpu_before);
            Ok((after - before, cpu, clock.elapsed(), counts.made()?))
        };
        let (arrived, cpu, took, next) = place.packets.flood(stream, &place.cable, first, observe)?;
        place.next_packet = next;
        if arrived > 0 && cpu.as_secs_f64() > LEAST_SHARE * took.as_secs_f64() {
            // Far below 2^53.
            return Ok(arrived as f64 / cpu.as_secs_f64());
        }
    }
    bail!(
        "the node did not come to forward: something of higher priority has its CPU, or lets no packet through"
    )
}

/// Between a server in the first pod, which `serve` makes, and a client on the LAN host.
fn over_tcp(place: &Place, window: Duration, talk: fn(&TcpListener, Client) -> Result<f64>) -> Result<f64> {
    let (host, pod) = (place.lab.a(), place.lab.c1());
    let address = SocketAddr::new(pod.v4.into(), ALLOWED.0 + 1);
    let listener = pod.netns.run(|| TcpListener::bind(address)).context("listen in the pod")?;
    // SO_RCVTIMEO limits accept(2), too (socket(7)).
    SockRef::from(&listener).set_read_timeout(Some(STUCK))?;
    host.netns.run(|| talk(&listener, Client { address, window }))
}

/// Runs on a thread in the namespace of the LAN host.
#[derive(Clone, Copy)]
struct Client {
    address: SocketAddr,
    window: Duration,
}

impl Client {
    fn connect(&self) -> Result<TcpStream> {
        let stream = TcpStream::connect_timeout(&self.address, STUCK).context("connect to the pod")?;
        prepare(&stream)?;
        Ok(stream)
    }

    /// Runs `client` on one CPU and `server` on the other, which forwards, too.
    fn with<T: Send>(
        &self,
        server: impl FnOnce() -> Result<T> + Send,
        client: impl FnOnce() -> Result<()>,
    ) -> Result<T> {
        thread::scope(|scope| {
            let server = scope.spawn(|| {
                claim(0, FORWARDING, SENDING)?;
                server()
            });
            claim(0, GENERATING, SENDING)?;
            let sent = client();
            let seen = server.join().expect("no panic in a server");
            sent.and(seen)
        })
    }
}

fn prepare(stream: &TcpStream) -> Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(STUCK))?;
    Ok(stream.set_write_timeout(Some(STUCK))?)
}

/// The next connection.
fn accept(listener: &TcpListener) -> Result<TcpStream> {
    let (stream, _) = listener.accept().context("no connection came")?;
    prepare(&stream)?;
    Ok(stream)
}

/// Returns the rate at which the server reads, in Mbit/s.
fn bulk(listener: &TcpListener, client: Client) -> Result<f64> {
    let server = || {
        let mut stream = accept(listener)?;
        let mut buffer = vec![0; CHUNK];
        let (mut bytes, start) = (0_u64, Instant::now());
        loop {
            match stream.read(&mut buffer)? {
                0 => return Ok(bytes as f64 * 8e-6 / start.elapsed().as_secs_f64()),
                read => bytes += u64::try_from(read)?,
            }
        }
    };
    client.with(server, || {
        let mut stream = client.connect()?;
        let (chunk, start) = (vec![0; CHUNK], Instant::now());
        while start.elapsed() < client.window {
            stream.write_all(&chunk)?;
        }
        Ok(())
    })
}

/// Answers in a second.
fn request_response(listener: &TcpListener, client: Client) -> Result<f64> {
    let mut rate = 0.0;
    let server = || {
        let mut stream = accept(listener)?;
        let mut message = [0; MESSAGE];
        while stream.read_exact(&mut message).is_ok() {
            stream.write_all(&message)?;
        }
        Ok(())
    };
    client.with(server, || {
        let mut stream = client.connect()?;
        let mut message = [0; MESSAGE];
        let (mut answers, start) = (0_u64, Instant::now());
        while start.elapsed() < client.window {
            stream.write_all(&message)?;
            stream.read_exact(&mut message)?;
            answers += 1;
        }
        rate = answers as f64 / start.elapsed().as_secs_f64();
        Ok(())
    })?;
    Ok(rate)
}

/// Connections in a second. Each is accepted and closed by the server, and then ended by a reset of the client, which
/// leaves nothing behind: one that does not wait for the server would soon find its queue full.
fn connect(listener: &TcpListener, client: Client) -> Result<f64> {
    let mut rate = 0.0;
    let over = AtomicBool::new(false);
    let server = || {
        loop {
            let (stream, _) = listener.accept().context("no connection came")?;
            let last = over.load(Ordering::Acquire);
            drop(stream);
            if last {
                return Ok(());
            }
        }
    };
    client.with(server, || {
        let (mut connections, start) = (0_u64, Instant::now());
        while !over.load(Ordering::Acquire) {
            // Before the last one, so that the server knows it by the time it comes.
            over.store(start.elapsed() >= client.window, Ordering::Release);
            let mut stream = client.connect()?;
            ensure!(stream.read(&mut [0])? == 0, "the server said something");
            SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
            connections += 1;
        }
        rate = connections as f64 / start.elapsed().as_secs_f64();
        Ok(())
    })?;
    Ok(rate)
}
