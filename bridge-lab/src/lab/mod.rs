//! Building a lab and taking it away again.
//!
//! ```no_run
//! use bridge_lab::lab::Lab;
//! let lab = Lab::builder().masquerade().build()?;
//! lab.a().netns.ip("route show")?;
//! # anyhow::Ok(())
//! ```
//! Every trace of a lab carries the id of its owner. It is removed with the [`Lab`] value, also in a panic; the
//! leftovers of a killed owner are removed at the start of the next lab, or by [`clean`].

mod builder;
mod id;
mod netns;
mod plan;
mod process;
mod reap;

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

pub use self::builder::Builder;
pub use self::id::LabId;
pub use self::netns::Netns;
pub use self::plan::NodePort;
pub use self::process::Process;
pub(crate) use self::reap::cgroup_hierarchies;
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
    /// The interface with these addresses: `eth0`, or on a VLAN `eth0.ID` on top of it.
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

    /// The MAC address of `eth0`, as iproute2 writes it.
    pub fn mac_text(&self) -> String {
        plan::mac_text(self.mac)
    }

    /// Gives a pod of the first node, `node`, an `eth0` in the place of one that was deleted, with its MAC and IPv4 addresses;
    /// `peer` is the name of the other end.
    ///
    /// # Errors
    /// iproute2 fails.
    pub fn plug(&self, node: &Netns, peer: &str) -> Result<()> {
        let (mac, gateway) = (self.mac_text(), plan::gateway_v4(0));
        node.ip(&format!(
            "link add {peer} address {} type veth peer name eth0 address {mac} netns {}",
            plan::mac_text(plan::NODE_SIDE_MAC),
            self.netns.name()
        ))?;
        for words in [
            "link set eth0 up".into(),
            format!("address add {}/32 dev eth0", self.v4),
            format!("route add {gateway}/32 dev eth0"),
            format!("route add default via {gateway} dev eth0"),
        ] {
            self.netns.ip(&words)?;
        }
        for words in [
            format!("link set {peer} up"),
            format!("address add {gateway}/32 dev {peer}"),
            format!("route replace {}/32 dev {peer}", self.v4),
            format!("neighbour replace {} lladdr {mac} dev {peer} nud permanent", self.v4),
        ] {
            node.ip(&words)?;
        }
        Ok(())
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
        Builder::default()
    }

    /// The prefix of the names of all its traces.
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

    /// Returns the MAC address of the `cali…` interfaces, to which pods send.
    pub fn node_side_mac(&self) -> [u8; 6] {
        plan::NODE_SIDE_MAC
    }

    /// Opens the network namespace of a running process of the lab, such as a container's.
    ///
    /// # Errors
    /// There is no such process.
    pub fn netns_of(&self, process: u32, name: &str) -> Result<Netns> {
        Netns::of_process(self.id(), process, name.to_owned())
    }

    /// A directory for sockets, configuration and logs.
    pub fn directory(&self) -> PathBuf {
        reap::runtime_directory(self.id())
    }

    /// Returns a directory for pinned eBPF objects on the BPF file system, which is mounted if it is not. The caller
    /// creates the directory itself.
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
        make_cgroup(&format!("{}/{name}", self.id()))
    }

    /// A cgroup v2 directory in the place of kubelet's `kubepods`, so that agents look for pods in it.
    pub fn kubepods(&self) -> Result<PathBuf> {
        make_cgroup(&format!("{}-kube/kubepods", self.id()))
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

fn make_cgroup(path: &str) -> Result<PathBuf> {
    let root = reap::cgroup_root().context("cgroup v2 is not mounted on /sys/fs/cgroup")?;
    let directory = root.join(path);
    fs::create_dir_all(&directory).with_context(|| format!("make cgroup {}", directory.display()))?;
    Ok(directory)
}
