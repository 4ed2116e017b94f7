//! Building a lab: the plan handed to `ip` and `nft`, namespace by namespace.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, anyhow, ensure};

use super::id::LabId;
use super::netns::Netns;
use super::plan::{NodePort, Options, Plan, Station};
use super::{Host, Lab, Traces, reap};

/// Describes the [`Lab`] to build.
#[derive(Clone, Debug)]
#[must_use]
pub struct Builder(Options);

impl Default for Builder {
    fn default() -> Self {
        Self(Options {
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
}

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

    /// Builds the lab, after removing the leftovers of labs whose owner is dead.
    ///
    /// # Errors
    /// Not root, a tool or kernel feature missing, an option out of its range.
    pub fn build(self) -> Result<Lab> {
        ensure!(
            rustix::process::geteuid().is_root(),
            "the lab makes network namespaces: run it as root (sudo)"
        );
        for error in reap::clean().1 {
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
