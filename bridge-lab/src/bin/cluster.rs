//! `cluster`: brings a Kubernetes cluster with bridge up on this machine, plays its scenes, and keeps it up.

use std::io::{IsTerminal as _, stderr};
use std::pin::pin;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use bridge_lab::cluster::scenes::{self, Stage};
use bridge_lab::cluster::{Cluster, Cni, KUBERNETES, Options, Proxy};
use bridge_lab::lab;
use bridge_lab::wait::end_requested;
use clap::Parser;

/// A Kubernetes cluster with bridge: two nodes and two LAN hosts in network namespaces of this machine.
#[derive(Clone, Debug, Parser)]
struct Cli {
    /// End after the scenes: with 0 if each came out as expected, else with 1
    #[arg(long)]
    once: bool,
    /// Print one JSON object for each scene, with name, peer, expected, seen and ok
    #[arg(long)]
    json: bool,
    /// Bring the cluster up and install bridge, without the scenes
    #[arg(long)]
    no_scenes: bool,
    /// Number of nodes
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=9))]
    nodes: u8,
    /// Mode of kube-proxy
    #[arg(long, value_enum, default_value_t = Proxy::Nftables)]
    proxy: Proxy,
    /// CNI plugin
    #[arg(long, value_enum, default_value_t = Cni::Bridge)]
    cni: Cni,
    /// Keep bridged packets from iptables (net.bridge.bridge-nf-call-iptables=0)
    #[arg(long)]
    no_bridge_netfilter: bool,
    /// Have the CNI plugin masquerade packets that leave the pod network
    #[arg(long)]
    masquerade: bool,
    /// Connect the pods of different nodes by a VXLAN overlay
    #[arg(long)]
    overlay: bool,
    /// Engines of the agents, separated by commas
    #[arg(long, value_delimiter = ',', default_value = "ebpf,iptables")]
    engines: Vec<String>,
    /// Kubernetes release
    #[arg(long, default_value = KUBERNETES)]
    version: String,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<ExitCode> {
    let cli = Cli::parse();
    let keep = !cli.once;
    let work = tokio::task::spawn_blocking(move || run(&cli));
    let mut end = pin!(end_requested());
    let (cluster, code) = tokio::select! {
        done = work => done??,
        signal = &mut end => {
            signal?;
            for error in lab::remove_own() {
                eprintln!("{error}");
            }
            eprintln!("interrupted: the cluster is removed");
            // The work continues in its thread, on a cluster that no longer exists.
            std::process::exit(1);
        }
    };
    if keep {
        explain(&cluster);
        end.await?;
    }
    drop(cluster);
    Ok(code)
}

fn run(cli: &Cli) -> Result<(Cluster, ExitCode)> {
    let options = Options {
        version: cli.version.clone(),
        nodes: cli.nodes,
        proxy: cli.proxy,
        cni: cli.cni,
        bridge_netfilter: !cli.no_bridge_netfilter,
        masquerade: cli.masquerade,
        overlay: cli.overlay,
        engines: cli.engines.clone(),
    };
    let start = Instant::now();
    progress("control plane and nodes");
    let cluster = Cluster::up(options)?;
    let up = start.elapsed();
    progress("bridge");
    cluster.install_bridge(None)?;
    eprintln!(
        "\rcluster up after {:.1} s, bridge ready after {:.1} s\x1b[K",
        up.as_secs_f64(),
        start.elapsed().as_secs_f64()
    );
    let mut scenes = Vec::new();
    if !cli.no_scenes {
        progress("pods and Services");
        let stage = Stage::set(&cluster)?;
        progress("scenes");
        scenes = stage.play()?;
        progress("");
    }
    if cli.json {
        for scene in &scenes {
            println!("{}", serde_json::to_string(scene)?);
        }
    } else if !scenes.is_empty() {
        println!("{}", scenes::table(&scenes));
    }
    let code = if scenes.iter().all(|scene| scene.ok) { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    Ok((cluster, code))
}

/// Shows the current step, on a terminal only: one line, redrawn (ECMA-48, EL).
fn progress(step: &str) {
    if stderr().is_terminal() {
        eprint!("\r{step}\x1b[K");
    }
}

/// Prints commands to try in a cluster that stays up.
fn explain(cluster: &Cluster) {
    let (config, kubectl) = cluster.access();
    let node = cluster.lab().b().netns.name();
    let inside = format!("nsenter --net=/run/netns/{node}");
    println!("\nThe cluster stays up until Ctrl-C. In another terminal, as root:");
    println!("  {inside} {} --kubeconfig {} get nodes,pods -A", kubectl.display(), config.display());
    println!("  nsenter --net=/run/netns/{} ping 192.168.31.17", cluster.allowed_host().netns.name());
}
