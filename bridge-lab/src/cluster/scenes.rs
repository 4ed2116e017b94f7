//! The scenes of a cluster: each way between a LAN host and a pod, once for a peer that a policy allows and once for one
//! that none allows, over IPv4 and IPv6, TCP and UDP, with real sockets.

use std::net::{IpAddr, SocketAddr};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;
use serde_json::{Value, json};

use super::{Cluster, Pod};
use crate::lab::{Family, Netns};
use crate::traffic::{tcp, udp};

/// Port of the servers in pods that a policy opens for the allowed host; the next one is denied to all.
const POD_PORT: u16 = 8080;
/// Port of the servers on LAN hosts that a policy opens for client pods.
const LAN_PORT: u16 = 9090;
/// Port of the pod with the node's network.
const NODE_PORT: u16 = 8088;
/// `hostPort` of the server pod.
const HOST_PORT: u16 = 18080;
/// Services of type LoadBalancer with their addresses, which are not announced: LAN hosts have routes to them, by the node of
/// this number.
const BALANCED: [(&str, usize, [&str; 2]); 2] = [
    ("balanced", 0, ["192.168.31.200", "fd31::200"]),
    ("balanced-anywhere", 1, ["192.168.31.201", "fd31::201"]),
];
/// Pause before an unanswered attempt counts as not reached.
const SILENCE: Duration = Duration::from_millis(700);
/// Number of scenes that are played at the same time.
const AT_ONCE: usize = 8;
/// Of the table, in characters.
const WIDTH: u16 = 120;

/// A way to a pod or to a LAN host, played for both peers.
#[derive(Clone, Debug, Serialize)]
pub struct Scene {
    /// The way.
    pub name: String,
    /// Who tries.
    pub peer: &'static str,
    /// The expected result.
    pub expected: &'static str,
    /// The observed result: nothing but `expected`, or each attempt that differs.
    pub seen: String,
    /// Whether all attempts came out as expected.
    pub ok: bool,
}

/// The transport protocol of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protocol {
    Tcp,
    Udp,
}

impl Protocol {
    const BOTH: [Self; 2] = [Self::Tcp, Self::Udp];

    const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
        }
    }
}

/// A server on both protocols and families; it ends when this is dropped.
struct Servers {
    _tcp: Vec<tcp::Server>,
    _udp: Vec<udp::Server>,
}

impl Servers {
    fn start(netns: &Netns, addresses: &[IpAddr], ports: &[u16]) -> Result<Self> {
        let mut servers = Self { _tcp: Vec::new(), _udp: Vec::new() };
        for address in addresses {
            for port in ports {
                let at = SocketAddr::new(*address, *port);
                servers._tcp.push(tcp::Server::echo(netns, at).with_context(|| format!("listen on {at}"))?);
                servers._udp.push(udp::Server::echo(netns, at).with_context(|| format!("listen on {at}"))?);
            }
        }
        Ok(servers)
    }
}

/// The cluster that the scenes are played on.
pub struct Stage<'a> {
    cluster: &'a Cluster,
    server: Pod,
    client: Pod,
    other: Pod,
    _servers: Vec<Servers>,
}

impl<'a> Stage<'a> {
    /// Makes pods, Services and policies, and starts the servers.
    ///
    /// # Errors
    /// An object is refused, or a pod does not run.
    pub fn set(cluster: &'a Cluster) -> Result<Self> {
        cluster.apply(&services(cluster))?;
        for (name, _, addresses) in BALANCED {
            let status =
                json!({"status": {"loadBalancer": {"ingress": addresses.map(|ip| json!({"ip": ip}))}}});
            let patch = ["patch", "service", name, "--subresource=status", "--type=merge", "--patch"];
            cluster.kubectl(&[&patch[..], &[&status.to_string()]].concat())?;
        }
        let ports =
            |protocol: &str| json!({"containerPort": POD_PORT, "hostPort": HOST_PORT, "protocol": protocol});
        let container = json!({"containers": [{
            "name": "idle", "image": super::IDLE, "imagePullPolicy": "Never", "ports": [ports("TCP"), ports("UDP")],
        }]});
        let server = cluster.make_pod("server", 0, &json!({"app": "server"}), &container)?;
        let client = cluster.make_pod("client", 0, &json!({"app": "client"}), &json!({}))?;
        let other = cluster.make_pod("other", 0, &json!({"app": "other"}), &json!({}))?;
        let host_network = json!({"hostNetwork": true});
        cluster.make_pod("on-node", 0, &json!({"app": "on-node"}), &host_network)?;
        cluster.apply_policies(&policies(cluster))?;
        let servers = vec![
            Servers::start(&server.netns, &server.addresses, &[POD_PORT, POD_PORT + 1])?,
            Servers::start(
                &cluster.lab().b().netns,
                &Family::BOTH.map(|f| cluster.lab().b().ip(f)),
                &[NODE_PORT],
            )?,
            Servers::start(
                &cluster.allowed_host().netns,
                &Family::BOTH.map(|f| cluster.allowed_host().ip(f)),
                &[LAN_PORT, LAN_PORT + 1],
            )?,
            Servers::start(
                &cluster.stranger().netns,
                &Family::BOTH.map(|f| cluster.stranger().ip(f)),
                &[LAN_PORT],
            )?,
        ];
        let stage = Self { cluster, server, client, other, _servers: servers };
        stage.route_services()?;
        stage.wait_for_proxies()?;
        Ok(stage)
    }

    /// Routes the addresses of Services on the LAN hosts: cluster addresses by the node of their pod, but that of `elsewhere`.
    fn route_services(&self) -> Result<()> {
        let nodes = self.cluster.lab().nodes();
        for family in Family::BOTH {
            let inside = if family == Family::V4 { "10.96.0.0/16" } else { "fd96::/112" };
            let elsewhere = self.service("elsewhere", family)?.ip().to_string();
            let mut routes = vec![(inside.to_owned(), 0), (elsewhere, 1)];
            let index = usize::from(family == Family::V6);
            routes.extend(BALANCED.map(|(_, node, addresses)| (addresses[index].to_owned(), node)));
            for host in self.cluster.lab().hosts() {
                for (to, node) in &routes {
                    host.netns.ip(&format!("route replace {to} via {}", nodes[*node].ip(family)))?;
                }
            }
        }
        Ok(())
    }

    /// Waits until kube-proxy on each node has written the rules of every Service: from the node itself, which bridge does
    /// not judge.
    fn wait_for_proxies(&self) -> Result<()> {
        for node in self.cluster.lab().nodes() {
            let to = self.service("inside", Family::V4)?;
            let reached = || tcp::Client::new(&node.netns).deadline(SILENCE).connect(to).ok()?.reached().ok();
            crate::wait::eventually(super::STARTING, reached)
                .context("kube-proxy has no rules of a Service")?;
        }
        Ok(())
    }

    /// The cluster address of a Service.
    fn service(&self, name: &str, family: Family) -> Result<SocketAddr> {
        let service = self.cluster.get(&format!("service {name}"))?;
        let addresses = service["spec"]["clusterIPs"].as_array().context("a Service without addresses")?;
        let parsed = addresses.iter().filter_map(|ip| ip.as_str()?.parse::<IpAddr>().ok());
        let address = parsed.into_iter().find(|ip| ip.is_ipv4() == (family == Family::V4));
        let port = service["spec"]["ports"][0]["port"].as_u64().and_then(|port| u16::try_from(port).ok());
        Ok(SocketAddr::new(address.context("no address of this family")?, port.context("no port")?))
    }

    /// The NodePort of a Service, of a protocol.
    fn node_port(&self, name: &str, protocol: Protocol) -> Result<u16> {
        let service = self.cluster.get(&format!("service {name}"))?;
        let ports = service["spec"]["ports"].as_array().context("a Service without ports")?;
        let port = ports.iter().find(|port| port["protocol"].as_str().is_some_and(|p| p == protocol.name()));
        let port = port.and_then(|port| u16::try_from(port["nodePort"].as_u64()?).ok());
        port.context("no NodePort of this protocol")
    }

    /// Plays every scene.
    ///
    /// # Errors
    /// A scene cannot be played at all.
    pub fn play(&self) -> Result<Vec<Scene>> {
        let mut scenes = Vec::new();
        let (inbound, outbound) = (self.inbound()?, self.outbound()?);
        let hosts = [self.cluster.allowed_host(), self.cluster.stranger()].map(|host| &host.netns);
        let pods = [&self.client.netns, &self.other.netns];
        for way in &inbound {
            scenes.push((way, hosts[0], "allowed host", way.allowed));
            scenes.push((way, hosts[1], "stranger", way.stranger));
        }
        for way in &outbound {
            scenes.push((way, pods[0], "allowed pod", way.allowed));
            scenes.push((way, pods[1], "other pod", way.stranger));
        }
        let from_node = Way::new("pod with the node's network to LAN host", true, true, |f, _| {
            Ok(self.cluster.stranger().at(f, LAN_PORT))
        })?;
        scenes.push((&from_node, &self.cluster.lab().b().netns, "pod with the node's network", true));
        let (next, played) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
        thread::scope(|scope| {
            for _ in 0..AT_ONCE {
                scope.spawn(|| {
                    loop {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        let Some((way, from, peer, reached)) = scenes.get(index) else { break };
                        let scene = attempt(way, from, peer, *reached);
                        played.lock().expect("no thread panics").push((index, scene));
                    }
                });
            }
        });
        let mut played = played.into_inner().expect("no thread panics");
        played.sort_by_key(|(index, _)| *index);
        Ok(played.into_iter().map(|(_, scene)| scene).collect())
    }

    /// Whether the mark of a packet is lost on the node: the kernel clears `tc_index` where a program of Cilium passes a packet
    /// at ingress (`TCX_PASS`).
    fn loses_peer(&self) -> Result<bool> {
        let nodes = self.cluster.get("bridgenodes")?;
        let engines = nodes["items"][0]["status"]["engines"].as_array().context("engines of a node")?;
        Ok(self.cluster.options().cni == super::Cni::Cilium && engines.iter().any(|engine| engine == "ebpf"))
    }

    fn inbound(&self) -> Result<Vec<Way>> {
        let nodes = self.cluster.lab().nodes();
        let balanced = |index: usize, family| -> Result<SocketAddr> {
            let (_, _, addresses) = BALANCED[index];
            Ok(SocketAddr::new(addresses[usize::from(family == Family::V6)].parse()?, POD_PORT))
        };
        let pod = |family| self.server.ip(family);
        // kube-proxy replaces the source of these; with Cilium, eBPF does not know the peer then, and refuses them.
        let masqueraded = !self.loses_peer()?;
        let mut ways = vec![
            Way::new("pod address, allowed port", true, false, |f, _| Ok(SocketAddr::new(pod(f), POD_PORT)))?,
            Way::new("pod address, another port", false, false, |f, _| {
                Ok(SocketAddr::new(pod(f), POD_PORT + 1))
            })?,
            Way::new("ClusterIP, routed to the node", masqueraded, false, |f, _| self.service("inside", f))?,
            Way::new("ClusterIP, routed to another node", masqueraded, false, |f, _| {
                self.service("elsewhere", f)
            })?,
            Way::new("LoadBalancer address, externalTrafficPolicy Local", true, false, |f, _| {
                balanced(0, f)
            })?,
            Way::new(
                "LoadBalancer address, externalTrafficPolicy Cluster, at another node",
                masqueraded,
                false,
                |f, _| balanced(1, f),
            )?,
            Way::new("hostPort", true, false, |f, _| Ok(nodes[0].at(f, HOST_PORT)))?,
            Way::new("pod with the node's network", true, true, |f, _| Ok(nodes[0].at(f, NODE_PORT)))?,
        ];
        for (service, name) in [
            ("everywhere", "NodePort, externalTrafficPolicy Cluster"),
            ("sticky", "NodePort, sessionAffinity ClientIP"),
        ] {
            for (node, host) in nodes.iter().enumerate() {
                let place = if node == 0 { "the pod's node" } else { "another node" };
                ways.push(Way::new(&format!("{name}, at {place}"), masqueraded, false, |f, p| {
                    Ok(host.at(f, self.node_port(service, p)?))
                })?);
            }
        }
        ways.push(Way::new("NodePort, externalTrafficPolicy Local", true, false, |f, p| {
            Ok(nodes[0].at(f, self.node_port("local", p)?))
        })?);
        Ok(ways)
    }

    fn outbound(&self) -> Result<Vec<Way>> {
        let (allowed, stranger) = (self.cluster.allowed_host(), self.cluster.stranger());
        let mut ways = vec![
            Way::new("pod to LAN host, allowed port", true, false, |f, _| Ok(allowed.at(f, LAN_PORT)))?,
            Way::new("pod to LAN host, another port", false, false, |f, _| Ok(allowed.at(f, LAN_PORT + 1)))?,
            Way::new("pod to a LAN host that no policy names", false, false, |f, _| {
                Ok(stranger.at(f, LAN_PORT))
            })?,
            Way::new("pod to a Service whose endpoint is the LAN host", true, false, |f, _| {
                self.service("lan", f)
            })?,
            Way::new("pod to a Service whose endpoint is the other LAN host", false, false, |f, _| {
                self.service("lan-stranger", f)
            })?,
            Way::new("pod to pod", true, true, |f, _| Ok(SocketAddr::new(self.server.ip(f), POD_PORT + 1)))?,
        ];
        let options = self.cluster.options();
        // Else the answer crosses the bridge with the address of the pod, with and without bridge: kubeadm demands br_netfilter.
        if options.bridge_netfilter || options.cni != super::Cni::Bridge {
            ways.push(Way::new("pod to pod, through a Service", true, true, |f, _| {
                self.service("inside", f)
            })?);
        }
        Ok(ways)
    }
}

/// A way, with the address that leads there for each family and protocol.
struct Way {
    name: String,
    /// Whether the peer that a policy allows is expected to come through.
    allowed: bool,
    /// Whether the other one is.
    stranger: bool,
    to: Vec<(Family, Protocol, SocketAddr)>,
}

impl Way {
    fn new(
        name: &str,
        allowed: bool,
        stranger: bool,
        to: impl Fn(Family, Protocol) -> Result<SocketAddr>,
    ) -> Result<Self> {
        let mut addresses = Vec::new();
        for family in Family::BOTH {
            for protocol in Protocol::BOTH {
                addresses.push((family, protocol, to(family, protocol)?));
            }
        }
        Ok(Self { name: name.to_owned(), allowed, stranger, to: addresses })
    }
}

fn attempt(way: &Way, from: &Netns, peer: &'static str, reached: bool) -> Scene {
    let expected = if reached { "reached" } else { "not reached" };
    let mut differences = Vec::new();
    for (family, protocol, to) in &way.to {
        let outcome = match protocol {
            Protocol::Tcp => connect(from, *to),
            Protocol::Udp => udp::ask(from, 0, *to, b"scene", SILENCE)
                .map(|a| (a.succeeded(), a.to_string()))
                .map_err(Into::into),
        };
        let label = format!("{} {}", if *family == Family::V4 { "IPv4" } else { "IPv6" }, protocol.name());
        match outcome {
            Ok((came_through, _)) if came_through == reached => {}
            Ok((_, text)) => differences.push(format!("{label} {text}")),
            Err(error) => differences.push(format!("{label} {error:#}")),
        }
    }
    let ok = differences.is_empty();
    let seen = if ok { expected.to_owned() } else { differences.join("; ") };
    Scene { name: way.name.clone(), peer, expected, seen, ok }
}

/// Connects and has data echoed: a connection that opens but carries nothing is not reached.
fn connect(from: &Netns, to: SocketAddr) -> Result<(bool, String)> {
    let attempt = tcp::Client::new(from).deadline(SILENCE).connect(to)?;
    let (connection, attempt) = attempt.split();
    Ok(match connection {
        Some(mut connection) => match connection.round_trip(SILENCE) {
            Ok(_) => (true, attempt.to_string()),
            Err(error) => (false, format!("opened, then no data: {error}")),
        },
        None => (false, attempt.to_string()),
    })
}

/// The scenes as a table.
pub fn table(scenes: &[Scene]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_HORIZONTAL_ONLY);
    table.set_width(WIDTH).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(["way", "peer", "expected", "seen", ""]);
    for scene in scenes {
        let mark = if scene.ok { "ok" } else { "FAILED" };
        table.add_row([&scene.name, scene.peer, scene.expected, &scene.seen, mark]);
    }
    table
}

fn service(name: &str, kind: &str, selector: &Value, spec: &Value) -> Value {
    let port = |protocol: &str| json!({"name": protocol.to_lowercase(), "port": POD_PORT, "targetPort": POD_PORT, "protocol": protocol});
    let mut service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
        "spec": {
            "type": kind, "ipFamilyPolicy": "RequireDualStack", "ports": [port("TCP"), port("UDP")],
        },
    });
    if !selector.is_null() {
        service["spec"]["selector"] = selector.clone();
    }
    for (key, value) in spec.as_object().into_iter().flatten() {
        service["spec"][key] = value.clone();
    }
    service
}

fn services(cluster: &Cluster) -> Vec<Value> {
    let server = json!({"app": "server"});
    let local = json!({"externalTrafficPolicy": "Local"});
    let mut objects = vec![
        service("inside", "ClusterIP", &server, &json!({})),
        service("everywhere", "NodePort", &server, &json!({})),
        service("sticky", "NodePort", &server, &json!({"sessionAffinity": "ClientIP"})),
        service("local", "NodePort", &server, &local),
        service("elsewhere", "ClusterIP", &server, &json!({})),
        service("balanced", "LoadBalancer", &server, &local),
        service("balanced-anywhere", "LoadBalancer", &server, &json!({})),
    ];
    for (name, host) in [("lan", cluster.allowed_host()), ("lan-stranger", cluster.stranger())] {
        objects.push(service(name, "ClusterIP", &Value::Null, &json!({})));
        for (family, kind) in [(Family::V4, "IPv4"), (Family::V6, "IPv6")] {
            let port = |protocol: &str| json!({"name": protocol.to_lowercase(), "port": LAN_PORT, "protocol": protocol});
            objects.push(json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": kind,
                "metadata": {
                    "name": format!("{name}-{}", kind.to_lowercase()),
                    "labels": {"kubernetes.io/service-name": name},
                },
                "endpoints": [{"addresses": [host.ip(family).to_string()]}],
                "ports": [port("TCP"), port("UDP")],
            }));
        }
    }
    objects
}

fn policies(cluster: &Cluster) -> Vec<Value> {
    let host = cluster.allowed_host();
    let external = [format!("{}/32", host.v4), format!("{}/128", host.v6)];
    let rule = |name: &str, direction: &str, app: &str, protocol: &str, port: u16| {
        json!({
            "name": name, "direction": direction, "external": external, "action": "allow",
            "podSelector": {"matchLabels": {"app": app}}, "protocol": protocol, "ports": [port],
        })
    };
    let policy = |name: &str, rules: [Value; 2]| {
        json!({
            "apiVersion": "bridge.lan/v1alpha1", "kind": "BridgePolicy", "metadata": {"name": name},
            "spec": {"rules": rules},
        })
    };
    let both = |direction: &str, app: &str, port| {
        ["tcp", "udp"].map(|protocol| rule(&format!("{app}-{protocol}"), direction, app, protocol, port))
    };
    vec![
        policy("servers", both("inbound", "server", POD_PORT)),
        policy("clients", both("outbound", "client", LAN_PORT)),
    ]
}
