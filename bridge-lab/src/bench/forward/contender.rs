//! The contenders: the usual alternatives, and bridge in each of its configurations.

use std::fs;
use std::process::Command;

use anyhow::{Context as _, Result};
use bridge_agent::nftables::MAX_ELEMENTS;

use super::packets::{DropAt, Packets};
use super::ruleset;
use crate::agent::{self, Agent};
use crate::lab::Lab;

/// A way to enforce a policy, or not to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Contender {
    None,
    IptablesLegacy,
    IptablesNft,
    NftablesSet,
    Ebpf,
    Shield,
    EbpfIptables,
    EbpfNftables,
    Nftables,
    FastPath,
    IptablesRaw,
    TcDrop,
    XdpDrop,
}

/// Rules at most for those that go through them one by one.
const LONGEST_LIST: u32 = 10_000;
/// The key that switches the fast path, in `enforcement`.
const FAST_PATH: &str = "fastPath";

impl Contender {
    /// In the order of display.
    pub(super) const ALL: [Self; 13] = [
        Self::None,
        Self::TcDrop,
        Self::XdpDrop,
        Self::IptablesRaw,
        Self::IptablesLegacy,
        Self::IptablesNft,
        Self::NftablesSet,
        Self::Ebpf,
        Self::Shield,
        Self::EbpfIptables,
        Self::EbpfNftables,
        Self::Nftables,
        Self::FastPath,
    ];
    /// Those that forward by a policy; the first is the reference of the others.
    pub(super) const FORWARD: [Self; 9] = [
        Self::None,
        Self::IptablesLegacy,
        Self::IptablesNft,
        Self::NftablesSet,
        Self::Ebpf,
        Self::EbpfIptables,
        Self::EbpfNftables,
        Self::Nftables,
        Self::FastPath,
    ];
    /// Those that deny; the first is the reference of the others.
    pub(super) const DENIED: [Self; 9] = [
        Self::TcDrop,
        Self::XdpDrop,
        Self::None,
        Self::IptablesRaw,
        Self::IptablesLegacy,
        Self::IptablesNft,
        Self::NftablesSet,
        Self::Ebpf,
        Self::Shield,
    ];

    /// As it is written in names of measurements.
    pub(super) fn key(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::IptablesLegacy => "iptables-legacy",
            Self::IptablesNft => "iptables-nft",
            Self::NftablesSet => "nftables-set",
            Self::Ebpf => "ebpf",
            Self::Shield => "ebpf-xdp",
            Self::EbpfIptables => "ebpf-iptables",
            Self::EbpfNftables => "ebpf-nftables",
            Self::Nftables => "nftables",
            Self::FastPath => "fastpath",
            Self::IptablesRaw => "iptables-raw",
            Self::TcDrop => "tc-drop",
            Self::XdpDrop => "xdp-drop",
        }
    }

    /// As it is called in tables.
    pub(super) fn title(self) -> &'static str {
        match self {
            Self::None => "no firewall",
            Self::IptablesLegacy => "iptables-legacy",
            Self::IptablesNft => "iptables-nft",
            Self::NftablesSet => "nftables, interval set",
            Self::Ebpf => "bridge, eBPF",
            Self::Shield => "bridge, eBPF behind the shield",
            Self::EbpfIptables => "bridge, eBPF and iptables",
            Self::EbpfNftables => "bridge, eBPF and nftables",
            Self::Nftables => "bridge, nftables",
            Self::FastPath => "bridge, fast path",
            Self::IptablesRaw => "iptables-legacy, drop in raw",
            Self::TcDrop => "bare drop at TC",
            Self::XdpDrop => "bare drop at XDP",
        }
    }

    /// Returns why this contender cannot be compared here with `rules` rules; `None` if it can.
    pub(super) fn missing(self, rules: u32) -> Result<Option<String>> {
        let list = matches!(self, Self::IptablesLegacy | Self::IptablesNft | Self::EbpfIptables);
        if list && rules > LONGEST_LIST {
            return Ok(Some(format!("a list of {rules} rules takes milliseconds for each new flow")));
        }
        let set = matches!(self, Self::EbpfNftables | Self::Nftables);
        if set && rules as usize > MAX_ELEMENTS {
            return Ok(Some(format!("the engine takes {MAX_ELEMENTS} elements")));
        }
        let tool = match self {
            Self::None | Self::Ebpf | Self::Shield | Self::TcDrop | Self::XdpDrop => return Ok(None),
            Self::IptablesLegacy | Self::IptablesRaw => "iptables-legacy-restore",
            Self::IptablesNft => "iptables-nft-restore",
            Self::NftablesSet | Self::EbpfNftables | Self::Nftables => "nft",
            Self::EbpfIptables => "iptables-restore",
            Self::FastPath => {
                return Ok((!knows_fast_path()?).then(|| format!("this agent knows no {FAST_PATH}")));
            }
        };
        Ok(Command::new(tool).arg("--version").output().err().map(|error| format!("{tool}: {error}")))
    }

    /// Applies a policy of `rules` rules on the node; it stays active while the returned value lives.
    ///
    /// # Errors
    /// The tool or the agent fails.
    pub(super) fn enforce(self, lab: &Lab, packets: &mut Packets, rules: u32) -> Result<Option<Agent>> {
        let fast_path = |on: &str| -> Result<String> {
            Ok(if knows_fast_path()? { format!(", {FAST_PATH}: {on}") } else { String::new() })
        };
        let engines = match self {
            Self::None => return Ok(None),
            Self::TcDrop | Self::XdpDrop => {
                let at = if self == Self::TcDrop { DropAt::Tc } else { DropAt::Xdp };
                return packets.drop_at(at, lab.c2().v4, &lab.b().netns, "eth0").map(|()| None);
            }
            Self::IptablesRaw => {
                let text = ruleset::iptables_raw(lab.c2().v4);
                return load(lab, "iptables-legacy-restore", &["--wait=5"], &text).map(|()| None);
            }
            Self::IptablesLegacy | Self::IptablesNft => {
                let tool = format!("{}-restore", self.key());
                return load(lab, &tool, &["--wait=5"], &ruleset::iptables(rules)).map(|()| None);
            }
            Self::NftablesSet => return load(lab, "nft", &["-f"], &ruleset::nftables(rules)).map(|()| None),
            Self::Ebpf => format!("engines: [ebpf]{}", fast_path("off")?),
            Self::Shield => format!("engines: [ebpf], xdp: auto{}", fast_path("off")?),
            Self::EbpfIptables => format!("engines: [ebpf, iptables]{}", fast_path("off")?),
            Self::EbpfNftables => format!("engines: [ebpf, nftables]{}", fast_path("off")?),
            Self::Nftables => "engines: [nftables]".to_owned(),
            Self::FastPath => format!("engines: [ebpf]{}", fast_path("auto")?),
        };
        Agent::start(lab, lab.b(), &ruleset::agent(rules, &engines)).map(Some)
    }
}

/// Feeds a file to a tool on the node.
fn load(lab: &Lab, tool: &str, arguments: &[&str], text: &str) -> Result<()> {
    let file = lab.directory().join("rules");
    fs::write(&file, text)?;
    let mut command = Command::new(tool);
    command.args(arguments).arg(&file);
    lab.b().netns.output(command).map(drop)
}

/// Whether the agent has a fast path: whether it takes the key that switches it.
fn knows_fast_path() -> Result<bool> {
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("agent.yaml");
    fs::write(&file, ruleset::agent(1, &format!("engines: [ebpf], {FAST_PATH}: auto")))?;
    let mut command = Command::new(agent::program()?);
    let output =
        command.arg("check").arg("--config").arg(&file).output().context("start bridge-agent check")?;
    Ok(output.status.success())
}
