//! The engines, as the agent uses them.

use std::fs;
use std::net::IpAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bridge_agent::config::{Events, Flows};
use bridge_agent::datapath::{
    Behaviour, Datapath, FlowFilter, Mechanism, Options, Pins, Role, Shield, Target,
};
use bridge_agent::firewall::{Firewall as _, Options as FirewallOptions};
use bridge_agent::iptables::{Config, Iptables, save::Saving};
use bridge_agent::model::{OnDeny, RoutedPods, Topology};
use bridge_agent::nftables::{self, Nftables};
use bridge_agent::policy;
use bridge_common::filter::fast_path::{ability, protocols};
use bridge_common::filter::flow::state;

use super::asked::Rules;
use super::elsewhere::{BEYOND, OVERLAY, TUNNELS};
use super::endpoints::side;
use super::node::{Node, OVERLAY_INTERFACE, SIDES};
use super::translated::{self, Service};
use super::{Case, Side, local};
use crate::wait::{eventually, patience};

/// No flow expires while a case lasts. In nanoseconds.
const TIMEOUT: u64 = 60_000_000_000;
const ETHERNET: u32 = 14;

/// Enforces one policy after the other in the network namespace of its thread.
pub(super) trait Engine {
    /// Forgets every flow, and activates the policy of a case.
    fn enforce(&mut self, case: &Case) -> Result<()>;

    /// Forgets every flow.
    fn forget(&mut self) -> Result<()> {
        forget_flows()
    }

    /// Reads the rules of the kernel as `explain` does; `None`: the engine is no packet filter.
    fn rules(&self) -> Result<Option<Rules>> {
        Ok(None)
    }
}

/// iptables alone, on the back end that is the system's default.
pub(super) struct ByIptables(Iptables);

impl ByIptables {
    pub(super) fn new() -> Result<Self> {
        let saving = Saving { enabled: false, ..Saving::default() };
        Ok(Self(Iptables::new(Config { saving, options: options(), ..Config::default() })?))
    }
}

impl Engine for ByIptables {
    fn enforce(&mut self, case: &Case) -> Result<()> {
        self.0.converge(&case.policy)?;
        forget_flows()
    }

    fn rules(&self) -> Result<Option<Rules>> {
        Rules::of_iptables().map(Some)
    }
}

/// nftables alone.
pub(super) struct ByNftables(Nftables);

impl ByNftables {
    pub(super) fn new() -> Result<Self> {
        let saving = nftables::save::Saving { enabled: false, ..Default::default() };
        Ok(Self(Nftables::new(nftables::Config { saving, options: options(), ..Default::default() })?))
    }
}

impl Engine for ByNftables {
    fn enforce(&mut self, Case { policy, .. }: &Case) -> Result<()> {
        nftables::check(policy)?;
        self.0.converge(policy)?;
        forget_flows()
    }

    fn rules(&self) -> Result<Option<Rules>> {
        Rules::of_nftables().map(Some)
    }
}

/// The interfaces, as the agent would survey them.
fn options() -> FirewallOptions {
    let [lan, pods] = SIDES.map(|(_, name, _)| name.to_owned());
    let overlay = OVERLAY_INTERFACE.to_owned();
    let remote = |interface: &str, blocks: [&str; 2]| RoutedPods {
        interface: interface.to_owned(),
        pods: blocks.iter().filter_map(|block| block.parse().ok()).collect(),
    };
    let topology = Topology {
        remote: vec![remote(&lan, BEYOND), remote(&overlay, OVERLAY)],
        external: vec![lan],
        internal: vec![pods],
        gateways: Vec::new(),
        tunnels: TUNNELS.to_vec(),
        tunnel_interfaces: vec![overlay],
        settled: Vec::new(),
    };
    FirewallOptions { topology, ..FirewallOptions::default() }
}

/// Runs `work` while the node translates flows to services, in the network namespace of this thread.
pub(super) fn translating<T>(services: &[Service], work: impl FnOnce() -> Result<T>) -> Result<T> {
    let nft = |script: String| -> Result<()> {
        let file = tempfile::NamedTempFile::new()?;
        std::fs::write(file.path(), script)?;
        let output = Command::new("nft").arg("-f").arg(file.path()).output().context("start nft")?;
        ensure!(output.status.success(), "nft: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    };
    nft(translated::table(services))?;
    let done = work();
    nft("delete table inet translated\n".to_owned())?;
    done
}

/// Deletes all flows of the node. A packet that is still queued holds its flow a moment longer.
fn forget_flows() -> Result<()> {
    let forget = || -> Result<()> {
        let output = Command::new("conntrack").arg("--flush").output().context("start conntrack")?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let left = fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count")?;
        ensure!(left.trim() == "0", "conntrack still knows {} flows", left.trim());
        Ok(())
    };
    let mut last = Ok(());
    eventually(patience(Duration::from_secs(5)), || {
        last = forget();
        last.is_ok().then_some(())
    });
    last
}

/// eBPF alone, with the fast path, and with the shield or without.
pub(super) struct ByEbpf {
    datapath: Datapath,
    /// In the order of [`Side::ALL`].
    targets: [Target; 3],
    shielded: bool,
}

impl ByEbpf {
    pub(super) fn new(node: &Node, pins: Pins, shielded: bool) -> Result<Self> {
        let Flows { established, half_open } = Flows::default();
        let mechanism = Mechanism::Best;
        let options = Options { pins, flows: established, half_open, mechanism, debug: false };
        let through = ability::INPUT | ability::OUTPUT;
        let target = |side, role, fast_path| -> Result<Target> {
            let (index, name) = node.interface(side)?;
            Ok(Target {
                index,
                name: name.to_owned(),
                role,
                link_header: ETHERNET,
                fast_path,
                upper: 0,
                tunnel: side == Side::Overlay,
            })
        };
        let targets = [
            target(Side::Lan, Role::External, through)?,
            target(Side::Pods, Role::Internal, through | ability::PEER)?,
            target(Side::Overlay, Role::External, 0)?,
        ];
        let mut datapath = Datapath::load(&options)?;
        datapath.set_tunnels(TUNNELS)?;
        // Its only changing input is the policy, whose changes it sees.
        datapath.maps.fast_path().allow(protocols::TCP | protocols::UDP, Duration::MAX);
        Ok(Self { datapath, targets, shielded })
    }

    /// Puts the shield before the hook of the LAN. It drops packets to hosted pods only: all pods of the case are.
    fn shield(&mut self, case: &Case) -> Result<()> {
        let interface = self.targets[Side::Pods as usize].index;
        let is_pod = |address: &IpAddr| {
            side(*address) == Side::Pods && case.policy.pods.iter().any(|network| network.contains(address))
        };
        let packets = case.sent.iter().flat_map(|sent| sent.packets.iter().chain(&sent.arrives));
        let ends = packets.flat_map(|packet| <[IpAddr; 2]>::from(packet.addresses()));
        let pods = ends.filter(is_pod).map(|address| (address, interface)).collect();
        self.datapath.host(&pods, &self.targets)?;
        let (states, result) = self.datapath.shield(&self.targets, false);
        let lan = states.get(&self.targets[Side::Lan as usize].index);
        ensure!(lan == Some(&Shield::Native), "the shield is {states:?}");
        Ok(result?)
    }
}

impl Engine for ByEbpf {
    fn enforce(&mut self, case: &Case) -> Result<()> {
        let policy = &case.policy;
        let tables = policy::compile(policy, &local())?;
        let behaviour = Behaviour {
            timeouts: [TIMEOUT; state::COUNT],
            audit: false,
            reject: policy.on_deny == OnDeny::Reject,
            // The shield leaves the packets to the hook that this may still report.
            events_per_second: if self.shielded { 0 } else { Events::default().rate },
            answers_per_second: u32::MAX,
            report_allowed: false,
        };
        self.datapath.publish(&tables, &behaviour, None)?;
        self.datapath.attach(&self.targets).1?;
        if self.shielded {
            self.shield(case)?;
        }
        self.datapath.allow_fast_path(&self.targets).1?;
        self.datapath.maps.delete_flows(&FlowFilter::default())?;
        Ok(())
    }

    fn forget(&mut self) -> Result<()> {
        self.datapath.maps.delete_flows(&FlowFilter::default())?;
        // The node's own connection tracking translates.
        forget_flows()
    }
}
