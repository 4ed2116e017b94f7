//! Container images made from files of this machine: no registry, no daemon.
//!
//! Each is an archive in the format of `docker save` with one layer, which `ctr images import` reads.

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

/// Holds the namespaces of a pod.
pub(super) const PAUSE: &str = "localhost/pause:1";
/// The workload of every test pod: it sleeps, and tests open sockets in its network namespace.
pub const IDLE: &str = "localhost/idle:1";
/// The agent, as `deploy/kubernetes/kustomization.yaml` names it.
pub const AGENT: &str = "localhost/bridge-agent";

/// Programs beside the agent in its image, as `deploy/Dockerfile` installs them.
const AGENT_PROGRAMS: [&str; 3] = ["xtables-nft-multi", "xtables-legacy-multi", "nft"];
const NFT_LINKS: [&str; 6] = [
    "iptables",
    "iptables-save",
    "iptables-restore",
    "iptables-nft",
    "iptables-nft-save",
    "iptables-nft-restore",
];

/// Writes the archives of all images into `folder`; `agent` is the program of the agent.
pub(super) fn create(folder: &Path, agent: &Path, tags: &[&str]) -> Result<()> {
    let busybox = find_program("busybox").context("install busybox-static")?;
    for name in [PAUSE, IDLE] {
        let root = staging(folder)?;
        copy(&busybox, &root.join("bin/busybox"))?;
        symlink("busybox", root.join("bin/sh"))?;
        write(folder, &root, name, &["/bin/busybox", "sleep", "2147483647"])?;
    }
    let root = staging(folder)?;
    agent_root(&root, agent)?;
    for tag in tags {
        write(folder, &root, &format!("{AGENT}:{tag}"), &["/usr/local/bin/bridge-agent"])?;
    }
    fs::remove_dir_all(&root)?;
    Ok(())
}

/// Fills `root` with the agent, iptables of both backends, nft, and the libraries that they are linked with.
fn agent_root(root: &Path, agent: &Path) -> Result<()> {
    let mut programs = vec![(agent.to_owned(), root.join("usr/local/bin/bridge-agent"))];
    for name in AGENT_PROGRAMS {
        let program = find_program(name)
            .with_context(|| format!("there is no {name}: install iptables and nftables"))?;
        programs.push((program, root.join("usr/sbin").join(name)));
    }
    let mut libraries = BTreeSet::new();
    for (from, to) in &programs {
        copy(from, to)?;
        libraries.extend(shared_libraries(from)?);
    }
    let modules = ["/usr/lib/x86_64-linux-gnu/xtables", "/usr/lib/aarch64-linux-gnu/xtables"];
    for folder in modules.map(Path::new).into_iter().filter(|folder| folder.is_dir()) {
        for file in fs::read_dir(folder)? {
            let file = file?.path();
            copy(&file, &root.join(file.strip_prefix("/")?))?;
            libraries.extend(shared_libraries(&file)?);
        }
    }
    for library in libraries {
        copy(&library, &root.join(library.strip_prefix("/")?))?;
    }
    let sbin = root.join("usr/sbin");
    for link in NFT_LINKS {
        symlink("xtables-nft-multi", sbin.join(link))?;
        let v6 = link.replacen("iptables", "ip6tables", 1);
        symlink("xtables-nft-multi", sbin.join(v6))?;
        if let Some(legacy) = link.strip_prefix("iptables-nft") {
            symlink("xtables-legacy-multi", sbin.join(format!("iptables-legacy{legacy}")))?;
            symlink("xtables-legacy-multi", sbin.join(format!("ip6tables-legacy{legacy}")))?;
        }
    }
    for folder in
        ["etc/bridge", "run/bridge", "host/proc/sys/net", "host/sys/fs/cgroup", "tmp", "proc", "sys", "dev"]
    {
        fs::create_dir_all(root.join(folder))?;
    }
    fs::write(root.join("run/xtables.lock"), "")?;
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/usr/sbin/nologin\n")?;
    fs::write(root.join("etc/group"), "root:x:0:\n")?;
    Ok(())
}

/// Returns the libraries that the dynamic linker loads for `program`, the linker itself included; none if it is static.
fn shared_libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("start ldd")?;
    let text = String::from_utf8_lossy(&output.stdout);
    // `name => /path (address)`, or `/path (address)` for the linker.
    let path = |line: &str| line.split_whitespace().find(|word| word.starts_with('/')).map(PathBuf::from);
    Ok(text.lines().filter_map(path).collect())
}

fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into(), "/usr/bin".into()]);
    folders.map(|folder| folder.join(name)).find(|program| program.is_file())
}

fn staging(folder: &Path) -> Result<PathBuf> {
    let root = folder.join("root");
    if root.exists() {
        fs::remove_dir_all(&root)?;
    }
    fs::create_dir_all(root.join("bin"))?;
    Ok(root)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to.parent().context("a file without a folder")?)?;
    fs::copy(from, to).with_context(|| format!("copy {}", from.display()))?;
    fs::set_permissions(to, Permissions::from_mode(0o755))?;
    Ok(())
}

/// Writes the archive of an image that has the files of `root` and runs `command`.
fn write(folder: &Path, root: &Path, name: &str, command: &[&str]) -> Result<()> {
    let archive = folder.join("archive");
    fs::create_dir_all(&archive)?;
    tar(root, &archive.join("layer.tar"))?;
    let sum = Command::new("sha256sum").arg(archive.join("layer.tar")).output()?;
    let sum = String::from_utf8_lossy(&sum.stdout);
    let digest = sum.split_whitespace().next().context("sha256sum prints no digest")?.to_owned();
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let config = json!({
        "architecture": architecture, "os": "linux",
        "config": {"Entrypoint": command, "Env": ["PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{digest}")]},
    });
    fs::write(archive.join("config.json"), config.to_string())?;
    let manifest = json!([{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]);
    fs::write(archive.join("manifest.json"), manifest.to_string())?;
    let file = name.rsplit('/').next().unwrap_or(name).replace(':', "-");
    tar(&archive, &folder.join(format!("{file}.tar")))?;
    fs::remove_dir_all(&archive)?;
    Ok(())
}

fn tar(folder: &Path, to: &Path) -> Result<()> {
    let mut command = Command::new("tar");
    command
        .args(["--sort=name", "--owner=0", "--group=0", "--numeric-owner", "-cf"])
        .arg(to)
        .arg("-C")
        .arg(folder);
    let output = command.arg(".").output().context("start tar")?;
    ensure!(output.status.success(), "tar: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
