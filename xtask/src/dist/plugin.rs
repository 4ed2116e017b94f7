//! `kubectl bridge`: an archive for each architecture, and the manifest from which krew installs them.

use std::{
    env,
    fmt::Write as _,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

use super::{Architecture, Dist};
use crate::{cluster, cmd, workspace};

/// The program in the archive: the agent under the name that makes it the plugin.
const PROGRAM: &str = "kubectl-bridge";
/// Manifest of krew; its name is that of the plugin.
const MANIFEST: &str = "bridge.krew.yaml";
/// Where releases are downloaded from, for the manifest.
const URL: &str = "BRIDGE_RELEASE_URL";
const DEFAULT_URL: &str = "https://bridge.example/releases";

fn archive(dist: &Dist, architecture: Architecture) -> PathBuf {
    dist.out.join(format!("{PROGRAM}-{}-linux-{}.tar.gz", dist.version, architecture.debian()))
}

/// Writes the archives and the manifest into `dist.out`.
pub(super) fn build(dist: &Dist) -> Result<()> {
    let base = env::var(URL).unwrap_or_else(|_| DEFAULT_URL.to_owned());
    let mut platforms = String::new();
    for architecture in dist.architectures.iter().copied() {
        let folder = dist.work.join("plugin").join(architecture.machine());
        fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        fs::copy(dist.binary(architecture), folder.join(PROGRAM))?;
        for licence in ["LICENSE-APACHE", "LICENSE-MIT"] {
            fs::copy(workspace::root().join(licence), folder.join(licence))?;
            fs::set_permissions(folder.join(licence), fs::Permissions::from_mode(0o644))?;
        }
        let archive = archive(dist, architecture);
        let mut tar = cmd::command("sh");
        // Without the name and the time of the archive in it.
        let pack =
            "tar --sort=name --owner=0 --group=0 --numeric-owner --mtime=\"@$2\" -cf - * | gzip -9n >\"$1\"";
        tar.args(["-euc", pack, "sh"]).arg(&archive).arg(dist.epoch.to_string()).current_dir(&folder);
        cmd::run(&mut tar)?;
        let sum = cmd::output(cmd::command("sha256sum").arg(&archive))?;
        let sum = sum.split_whitespace().next().context("sha256sum prints no sum")?;
        let name = archive.file_name().unwrap_or_default().to_string_lossy();
        write!(
            platforms,
            "  - selector: {{matchLabels: {{os: linux, arch: {}}}}}\n    uri: {base}/v{}/{name}\n    sha256: {sum}\n    bin: {PROGRAM}\n",
            architecture.debian(),
            dist.version,
        )?;
    }
    let manifest = format!(
        "apiVersion: krew.googlecontainertools.github.com/v1alpha2\nkind: Plugin\nmetadata:\n  name: bridge\nspec:\n  \
         version: v{}\n  shortDescription: Show flows and verdicts of bridge on every node\n  \
         description: |\n    Runs a command of bridge-agent (status, flows, rules, monitor and others) on every node\n    \
         of a cluster by pods/exec, and shows the answers in one table with a column for the node.\n  \
         platforms:\n{platforms}",
        dist.version
    );
    fs::write(dist.out.join(MANIFEST), manifest)?;
    Ok(())
}

/// Checks that each archive is the one that the manifest names, and that the program in it is the plugin; krew installs this
/// machine's.
pub(super) fn test(dist: &Dist) -> Result<()> {
    let manifest = fs::read_to_string(dist.out.join(MANIFEST))?;
    for architecture in dist.architectures.iter().copied() {
        let archive = archive(dist, architecture);
        let sum = cmd::output(cmd::command("sha256sum").arg(&archive))?;
        let sum = sum.split_whitespace().next().context("sha256sum prints no sum")?;
        let name = archive.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let named = format!("/{name}\n    sha256: {sum}\n");
        ensure!(manifest.contains(&named), "{MANIFEST} has another checksum for {name}");
        let folder = tempfile::tempdir()?;
        cmd::run(cmd::command("tar").arg("-xzf").arg(&archive).arg("-C").arg(folder.path()))?;
        let mut plugin = if architecture.is_native() {
            cmd::command(folder.path().join(PROGRAM))
        } else {
            let mut emulator = cmd::command(format!("qemu-{}-static", architecture.machine()));
            emulator.arg(folder.path().join(PROGRAM));
            emulator
        };
        let version = cmd::output(plugin.arg("--version"))?;
        ensure!(version.trim() == format!("kubectl bridge {}", dist.version), "{name}: {version}");
        if architecture.is_native() {
            by_krew(dist, &archive)?;
        }
    }
    Ok(())
}

/// Installs the plugin as docs/install.md prints it; krew has an index of its own, without plugins.
fn by_krew(dist: &Dist, archive: &Path) -> Result<()> {
    let krew = cluster::krew()?;
    let folder = tempfile::tempdir()?;
    let index = folder.path().join("index");
    let make = "git init -q \"$1\"; cd \"$1\"; git -c user.name=krew -c user.email=krew@localhost commit -q --allow-empty -m empty";
    cmd::run(cmd::command("sh").args(["-euc", make, "sh"]).arg(&index))?;
    let root = folder.path().join("krew");
    let mut install = cmd::command(krew);
    install.env("HOME", folder.path()).env("KREW_ROOT", &root).env("KREW_DEFAULT_INDEX_URI", &index);
    install.args(["install", "--manifest"]).arg(dist.out.join(MANIFEST)).arg("--archive").arg(archive);
    cmd::output(&mut install)?;
    let version = cmd::output(cmd::command(root.join("bin").join(PROGRAM)).arg("--version"))?;
    ensure!(version.trim() == format!("kubectl bridge {}", dist.version), "by krew: {version}");
    Ok(())
}
