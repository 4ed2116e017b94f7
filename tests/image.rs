//! The agent from its image, in a container of the DaemonSet: `cargo xtask image --test`.

use std::{env, fs, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, ensure};
use bridge_lab::{
    container::{Container, Files, daemonset},
    lab::{Family, Lab},
    traffic::tcp::{Client, Server},
};

const SECOND: Duration = Duration::from_secs(1);

fn image() -> Result<PathBuf> {
    let root = env::var_os("BRIDGE_IMAGE")
        .context("run `cargo xtask image --test`, which builds and names the image")?;
    Ok(root.into())
}

#[test]
#[ignore = "needs the image: cargo xtask image --test"]
fn an_allowed_port_passes_and_a_denied_one_is_refused() -> Result<()> {
    let image = image()?;
    for backend in ["nft", "legacy"] {
        let lab = Lab::builder().build()?;
        let (a, c1) = (lab.a(), lab.c1());
        let config = format!(
            "role: node\n\
             networks: {{pods: [10.200.1.0/24], external: [192.168.31.0/24]}}\n\
             enforcement: {{engines: [ebpf, iptables], iptables: {{backend: {backend}}}}}\n\
             rules: [{{name: in, direction: inbound, protocol: tcp, ports: [40002]}}]\n\
             portPool: {{ports: 61001-61100, masquerade: true}}\n\
             persistence: {{save: never}}\n"
        );
        let files = Files::OfImage(image.clone());
        let mut container = Container::start(&lab, lab.b(), &files, daemonset()?, &config)?;
        container.ready()?;
        let _allowed = Server::echo(&c1.netns, c1.at(Family::V4, 40002))?;
        let _denied = Server::echo(&c1.netns, c1.at(Family::V4, 40003))?;
        let connect = |port| Client::new(&a.netns).deadline(SECOND).connect(c1.at(Family::V4, port));
        ensure!(connect(40002)?.succeeded(), "the allowed port");
        ensure!(connect(40003)?.refused(), "the denied port");
        // Both engines, and the programs of the image made the tables.
        let save = container.exec(&[&format!("iptables-{backend}-save")])?;
        ensure!(String::from_utf8_lossy(&save.stdout).contains(" -j BRIDGE-FORWARD\n"), "{save:?}");
        let nft = container.exec(&["nft", "list", "table", "inet", "bridge-pool"])?;
        ensure!(String::from_utf8_lossy(&nft.stdout).contains("masquerade to :61001-61100"), "{nft:?}");
        // Enforcement stays active when the pod ends.
        ensure!(container.stop()?.success(), "{}", container.log());
        ensure!(connect(40003)?.refused(), "without the agent");
    }
    Ok(())
}

#[test]
#[ignore = "needs the image: cargo xtask image --test"]
fn nobody_logs_in_and_nothing_is_left_of_the_build() -> Result<()> {
    let image = image()?;
    let users = fs::read_to_string(image.join("etc/passwd"))?;
    let shells = users.lines().filter_map(|line| line.rsplit(':').next());
    let no_login = |shell: &str| matches!(shell, "/usr/sbin/nologin" | "/bin/false" | "/bin/sync");
    ensure!(shells.clone().all(no_login), "{users}");
    for empty in ["var/lib/apt/lists", "var/log", "usr/share/doc", "tmp"] {
        // Licences of the packages stay, and an image without a package manager has no folder of its lists.
        let Ok(entries) = fs::read_dir(image.join(empty)) else { continue };
        let is_licence = |entry: &fs::DirEntry| entry.path().join("copyright").exists();
        let there: Vec<_> =
            entries.flatten().filter(|entry| !is_licence(entry)).map(|entry| entry.file_name()).collect();
        ensure!(there.is_empty(), "{empty}: {there:?}");
    }
    Ok(())
}
