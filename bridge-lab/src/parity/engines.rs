//! The engines, as the agent uses them.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bridge_agent::config::{Events, Flows};
use bridge_agent::datapath::{Behaviour, Datapath, FlowFilter, Mechanism, Options, Pins, Role, Target};
use bridge_agent::firewall::{Firewall as _, Options as FirewallOptions};
use bridge_agent::iptables::{Config, Iptables, save::Saving};
use bridge_agent::model::{OnDeny, Policy, Topology};
use bridge_agent::nftables::{self, Nftables};
use bridge_agent::policy;
use bridge_common::filter::fast_path::{ability, protocols};
use bridge_common::filter::flow::state;

use super::asked::Rules;
use super::node::{Node, SIDES};
use super::translated::{self, Service};
use super::{Side, local};

/// No flow expires while a case lasts. In nanoseconds.
const TIMEOUT: u64 = 60_000_000_000;
const ETHERNET: u32 = 14;

/// Enforces one policy after the other in the network namespace of its thread.
pub(super) trait Engine {
    /// Forgets every flow, and activates the policy.
    fn enforce(&mut self, policy: &Policy) -> Result<()>;

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
    fn enforce(&mut self, policy: &Policy) -> Result<()> {
        self.0.converge(policy)?;
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
    fn enforce(&mut self, policy: &Policy) -> Result<()> {
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
    let topology = Topology { external: vec![lan], internal: vec![pods], ..Topology::default() };
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

fn forget_flows() -> Result<()> {
    let output = Command::new("conntrack").arg("--flush").output().context("start conntrack")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let left = std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count")?;
    ensure!(left.trim() == "0", "conntrack still knows {} flows", left.trim());
    Ok(())
}

/// eBPF alone, with the fast path.
pub(super) struct ByEbpf {
    datapath: Datapath,
    targets: [Target; 2],
}

impl ByEbpf {
    pub(super) fn new(node: &Node, pins: Pins) -> Result<Self> {
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
                tunnel: false,
            })
        };
        let targets = [
            target(Side::Lan, Role::External, through)?,
            target(Side::Pods, Role::Internal, through | ability::PEER)?,
        ];
        let datapath = Datapath::load(&options)?;
        // Its only changing input is the policy, whose changes it sees.
        datapath.maps.fast_path().allow(protocols::TCP | protocols::UDP, Duration::MAX);
        Ok(Self { datapath, targets })
    }
}

impl Engine for ByEbpf {
    fn enforce(&mut self, policy: &Policy) -> Result<()> {
        let tables = policy::compile(policy, &local())?;
        let behaviour = Behaviour {
            timeouts: [TIMEOUT; state::COUNT],
            audit: false,
            reject: policy.on_deny == OnDeny::Reject,
            events_per_second: Events::default().rate,
            answers_per_second: u32::MAX,
            report_allowed: false,
        };
        self.datapath.publish(&tables, &behaviour, None)?;
        self.datapath.attach(&self.targets).1?;
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
