//! Real packets: a LAN host, a node, a pod, each in a network namespace, joined by veth.

use std::fs::File;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd as _;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use bridge_agent::firewall::Firewall;
use bridge_agent::firewall::iptables::Iptables;
use bridge_agent::model::{Action, Direction, Mode, OnDeny, Policy, Protocol, Rule};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use socket2::{Domain, Socket, Type};

use crate::support::{BACKENDS, Host, eventually, nets, policy, ranges, rule};

/// What is allowed comes at once; what is dropped is not waited for longer than this.
const PATIENCE: Duration = Duration::from_millis(600);
const V4: (&str, &str, &str) = ("192.168.31.67", "192.168.31.17", "10.200.1.91");
const V6: (&str, &str, &str) = ("fd00:31::67", "fd00:31::17", "fd00:200:1::91");

/// Named namespaces that go when this does.
struct Lab {
    names: [String; 3],
}

impl Lab {
    fn new() -> Self {
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
        lab
    }

    /// Runs `work` on a thread inside: 0 LAN host, 1 node, 2 pod.
    fn within<T: Send>(&self, who: usize, work: impl FnOnce() -> T + Send) -> T {
        let inside = || {
            let netns = File::open(format!("/run/netns/{}", self.names[who])).expect("open the namespace");
            move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network)).expect("enter it");
            work()
        };
        thread::scope(|scope| scope.spawn(inside).join())
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    fn firewall(&self, host: &Host, policy: &Policy) -> Iptables {
        self.within(1, || {
            let mut firewall = host.firewall();
            firewall.converge(policy).expect("converge");
            firewall
        })
    }

    /// What a connection from one to another sees.
    fn tcp(&self, from: usize, to: SocketAddr, serving: usize) -> Seen {
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

    fn udp(&self, from: usize, to: SocketAddr, serving: usize) -> Seen {
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
    fn ping(&self, from: usize, to: &str) -> Seen {
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
enum Seen {
    Answer,
    /// An RST, an ICMP error.
    Refusal,
    Nothing,
}

use Seen::{Answer, Nothing, Refusal};

fn ip(line: &str) {
    let output = Command::new("ip").args(line.split_whitespace()).output().expect("start ip");
    assert!(output.status.success(), "ip {line}: {}", String::from_utf8_lossy(&output.stderr));
}

const fn nodad(address: &str) -> &'static str {
    // A colon tells IPv6, which would wait for duplicate address detection.
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
fn listen(at: SocketAddr) -> TcpListener {
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

fn at(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(address.parse().expect("an address"), port)
}

fn on_both(work: impl Fn(&Host, &Lab)) {
    for backend in BACKENDS {
        eprintln!("back end: {}", backend.name());
        work(&Host::new(backend), &Lab::new());
    }
}

#[test]
fn allowed_passes_and_the_rest_is_refused_in_both_families() {
    on_both(|host, lab| {
        let mut policy = policy();
        policy.rules.push(Rule {
            external: Some(nets(&["192.168.31.67/32", "fd00:31::67/128"])),
            action: Action::Deny,
            ..rule("not-this-one", Direction::Inbound, Protocol::Tcp, &[(60050, 60050)])
        });
        let firewall = lab.firewall(host, &policy);
        for (lan, _, pod) in [V4, V6] {
            for (port, seen) in
                [(40001, Refusal), (40002, Answer), (40003, Refusal), (60000, Refusal), (60001, Answer)]
                    .into_iter()
                    .chain([(60050, Refusal), (60100, Answer), (60101, Refusal)])
            {
                assert_eq!(lab.tcp(0, at(pod, port), 2), seen, "{lan} to {pod}:{port}");
            }
            assert_eq!(lab.udp(0, at(pod, 40002), 2), Refusal, "no rule for UDP");
            assert_eq!(lab.ping(0, pod), Answer);
            assert_eq!(lab.tcp(2, at(lan, 53), 0), Answer);
            assert_eq!(lab.udp(2, at(lan, 53), 0), Answer);
            assert_eq!(lab.udp(2, at(lan, 54), 0), Refusal);
            assert_eq!(lab.tcp(2, at(lan, 54), 0), Refusal);
            assert_eq!(lab.ping(2, lan), Nothing, "pings are allowed inbound only");
        }
        let hits = lab.within(1, || firewall.hits()).expect("hits");
        assert_eq!(hits["not-this-one"].packets, 2);
        assert_eq!(hits["devices-to-api"].packets, 6, "one SYN for each connection, both families");
        assert!(hits["bridge:established"].packets > 0);
    });
}

#[test]
fn silence_and_audit() {
    on_both(|host, lab| {
        let (lan, _, pod) = V4;
        drop(lab.firewall(host, &Policy { on_deny: OnDeny::Drop, ..policy() }));
        assert_eq!(lab.tcp(0, at(pod, 40001), 2), Nothing);
        assert_eq!(lab.udp(2, at(lan, 54), 0), Nothing);
        let firewall = lab.firewall(host, &Policy { mode: Mode::Audit, ..policy() });
        assert_eq!(lab.tcp(0, at(pod, 40001), 2), Answer);
        assert_eq!(lab.udp(2, at(lan, 54), 0), Answer);
        assert_eq!(lab.ping(2, lan), Answer);
        let hits = lab.within(1, || firewall.hits()).expect("hits");
        assert_eq!(hits["bridge:audit"].packets, 3, "counted as they would be denied");
    });
}

#[test]
fn node_ports_are_judged_before_the_destination_is_rewritten() {
    on_both(|host, lab| {
        let (_, node, pod) = V4;
        lab.within(1, || {
            // As a kube-proxy does.
            let rules = "*nat\n-A PREROUTING -p tcp -m addrtype --dst-type LOCAL -m tcp --dport 30000:32767 -j DNAT \
                         --to-destination 10.200.1.91:8080\n-A PREROUTING -p udp -m addrtype --dst-type LOCAL -m udp \
                         --dport 30000:32767 -j DNAT --to-destination 10.200.1.91:8080\nCOMMIT\n";
            host.feed("iptables-restore --noflush", rules);
        });
        for (on_deny, denied) in [(OnDeny::Reject, Refusal), (OnDeny::Drop, Nothing)] {
            drop(lab.firewall(host, &Policy { on_deny, ..policy() }));
            for (port, seen) in
                [(30079, denied), (30080, Answer), (30081, denied), (31100, Answer), (31101, denied)]
            {
                assert_eq!(lab.tcp(0, at(node, port), 2), seen, "NodePort {port}, {on_deny:?}");
            }
            assert_eq!(lab.udp(0, at(node, 30080), 2), Answer);
            assert_eq!(lab.udp(0, at(node, 30081), 2), denied);
            assert_eq!(lab.tcp(0, at(pod, 8080), 2), denied, "the pod's own port is not open by that");
            assert_eq!(lab.tcp(0, at(node, 8081), 1), Answer, "a port of the node outside the range");
        }
        // Without a Service behind it, the node itself would answer.
        lab.within(1, || host.run("iptables -t nat -F"));
        drop(lab.firewall(host, &policy()));
        let listener = lab.within(1, || listen(at("0.0.0.0", 30081)));
        let refused = lab.within(0, || TcpStream::connect_timeout(&at(node, 30081), PATIENCE));
        assert_eq!(refused.map(drop).map_err(|e| e.kind()), Err(ErrorKind::ConnectionRefused));
        drop(lab.firewall(host, &Policy { node_ports: None, ..policy() }));
        lab.within(0, || TcpStream::connect_timeout(&at(node, 30081), PATIENCE)).expect("not judged");
        drop(listener);
    });
}

#[test]
fn an_established_connection_outlives_its_rule() {
    on_both(|host, lab| {
        drop(lab.firewall(host, &policy()));
        let to = at(V4.2, 40002);
        let listener = lab.within(2, || listen(to));
        let mut client = lab.within(0, || TcpStream::connect_timeout(&to, PATIENCE).expect("connect"));
        let (mut server, _) = listener.accept().expect("accept");
        drop(lab.firewall(host, &Policy { rules: Vec::new(), ..policy() }));
        for stream in [&client, &server] {
            stream.set_read_timeout(Some(Duration::from_secs(3))).expect("a timeout");
        }
        let mut buffer = [0; 4];
        client.write_all(b"ping").expect("send");
        server.read_exact(&mut buffer).expect("receive");
        server.write_all(b"pong").expect("send");
        client.read_exact(&mut buffer).expect("receive");
        let again = lab.within(0, || TcpStream::connect_timeout(&to, PATIENCE));
        assert_eq!(again.map(drop).map_err(|e| e.kind()), Err(ErrorKind::ConnectionRefused));
    });
}

#[test]
fn node_addresses_and_traffic_out_of_scope_are_let_be() {
    on_both(|host, lab| {
        let pods_node = "10.200.1.1";
        drop(lab.firewall(host, &Policy { rules: Vec::new(), node_ports: None, ..policy() }));
        assert_eq!(lab.tcp(0, at(V4.1, 22), 1), Answer);
        assert_eq!(lab.tcp(2, at(pods_node, 53), 1), Answer);
        assert_eq!(lab.tcp(2, at(V4.1, 53), 1), Answer);
        // The LAN host is a node now: neither LAN host nor pod.
        let nodes = [policy().nodes, nets(&["192.168.31.67/32"])].concat();
        drop(lab.firewall(host, &Policy { rules: Vec::new(), nodes, ..policy() }));
        assert_eq!(lab.tcp(0, at(V4.2, 9999), 2), Answer);
        assert_eq!(lab.tcp(2, at(V4.0, 9999), 0), Answer);
    });
}

#[test]
fn source_ports_are_asked_for() {
    on_both(|host, lab| {
        let mut policy = policy();
        policy.rules[0].source_ports = ranges(&[(61001, 61100)]);
        drop(lab.firewall(host, &policy));
        let to = at(V4.2, 40002);
        let listener = lab.within(2, || listen(to));
        for (source, allowed) in [(61000, false), (61001, true), (61100, true), (61101, false)] {
            let connected = lab.within(0, || {
                let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("socket");
                socket.set_reuse_address(true).expect("reuse");
                socket.bind(&at(V4.0, source).into()).expect("bind");
                socket.connect_timeout(&to.into(), PATIENCE)
            });
            assert_eq!(connected.is_ok(), allowed, "from port {source}: {connected:?}");
        }
        drop(listener);
    });
}
