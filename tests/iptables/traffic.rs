//! Verdicts on real packets.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use bridge_agent::config::Scope;
use bridge_agent::firewall::Firewall as _;
use bridge_agent::iptables::Iptables;
use bridge_agent::model::{Action, Direction, Mode, OnDeny, Policy, Protocol, Rule};
use etherparse::TcpHeader;
use socket2::{Domain, Socket, Type};

use crate::lab::Seen::{Answer, Nothing, Refusal};
use crate::lab::{Lab, PATIENCE, V4, V6, at, listen};
use crate::support::{BACKENDS, Host, nets, policy, ranges, rule};

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

#[test]
fn a_flow_must_begin_with_a_syn() {
    on_both(|host, lab| {
        let firewall = lab.firewall(host, &Policy { on_deny: OnDeny::Drop, ..policy() });
        let (lan, _, pod) = V4;
        let (from, to) = (at(lan, 61001), at(pod, 40002));
        let arrived = lab.within(2, || {
            let socket =
                Socket::new(Domain::IPV4, Type::RAW, Some(socket2::Protocol::TCP)).expect("a raw socket");
            socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
            socket
        });
        let send = |flags: fn(TcpHeader) -> TcpHeader| {
            let (SocketAddr::V4(from), SocketAddr::V4(to)) = (from, to) else {
                unreachable!("both are IPv4")
            };
            let mut header = flags(TcpHeader::new(from.port(), to.port(), 1, 1024));
            let sum = header.calc_checksum_ipv4_raw(from.ip().octets(), to.ip().octets(), &[]);
            header.checksum = sum.expect("a checksum");
            lab.within(0, || {
                let socket =
                    Socket::new(Domain::IPV4, Type::RAW, Some(socket2::Protocol::TCP)).expect("a raw socket");
                socket.send_to(&header.to_bytes(), &SocketAddr::from((*to.ip(), 0)).into()).expect("send");
            });
        };
        // In order: had one of the first come through, it would be read instead of the last.
        send(|header| TcpHeader { ack: true, ..header });
        send(|header| TcpHeader { syn: true, ack: true, ..header });
        send(|header| TcpHeader { rst: true, ..header });
        send(|header| header);
        send(|header| TcpHeader { syn: true, sequence_number: 77, ..header });
        let mut packet = [0; 64];
        (&arrived).read_exact(&mut packet[..40]).expect("the SYN arrives");
        assert_eq!(packet[24..28], 77u32.to_be_bytes(), "the first to arrive is the SYN");
        let hits = lab.within(1, || firewall.hits()).expect("hits");
        let denied = hits["bridge:not-syn"].packets + hits["bridge:invalid"].packets;
        assert_eq!(denied, 4, "{hits:?}");
    });
}

#[test]
fn strict_denies_what_is_out_of_scope_too() {
    on_both(|host, lab| {
        let elsewhere =
            Policy { pods: nets(&["10.200.2.0/24"]), external: nets(&["192.168.31.0/24"]), ..policy() };
        drop(lab.firewall(host, &elsewhere));
        assert_eq!(lab.tcp(0, at(V4.2, 9999), 2), Answer);
        assert_eq!(lab.tcp(0, at(V6.2, 9999), 2), Answer);
        let mut config = host.config();
        config.options.scope = Scope::Strict;
        lab.within(1, || Iptables::new(config).and_then(|mut f| f.converge(&elsewhere)).expect("converge"));
        assert_eq!(lab.tcp(0, at(V4.2, 9999), 2), Refusal);
        assert_eq!(lab.tcp(0, at(V6.2, 9999), 2), Refusal);
        assert_eq!(lab.tcp(0, at(V4.1, 22), 1), Answer, "the node itself is no forwarded traffic");
    });
}
