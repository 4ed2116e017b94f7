//! bridge in a Kubernetes cluster of today: kubelet, containerd, kube-proxy and CNI plugins, all real.
//!
//! Each test brings up one cluster of a shape and plays every scene in it; a cluster costs half a minute.

mod explain;
mod life;
mod page;
mod plugin;

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use bridge_lab::cluster::scenes::{self, Stage};
use bridge_lab::cluster::{Cluster, Cni, Options, Proxy};

/// Plays every scene in a cluster of this shape. Those in `known` are faults that are not mended yet: the test fails as
/// well when one of them comes out right, so that the list shrinks.
fn play(options: Options, known: &[(&str, &str)]) -> Result<()> {
    let cluster = Cluster::up(options)?;
    cluster.install_bridge(None)?;
    let scenes = Stage::set(&cluster)?.play(|_| ())?;
    let failed: BTreeSet<_> = scenes.iter().filter(|s| !s.ok).map(|s| (s.name.as_str(), s.peer)).collect();
    let known: BTreeSet<_> = known.iter().copied().collect();
    ensure!(failed == known, "known to fail: {known:#?}\n{}", scenes::table(&scenes));
    Ok(())
}

/// As kubeadm with flannel has it: pods on a bridge that iptables sees into.
#[test]
fn bridge_plugin_with_nftables_proxy() -> Result<()> {
    play(Options::default(), &[])
}

/// Routed pods whose connections leave with the node's address, and an overlay between the nodes.
#[test]
fn ptp_plugin_with_iptables_proxy_masquerade_and_overlay() -> Result<()> {
    let options = Options {
        proxy: Proxy::Iptables,
        cni: Cni::Ptp,
        masquerade: true,
        overlay: true,
        ..Options::default()
    };
    play(options, &[])
}

/// Each engine alone: no other one makes up for what it does not judge.
fn play_alone(engine: &str, options: Options) -> Result<()> {
    play(Options { engines: vec![engine.to_owned()], ..options }, &[])
}

#[test]
fn ebpf_alone() -> Result<()> {
    play_alone("ebpf", Options::default())
}

#[test]
fn iptables_alone_with_ptp_plugin_and_iptables_proxy() -> Result<()> {
    play_alone("iptables", Options { proxy: Proxy::Iptables, cni: Cni::Ptp, ..Options::default() })
}

#[test]
fn nftables_alone() -> Result<()> {
    play_alone("nftables", Options::default())
}
