//! A LAN host, a node, a pod, each in a network namespace, joined by veth.

use std::fs::File;
use std::io::{ErrorKind, Read as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd as _;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use bridge_agent::firewall::Firewall as _;
use bridge_agent::iptables::Iptables;
use bridge_agent::model::Policy;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use socket2::{Domain, Socket, Type};

use crate::support::{Host, eventually};

/// Allowed packets arrive at once; dropped ones are not waited for longer than this.
pub(crate) const PATIENCE: Duration = Duration::from_millis(600);
pub(crate) const V4: (&str, &str, &str) = ("192.168.31.67", "192.168.31.17", "10.200.1.91");
pub(crate) const V6: (&str, &str, &str) = ("fd00:31::67", "fd00:31::17", "fd00:200:1::91");

/// Named namespaces that go when this does.
pub(crate) struct Lab {
    names: [String; 3],
}

impl Lab {
    pub(crate) fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let tag = format!("ipt-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let lab = Self { names: ["lan", "node", "pod"].map(|role| format!("{tag}-{role}")) };
        let [lan, node, pod] = &lab.names;
        for name in &lab.names {
            ip(&format!("netns add {name}"));
            ip(&format!("-n {name} link set lo up"));
        }
        for (name, own, other, addresses, far) in [
            (
                lan,
                "to-node",
                "lan0",
                ["192.168.31.67/24", "fd00:31::67/64"],
                ["192.168.31.17/24", "fd00:31::17/64"],
            ),
            (
                pod,
                "eth0",
                "cali0",
                ["10.200.1.91/24", "fd00:200:1::91/64"],
                ["10.200.1.1/24", "fd00:200:1::1/64"],
            ),
        ] {
            ip(&format!("link add {own} netns {name} type veth peer name {other} netns {node}"));
            for (netns, device, addresses) in [(name, own, addresses), (node, other, far)] {
                for address in addresses {
                    ip(&format!("-n {netns} address add {address} dev {device} {}", nodad(address)));
                }
                ip(&format!("-n {netns} link set {device} up"));
            }
            for gateway in far {
                let gateway = gateway.split('/').next().expect("an address");
                ip(&format!("-n {name} route add default via {gateway}"));
            }
        }
        for who in [0, 2] {
            lab.within(who, || {
                std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 0").expect("let root ping");
            });
        }
        lab.within(1, || {
            for path in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
                std::fs::write(format!("/proc/sys/net/{path}"), "1").expect("forward");
            }
        });
        // IPv6 takes a moment until its neighbours answer.
        for to in [V4.2, V6.2] {
            eventually("the pod answers", Duration::from_secs(10), || lab.ping(0, to) == Seen::Answer);
        }
        lab
    }

    /// Runs `work` on a thread inside: 0 LAN host, 1 node, 2 pod.
    pub(crate) fn within<T: Send>(&self, who: usize, work: impl FnOnce() -> T + Send) -> T {
        let inside = || {
            let netns = File::open(format!("/run/netns/{}", self.names[who])).expect("open the namespace");
            move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network)).expect("enter it");
            work()
        };
        thread::scope(|scope| scope.spawn(inside).join())
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    pub(crate) fn firewall(&self, host: &Host, policy: &Policy) -> Iptables {
        self.within(1, || {
            let mut firewall = host.firewall();
            firewall.converge(policy).expect("converge");
            firewall
        })
    }

    /// Returns the result of a connection from one to another.
    pub(crate) fn tcp(&self, from: usize, to: SocketAddr, serving: usize) -> Seen {
        let listener = self.within(serving, || listen(SocketAddr::new(unspecified(to), serving_port(to))));
        let seen = self.within(from, || match TcpStream::connect_timeout(&to, PATIENCE) {
            Ok(_) => Seen::Answer,
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => Seen::Refusal,
            Err(error) if error.kind() == ErrorKind::TimedOut => Seen::Nothing,
            Err(error) => panic!("{error}"),
        });
        drop(listener);
        seen
    }

    pub(crate) fn udp(&self, from: usize, to: SocketAddr, serving: usize) -> Seen {
        let server =
            self.within(serving, || UdpSocket::bind((unspecified(to), serving_port(to))).expect("bind"));
        let seen = self.within(from, || {
            let client = UdpSocket::bind((unspecified(to), 0)).expect("bind");
            client.connect(to).expect("connect");
            client.set_read_timeout(Some(PATIENCE)).expect("a timeout");
            server.set_read_timeout(Some(PATIENCE)).expect("a timeout");
            client.send(b"?").expect("send");
            let mut buffer = [0; 1];
            if let Ok((_, peer)) = server.recv_from(&mut buffer) {
                server.send_to(b"!", peer).expect("answer");
            }
            match client.recv(&mut buffer) {
                Ok(_) => Seen::Answer,
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => Seen::Refusal,
                Err(error) if error.kind() == ErrorKind::WouldBlock => Seen::Nothing,
                Err(error) => panic!("{error}"),
            }
        });
        drop(server);
        seen
    }

    /// An echo request, from a socket of the kernel's own ping protocol.
    pub(crate) fn ping(&self, from: usize, to: &str) -> Seen {
        let to = at(to, 0);
        let (domain, protocol, request) = match to {
            SocketAddr::V4(_) => (Domain::IPV4, socket2::Protocol::ICMPV4, 8),
            SocketAddr::V6(_) => (Domain::IPV6, socket2::Protocol::ICMPV6, 128),
        };
        self.within(from, || {
            let socket = Socket::new(domain, Type::DGRAM, Some(protocol)).expect("a ping socket");
            socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
            socket.connect(&to.into()).expect("connect");
            socket.send(&[request, 0, 0, 0, 0, 0, 0, 1]).expect("send");
            match (&socket).read(&mut [0; 64]) {
                Ok(_) => Seen::Answer,
                Err(error) if error.kind() == ErrorKind::WouldBlock => Seen::Nothing,
                Err(error) => panic!("{error}"),
            }
        })
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for name in &self.names {
            let deleted = Command::new("ip").args(["netns", "delete", name]).status();
            if !deleted.is_ok_and(|status| status.success()) {
                eprintln!("network namespace {name} remains");
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    Answer,
    /// An RST, an ICMP error.
    Refusal,
    Nothing,
}

fn ip(line: &str) {
    let output = Command::new("ip").args(line.split_whitespace()).output().expect("start ip");
    assert!(output.status.success(), "ip {line}: {}", String::from_utf8_lossy(&output.stderr));
}

const fn nodad(address: &str) -> &'static str {
    // A colon means IPv6, which would wait for duplicate address detection.
    let mut bytes = address.as_bytes();
    while let [first, rest @ ..] = bytes {
        if *first == b':' {
            return "nodad";
        }
        bytes = rest;
    }
    ""
}

/// A socket of before may live for a moment more in a child of another test that has not yet come to its exec.
pub(crate) fn listen(at: SocketAddr) -> TcpListener {
    let mut listener = None;
    eventually("the port is free", Duration::from_secs(5), || {
        listener = TcpListener::bind(at).ok();
        listener.is_some()
    });
    listener.expect("a listener")
}

fn unspecified(like: SocketAddr) -> IpAddr {
    match like {
        SocketAddr::V4(_) => IpAddr::from([0, 0, 0, 0]),
        SocketAddr::V6(_) => IpAddr::from([0u8; 16]),
    }
}

/// NodePorts lead to port 8080.
const fn serving_port(to: SocketAddr) -> u16 {
    if to.port() >= 30000 && to.port() <= 32767 { 8080 } else { to.port() }
}

pub(crate) fn at(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(address.parse().expect("an address"), port)
}
