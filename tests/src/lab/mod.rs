//! Building a lab and taking it away again.
//!
//! ```no_run
//! use bridge_tests::lab::Lab;
//! let lab = Lab::builder().masquerade().build()?;
//! lab.a().netns.ip("route show")?;
//! # anyhow::Ok(())
//! ```
//! Every trace of a lab bears the id of its owner. It goes with the [`Lab`] value, also in a panic; what a
//! killed owner leaves is removed at the start of the next lab, or by [`clean`].

mod id;
mod netns;
mod plan;
mod process;
mod reap;

use std::fs;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

pub use self::id::LabId;
pub use self::netns::Netns;
pub use self::plan::NodePort;
use self::plan::{Options, Plan, Station};
pub use self::process::Process;
pub use self::reap::{all, clean, remove_own};
use crate::traffic::icmp;
use crate::wait::eventually;

/// How long the first packets of a new lab may take to arrive.
const SETTLING: Duration = Duration::from_secs(5);

/// IPv4 or IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// RFC 791.
    V4,
    /// RFC 8200.
    V6,
}

impl Family {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];
}

/// A LAN host, a node or a pod.
#[derive(Clone, Debug)]
pub struct Host {
    /// `a`, `a2`; `b`, `b2`…; `c1`, `c2`…
    pub name: String,
    /// Its network namespace.
    pub netns: Netns,
    /// Its IPv4 address; of a node, the one on the LAN.
    pub v4: Ipv4Addr,
    /// Its IPv6 address; of a node, the one on the LAN.
    pub v6: Ipv6Addr,
    /// The interface that bears these addresses: `eth0`, or on a VLAN `eth0.ID` on top of it.
    pub interface: String,
    /// The MAC address of `eth0`.
    pub mac: [u8; 6],
    /// The other end of `eth0`: of a pod, the `cali…` interface on its node; else a port in [`Lab::lan`].
    pub peer_interface: String,
}

impl Host {
    /// Its address of a family.
    pub fn ip(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.v4.into(),
            Family::V6 => self.v6.into(),
        }
    }

    /// Its address of a family with a port.
    pub fn at(&self, family: Family, port: u16) -> SocketAddr {
        SocketAddr::new(self.ip(family), port)
    }
}

/// LAN hosts, nodes and pods; all of it is gone when this is dropped.
#[derive(Debug)]
pub struct Lab {
    lan: Netns,
    hosts: Vec<Host>,
    nodes: Vec<Host>,
    pods: Vec<Host>,
    pods_per_node: usize,
    // Dropped last.
    traces: Traces,
}

/// Removes every trace of a lab when dropped: also of one that was never finished.
#[derive(Debug)]
struct Traces(LabId);

impl Drop for Traces {
    fn drop(&mut self) {
        for error in reap::remove(self.0) {
            eprintln!("cannot remove a trace of {}: {error}", self.0);
        }
    }
}

impl Lab {
    /// One LAN host, one node, two pods; LAN hosts have routes to the pods; no address translation, no
    /// connection tracking; offloads as the kernel has them.
    pub fn builder() -> Builder {
        Builder(Options {
            second_host: false,
            nodes: 1,
            pods: 2,
            routes: true,
            vlan: None,
            offloads: true,
            masquerade: false,
            conntrack: false,
            node_ports: Vec::new(),
        })
    }

    /// What the names of all its traces begin with.
    pub fn id(&self) -> LabId {
        self.traces.0
    }

    /// The LAN host, 192.168.31.67.
    pub fn a(&self) -> &Host {
        &self.hosts[0]
    }

    /// The second LAN host, 192.168.31.68.
    ///
    /// # Panics
    /// Without [`Builder::second_host`].
    pub fn a2(&self) -> &Host {
        self.hosts.get(1).expect("a lab built with second_host()")
    }

    /// The (first) node, 192.168.31.17.
    pub fn b(&self) -> &Host {
        &self.nodes[0]
    }

    /// The first pod, 10.200.1.91.
    ///
    /// # Panics
    /// In a lab without pods.
    pub fn c1(&self) -> &Host {
        &self.pods[0]
    }

    /// The second pod, 10.200.1.92.
    ///
    /// # Panics
    /// In a lab with fewer pods.
    pub fn c2(&self) -> &Host {
        &self.pods[1]
    }

    /// All LAN hosts.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// All nodes.
    pub fn nodes(&self) -> &[Host] {
        &self.nodes
    }

    /// All pods: those of the first node first.
    pub fn pods(&self) -> &[Host] {
        &self.pods
    }

    /// The node of a pod, and the number of that node from 0.
    fn node_of(&self, pod: usize) -> usize {
        pod / self.pods_per_node.max(1)
    }

    /// The namespace with the bridge that joins the `port-…` interfaces to a LAN.
    pub fn lan(&self) -> &Netns {
        &self.lan
    }

    /// The pod network of a node, counted from 0.
    pub fn pod_network(&self, node: u8, family: Family) -> IpNet {
        match family {
            Family::V4 => plan::pod_network_v4(node).into(),
            Family::V6 => plan::pod_network_v6(node).into(),
        }
    }

    /// The network of the LAN.
    pub fn lan_network(&self, family: Family) -> IpNet {
        match family {
            Family::V4 => Ipv4Net::new_assert(Ipv4Addr::new(192, 168, 31, 0), 24).into(),
            Family::V6 => Ipv6Net::new_assert(Ipv6Addr::new(0xfd31, 0, 0, 0, 0, 0, 0, 0), 64).into(),
        }
    }

    /// The MAC address of the `cali…` interfaces: what a pod sends to.
    pub fn node_side_mac(&self) -> [u8; 6] {
        plan::NODE_SIDE_MAC
    }

    /// A directory for sockets, configuration and logs.
    pub fn directory(&self) -> PathBuf {
        reap::runtime_directory(self.id())
    }

    /// A directory for pinned eBPF objects on the BPF file system, which is mounted if it is not. The
    /// directory itself is left to whoever pins.
    pub fn pin_directory(&self) -> Result<PathBuf> {
        let directory = reap::pin_directory(self.id());
        let bpffs = directory.parent().context("a parent")?;
        let kind = rustix::fs::statfs(bpffs).map(|fs| fs.f_type);
        if kind.ok() != Some(libc::BPF_FS_MAGIC) {
            use rustix::mount::{MountFlags, mount};
            mount("bpf", bpffs, "bpf", MountFlags::empty(), None)
                .with_context(|| format!("mount the BPF file system on {}", bpffs.display()))?;
        }
        Ok(directory)
    }

    /// A cgroup v2 directory of this name below the lab's own, made if it is not there.
    pub fn cgroup(&self, name: &str) -> Result<PathBuf> {
        let own = reap::cgroup_directory(self.id()).context("cgroup v2 is not mounted on /sys/fs/cgroup")?;
        let directory = own.join(name);
        fs::create_dir_all(&directory).with_context(|| format!("make cgroup {}", directory.display()))?;
        Ok(directory)
    }

    /// Gives a LAN host the routes to all pod networks that [`Builder::without_routes`] left out.
    pub fn add_routes(&self, host: &Host) -> Result<()> {
        for (i, node) in (0..).zip(&self.nodes) {
            for family in Family::BOTH {
                let (network, via) = (self.pod_network(i, family), node.ip(family));
                host.netns.ip(&format!("route replace {network} via {via}"))?;
            }
        }
        Ok(())
    }

    /// Waits until every station gets an answer from its node: neighbours are known, bridges have learnt.
    fn settle(&self) -> Result<()> {
        for family in Family::BOTH {
            let b = self.b().ip(family);
            let to_node = self.hosts.iter().chain(&self.nodes[1..]).map(|host| (host, b));
            let to_gateway = self.pods.iter().enumerate().map(|(i, pod)| {
                let node = u8::try_from(self.node_of(i)).unwrap_or(u8::MAX);
                let gateway = match family {
                    Family::V4 => plan::gateway_v4(node).into(),
                    Family::V6 => plan::gateway_v6(node).into(),
                };
                (pod, gateway)
            });
            for (from, to) in to_node.chain(to_gateway) {
                let echo = || icmp::echo(&from.netns, to, Duration::from_millis(500));
                eventually(SETTLING, || echo().ok().filter(|attempt| attempt.succeeded()))
                    .with_context(|| format!("no answer from {to} to {} in the new lab", from.name))?;
            }
        }
        Ok(())
    }
}

/// Says what a [`Lab`] is to be like.
#[derive(Clone, Debug)]
#[must_use]
pub struct Builder(Options);

impl Builder {
    /// A second LAN host, 192.168.31.68.
    pub fn second_host(mut self) -> Self {
        self.0.second_host = true;
        self
    }

    /// Nodes, 1 to 50: 192.168.31.17 with pods in 10.200.1.0/24, 192.168.31.18 with 10.200.2.0/24, and so on.
    pub fn nodes(mut self, count: u8) -> Self {
        self.0.nodes = count;
        self
    }

    /// Pods on each node, at most 150.
    pub fn pods(mut self, count: u8) -> Self {
        self.0.pods = count;
        self
    }

    /// LAN hosts know no route to the pods.
    pub fn without_routes(mut self) -> Self {
        self.0.routes = false;
        self
    }

    /// LAN hosts and nodes talk in an 802.1Q VLAN, 1 to 4094. Needs CONFIG_VLAN_8021Q.
    pub fn vlan(mut self, id: u16) -> Self {
        self.0.vlan = Some(id);
        self
    }

    /// Turns checksum and segmentation offloads off on every interface: packets look as on a wire.
    pub fn without_offloads(mut self) -> Self {
        self.0.offloads = false;
        self
    }

    /// Nodes give connections of pods to the LAN their own address.
    pub fn masquerade(mut self) -> Self {
        self.0.masquerade = true;
        self
    }

    /// Nodes track connections (as masquerade and NodePorts make them do, too).
    pub fn conntrack(mut self) -> Self {
        self.0.conntrack = true;
        self
    }

    /// A NodePort; may be called again for more.
    pub fn node_port(mut self, node_port: NodePort) -> Self {
        self.0.node_ports.push(node_port);
        self
    }

    /// Builds the lab, after removing what labs of dead owners left.
    ///
    /// # Errors
    /// Not root, a tool or kernel feature missing, an option out of its range.
    pub fn build(self) -> Result<Lab> {
        ensure!(
            rustix::process::geteuid().is_root(),
            "the lab makes network namespaces: run it as root (sudo)"
        );
        for error in clean().1 {
            eprintln!("cannot remove a trace of a dead lab: {error}");
        }
        let plan = Plan::new(self.0).map_err(|e| anyhow!(e))?;
        let id = LabId::unique();
        let traces = Traces(id);
        let full_name = |name: &str| format!("{id}-{name}");
        fs::create_dir_all(reap::runtime_directory(id)).context("make the lab's directory")?;

        let script: String =
            plan.namespaces().map(|name| format!("netns add {}\n", full_name(name))).collect();
        batch("ip", &["-batch", "-"], &script)?;
        for name in plan.namespaces() {
            sysctls(&Netns::open(id, full_name(name))?, &plan)?;
        }
        batch("ip", &["-batch", "-"], &plan.links(full_name))?;
        let configure = |name: &str, script: &str| {
            batch("ip", &["-netns", &full_name(name), "-batch", "-"], script).map_err(|e| explain(e, &plan))
        };
        configure("lan", &plan.segment())?;
        for (index, node) in (0..).zip(&plan.nodes) {
            configure(&node.name, &plan.node(index))?;
        }
        for host in &plan.hosts {
            configure(&host.name, &plan.host(host))?;
        }
        for pod in &plan.pods {
            configure(&pod.name, &plan.pod(pod))?;
        }

        let open = |station: &Station| {
            Ok(Host {
                name: station.name.clone(),
                netns: Netns::open(id, full_name(&station.name))?,
                v4: station.v4,
                v6: station.v6,
                interface: station.node.map_or_else(|| plan.lan_interface(), |_| "eth0".into()),
                mac: station.mac(),
                peer_interface: station.peer.clone(),
            })
        };
        let open_all = |stations: &[Station]| stations.iter().map(open).collect::<Result<Vec<_>>>();
        let lab = Lab {
            lan: Netns::open(id, full_name("lan"))?,
            hosts: open_all(&plan.hosts)?,
            nodes: open_all(&plan.nodes)?,
            pods: open_all(&plan.pods)?,
            pods_per_node: plan.options.pods.into(),
            traces,
        };
        for (index, node) in (0..).zip(&lab.nodes) {
            if let Some(rules) = plan.nftables(index) {
                node.netns.run(|| batch("nft", &["-f", "-"], &rules))?;
            }
        }
        if !plan.options.offloads {
            lab.disable_offloads()?;
        }
        lab.settle()?;
        Ok(lab)
    }
}

impl Lab {
    fn disable_offloads(&self) -> Result<()> {
        let disable = |netns: &Netns, interface: &str| {
            let mut ethtool = Command::new("ethtool");
            // `tx` is checksum offload: without it no segmentation offload is possible.
            ethtool
                .args(["-K", interface, "tx", "off", "rx", "off", "gso", "off", "gro", "off", "tso", "off"]);
            netns.output(ethtool).map(drop)
        };
        for host in self.hosts.iter().chain(&self.nodes) {
            disable(&host.netns, "eth0")?;
            disable(&self.lan, &host.peer_interface)?;
        }
        for (i, pod) in self.pods.iter().enumerate() {
            disable(&pod.netns, "eth0")?;
            disable(&self.nodes[self.node_of(i)].netns, &pod.peer_interface)?;
        }
        Ok(())
    }
}

/// Before there are interfaces, so that they are born with these values.
fn sysctls(netns: &Netns, plan: &Plan) -> Result<()> {
    let own = netns.name().rsplit('-').next().unwrap_or_default();
    let is_node = plan.nodes.iter().any(|node| node.name == own);
    let mut settings = vec![
        // No duplicate address detection: an address can be used at once.
        ("ipv6/conf/default/accept_dad", "0"),
        ("ipv6/conf/default/dad_transmits", "0"),
        ("ipv6/conf/default/accept_ra", "0"),
        // Whatever the machine's own default is, a lab is the same on all of them.
        ("ipv4/conf/all/rp_filter", "0"),
        ("ipv4/conf/default/rp_filter", "0"),
    ];
    if is_node {
        settings.push(("ipv4/ip_forward", "1"));
        settings.push(("ipv6/conf/all/forwarding", "1"));
    }
    if own == "lan" {
        settings.push(("ipv6/conf/default/disable_ipv6", "1"));
        for name in ["bridge/bridge-nf-call-iptables", "bridge/bridge-nf-call-ip6tables"] {
            // There only with CONFIG_BRIDGE_NETFILTER.
            if netns.run(|| Path::new("/proc/sys/net").join(name).exists()) {
                settings.push((name, "0"));
            }
        }
    }
    netns.run(|| {
        for (name, value) in settings {
            let path = Path::new("/proc/sys/net").join(name);
            fs::write(&path, value).with_context(|| format!("write {value} to {}", path.display()))?;
        }
        Ok(())
    })
}

/// Feeds a script to a tool. Its complaint becomes the error.
fn batch(tool: &str, arguments: &[&str], script: &str) -> Result<()> {
    let mut child = Command::new(tool)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {tool} (is it installed?)"))?;
    child.stdin.take().context("a pipe")?.write_all(script.as_bytes()).context("write the script")?;
    let output = child.wait_with_output()?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{tool} {}: {}\n{script}", arguments.join(" "), complaint.trim());
    Ok(())
}

/// The one refusal that says nothing about its remedy.
fn explain(error: anyhow::Error, plan: &Plan) -> anyhow::Error {
    if plan.options.vlan.is_some() && error.to_string().contains("Unknown device type") {
        return error.context("this kernel has no VLAN interfaces: it needs CONFIG_VLAN_8021Q");
    }
    error
}
