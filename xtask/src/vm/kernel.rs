//! Debian's kernels, unpacked, and the files that a virtual machine needs to start one.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::{cmd, setup};

/// Modules that [`super::INIT`] loads before it has the host's files.
const MODULES: [&str; 4] = ["virtio_pci", "9pnet_virtio", "9p", "overlay"];
/// The programs of [`super::INIT`]; all are busybox.
const APPLETS: [&str; 7] = ["sh", "mount", "modprobe", "mkdir", "switch_root", "sed", "poweroff"];

/// A kernel of Debian 12.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kernel {
    /// That of the release
    #[value(name = "6.1")]
    Linux6_1,
    /// That of the next release, as Debian's security archive has it for this one
    #[value(name = "6.12")]
    Linux6_12,
}

impl Kernel {
    pub(super) const ALL: [Self; 2] = [Self::Linux6_1, Self::Linux6_12];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Linux6_1 => "6.1",
            Self::Linux6_12 => "6.12",
        }
    }

    /// Depends on the newest kernel package of the series.
    fn meta_package(self) -> &'static str {
        match self {
            Self::Linux6_1 => "linux-image-amd64",
            Self::Linux6_12 => "linux-image-6.12-amd64",
        }
    }
}

/// A kernel that can be started.
pub(super) struct Unpacked {
    /// Holds `boot` and `lib/modules`.
    pub(super) root: PathBuf,
    pub(super) release: String,
}

impl Unpacked {
    pub(super) fn image(&self) -> PathBuf {
        self.root.join("boot").join(format!("vmlinuz-{}", self.release))
    }

    fn modules(&self) -> PathBuf {
        self.root.join("lib/modules").join(&self.release)
    }
}

/// Fetches and unpacks a kernel, unless that was done before. It is not installed.
///
/// # Errors
/// apt or dpkg fails.
pub(super) fn unpacked(kernel: Kernel) -> Result<Unpacked> {
    let root = setup::cache()?.join("kernels").join(kernel.name());
    if !root.exists() {
        let meta = kernel.meta_package();
        let package = setup::newest_dependency(meta)?
            .with_context(|| format!("Debian's package {meta} is not in the lists of apt: apt-get update"))?;
        eprintln!("setup: fetching {package}: Linux {} to test on", kernel.name());
        let part = root.with_extension("part");
        drop(fs::remove_dir_all(&part));
        fs::create_dir_all(&part)?;
        // As root, apt fetches as a user who may not write here, and says so at length.
        let sandbox = ["-o", "APT::Sandbox::User=root"];
        cmd::run(
            cmd::command("apt-get").args(["download", "-q"]).args(sandbox).arg(&package).current_dir(&part),
        )?;
        let archive = only_entry(&part)?;
        cmd::run(cmd::command("dpkg-deb").arg("-x").arg(&archive).arg(part.join("root")))?;
        let release = only_entry(&part.join("root/lib/modules"))?;
        let release = release.file_name().context("a kernel without a release")?;
        cmd::run(cmd::command("busybox").arg("depmod").arg("-b").arg(part.join("root")).arg(release))?;
        fs::rename(part.join("root"), &root)?;
        fs::remove_dir_all(&part)?;
    }
    let release = only_entry(&root.join("lib/modules"))?;
    let release = release.file_name().and_then(|name| name.to_str()).context("a kernel without a release")?;
    Ok(Unpacked { release: release.to_owned(), root })
}

fn only_entry(directory: &Path) -> Result<PathBuf> {
    let mut entries = fs::read_dir(directory).with_context(|| format!("read {}", directory.display()))?;
    match (entries.next(), entries.next()) {
        (Some(entry), None) => Ok(entry?.path()),
        _ => bail!("{} should hold one entry; remove it, and try again", directory.display()),
    }
}

/// Writes the initial file system of the machine: busybox, `init`, and the modules that it takes to see the host's files.
///
/// # Errors
/// It cannot be written.
pub(super) fn write_initramfs(kernel: &Unpacked, init: &str, scratch: &Path, to: &Path) -> Result<()> {
    drop(fs::remove_dir_all(scratch));
    for directory in ["bin", "proc", "dev", "host", "layer", "root"] {
        fs::create_dir_all(scratch.join(directory))?;
    }
    let busybox = cmd::find_program("busybox").context("busybox is not installed")?;
    fs::copy(busybox, scratch.join("bin/busybox"))?;
    for applet in APPLETS {
        symlink("busybox", scratch.join("bin").join(applet))?;
    }
    fs::write(scratch.join("init"), init)?;
    fs::set_permissions(scratch.join("init"), fs::Permissions::from_mode(0o755))?;

    let dependencies = fs::read_to_string(kernel.modules().join("modules.dep"))?;
    let target = scratch.join("lib/modules").join(&kernel.release);
    for file in MODULES.iter().flat_map(|module| needed(&dependencies, module)) {
        let to = target.join(file);
        fs::create_dir_all(to.parent().context("a module lies in a directory")?)?;
        fs::copy(kernel.modules().join(file), to)?;
    }
    for file in ["modules.order", "modules.builtin", "modules.builtin.modinfo"] {
        fs::copy(kernel.modules().join(file), target.join(file))?;
    }
    cmd::run(cmd::command("busybox").arg("depmod").arg("-b").arg(scratch).arg(&kernel.release))?;
    let archive = "find . | busybox cpio -o -H newc 2>/dev/null | gzip -1 > \"$1\"";
    let mut pack = cmd::command("sh");
    pack.args(["-ec", archive, "sh"]).arg(to).current_dir(scratch).stdin(Stdio::null());
    cmd::run(&mut pack)
}

/// Returns the files of a module and of those it depends on, from `modules.dep`; none if it is built in.
pub(crate) fn needed<'a>(dependencies: &'a str, module: &str) -> Vec<&'a str> {
    let is_module = |file: &str| {
        let name = file.rsplit('/').next().unwrap_or(file);
        name.split_once(".ko").is_some_and(|(name, _)| name == module)
    };
    dependencies
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(file, _)| is_module(file))
        .map(|(file, others)| std::iter::once(file).chain(others.split_whitespace()).collect())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_comes_with_its_dependencies() {
        let dep = "kernel/fs/9p/9p.ko: kernel/net/9p/9pnet.ko\nkernel/net/9p/9pnet.ko:\nkernel/x/xz.ko.xz: kernel/y.ko";
        assert_eq!(needed(dep, "9p"), ["kernel/fs/9p/9p.ko", "kernel/net/9p/9pnet.ko"]);
        assert_eq!(needed(dep, "9pnet"), ["kernel/net/9p/9pnet.ko"]);
        assert_eq!(needed(dep, "xz"), ["kernel/x/xz.ko.xz", "kernel/y.ko"]);
        assert!(needed(dep, "virtio_pci").is_empty(), "built in");
    }
}
