//! The aarch64 binary on Debian's arm64 kernel, in emulation: it loads, attaches, and judges traffic.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context, Result, bail, ensure};

use super::{Architecture, Dist, debian::unpack};
use crate::{
    cmd,
    setup::{self, Program, cache, program},
    vm,
};

/// First program of the machine: makes two stations, starts the agent, and compares connections with its rule.
const INIT: &str = include_str!("arm64-init.sh");
const META_PACKAGE: &str = "linux-image-arm64";
/// Modules that the machine loads.
const MODULES: [&str; 5] = ["veth", "sch_ingress", "cls_bpf", "nf_conntrack", "nf_conntrack_netlink"];
/// In seconds; the machine takes a minute.
const LIMIT: &str = "600";

const PROGRAMS: [Program; 2] = [
    program("qemu-system-aarch64", "qemu-system-arm", "runs Debian's arm64 kernel"),
    program("busybox", "busybox-static", "packs the machine's first file system"),
];

/// Starts the machine and reads its result.
pub(super) fn test(dist: &Dist) -> Result<()> {
    ensure!(dist.architectures.contains(&Architecture::Aarch64), "the aarch64 binary was not built");
    setup::programs(&PROGRAMS)?;
    let system = fetch()?;
    let kernel = entry(&system.join("boot"), "vmlinuz-")?;
    let initramfs = write_initramfs(dist, &system)?;
    let mut machine = cmd::command("timeout");
    machine.args([
        LIMIT,
        "qemu-system-aarch64",
        "-machine",
        "virt",
        "-cpu",
        "max,pauth=off",
        "-accel",
        "tcg",
    ]);
    machine.args(["-m", "1024", "-nographic", "-no-reboot", "-nodefaults", "-serial", "stdio", "-kernel"]);
    machine.arg(&kernel).arg("-initrd").arg(&initramfs);
    machine.args(["-append", "console=ttyAMA0 loglevel=3 panic=-1"]).stdin(Stdio::null());
    let output = machine.output().with_context(|| cmd::show(&machine))?;
    let text = String::from_utf8_lossy(&output.stdout);
    match text.lines().find_map(|line| line.trim_end().strip_prefix("RESULT ")) {
        Some(result) if result.starts_with("ok ") => println!("{result}"),
        _ => bail!("{}\n{text}{}", output.status, String::from_utf8_lossy(&output.stderr)),
    }
    Ok(())
}

/// Fetches and unpacks Debian's arm64 kernel and busybox, unless that was done before; nothing is installed.
fn fetch() -> Result<PathBuf> {
    let root = cache()?.join("kernels/arm64");
    if root.exists() {
        return Ok(root);
    }
    eprintln!(
        "setup: fetching {META_PACKAGE} and busybox-static for arm64: the aarch64 binary is tested on them"
    );
    unpack(Architecture::Aarch64, &[META_PACKAGE, "busybox-static"], &root)?;
    let modules = entry(&root.join("lib/modules"), "")?;
    let release = modules.file_name().context("a kernel without a release")?;
    cmd::run(cmd::command("busybox").arg("depmod").arg("-b").arg(&root).arg(release))?;
    Ok(root)
}

/// Returns the entry of `folder` whose name begins with `beginning`.
fn entry(folder: &Path, beginning: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let found = entries.flatten().find(|entry| entry.file_name().to_string_lossy().starts_with(beginning));
    Ok(found.with_context(|| format!("{} has no {beginning}", folder.display()))?.path())
}

/// Writes the only file system of the machine: busybox, the agent, and the modules.
fn write_initramfs(dist: &Dist, system: &Path) -> Result<PathBuf> {
    let root = dist.work.join("arm64");
    drop(fs::remove_dir_all(&root));
    for folder in ["bin", "dev", "etc/bridge", "proc", "run", "sys", "tmp", "var/lib"] {
        fs::create_dir_all(root.join(folder))?;
    }
    fs::copy(system.join("bin/busybox"), root.join("bin/busybox"))?;
    fs::copy(dist.binary(Architecture::Aarch64), root.join("bin/bridge-agent"))?;
    fs::write(root.join("init"), INIT)?;
    fs::set_permissions(root.join("init"), fs::Permissions::from_mode(0o755))?;
    let modules = entry(&system.join("lib/modules"), "")?;
    let release = modules.file_name().context("a kernel without a release")?;
    let target = root.join("lib/modules").join(release);
    let dependencies = fs::read_to_string(modules.join("modules.dep"))?;
    let needed = MODULES.iter().flat_map(|module| vm::needed(&dependencies, module));
    for file in needed.chain(["modules.order", "modules.builtin", "modules.builtin.modinfo"]) {
        let to = target.join(file);
        fs::create_dir_all(to.parent().context("a module lies in a folder")?)?;
        fs::copy(modules.join(file), to).with_context(|| file.to_owned())?;
    }
    cmd::run(cmd::command("busybox").arg("depmod").arg("-b").arg(&root).arg(release))?;
    let archive = dist.work.join("arm64.initramfs");
    let mut pack = cmd::command("sh");
    pack.args(["-ec", "find . | busybox cpio -o -H newc 2>/dev/null | gzip -1 >\"$1\"", "sh"]).arg(&archive);
    cmd::run(pack.current_dir(&root))?;
    Ok(archive)
}
