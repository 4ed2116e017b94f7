//! bridge in a Kubernetes cluster of today: kubelet, containerd, kube-proxy and CNI plugins, all real.
//!
//! Each test brings up one cluster of a shape, and plays every scene in it with each choice of engines.

mod cilium;
mod explain;
mod life;
mod page;
mod plugin;

use anyhow::{Context as _, Result, ensure};
use bridge_lab::cluster::scenes::{self, Stage};
use bridge_lab::cluster::{Cluster, Cni, Options, Proxy};

/// `enforcement.engines`, by turns. Beside an engine alone, no other one makes up for its faults.
const ENGINES: [&[&str]; 5] =
    [&["ebpf", "iptables"], &["ebpf"], &["iptables"], &["nftables"], &["ebpf", "nftables"]];

/// Plays every scene in a cluster of this shape, with each choice of engines.
fn play(options: Options) -> Result<()> {
    let cluster = Cluster::up(options)?;
    cluster.install_bridge(None)?;
    let stage = Stage::set(&cluster)?;
    let mut failed = String::new();
    for engines in ENGINES {
        cluster.set_engines(engines)?;
        let scenes = stage.play().with_context(|| engines.join(", "))?;
        if !scenes.iter().all(|scene| scene.ok) {
            failed += &format!("{}:\n{}\n", engines.join(", "), scenes::table(&scenes));
        }
    }
    ensure!(failed.is_empty(), "{:?}\n{failed}", cluster.options());
    Ok(())
}

/// As kubeadm with flannel has it: pods on a bridge that iptables sees into.
#[test]
fn bridge_plugin_with_nftables_proxy() -> Result<()> {
    play(Options::default())
}

/// The same with an overlay, kube-proxy in its other mode, and masquerade.
#[test]
fn bridge_plugin_with_iptables_proxy_masquerade_and_overlay() -> Result<()> {
    play(Options { proxy: Proxy::Iptables, masquerade: true, overlay: true, ..Options::default() })
}

/// A bridge that iptables does not see into.
#[test]
fn bridge_plugin_without_br_netfilter() -> Result<()> {
    play(Options { proxy: Proxy::Iptables, bridge_netfilter: false, ..Options::default() })
}

/// Routed pods.
#[test]
fn ptp_plugin_with_iptables_proxy() -> Result<()> {
    play(Options { proxy: Proxy::Iptables, cni: Cni::Ptp, ..Options::default() })
}

/// Routed pods whose connections leave with the node's address, and an overlay between the nodes.
#[test]
fn ptp_plugin_with_nftables_proxy_masquerade_and_overlay() -> Result<()> {
    play(Options { cni: Cni::Ptp, masquerade: true, overlay: true, ..Options::default() })
}

/// The shapes that no other test plays; a quarter of an hour.
#[test]
#[ignore = "takes a quarter of an hour"]
fn every_shape() -> Result<()> {
    let shapes = [Proxy::Nftables, Proxy::Iptables].into_iter().flat_map(|proxy| {
        [(Cni::Bridge, true), (Cni::Bridge, false), (Cni::Ptp, true)].into_iter().flat_map(
            move |(cni, bridge_netfilter)| {
                [false, true].into_iter().flat_map(move |masquerade| {
                    [false, true].map(move |overlay| Options {
                        proxy,
                        cni,
                        bridge_netfilter,
                        masquerade,
                        overlay,
                        ..Options::default()
                    })
                })
            },
        )
    });
    let mut failed = Vec::new();
    for shape in shapes {
        let name = format!("{shape:?}");
        match play(shape) {
            Ok(()) => eprintln!("ok  {name}"),
            Err(error) => {
                eprintln!("FAILED {error:#}");
                failed.push(name);
            }
        }
    }
    ensure!(failed.is_empty(), "{failed:#?}");
    Ok(())
}
