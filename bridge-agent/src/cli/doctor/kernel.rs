//! eBPF, file systems and capabilities.

use std::{fs, path::Path};

use aya_obj::generated::bpf_attach_type;
use rustix::thread::{CapabilitySet, capabilities};

use super::{
    context::{Context, read},
    finding::Finding,
};
use crate::{kernel::bpf, pool::attach};

/// `BPF_FS_MAGIC` (linux/magic.h).
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;
/// Index of the loopback interface in every network namespace.
const LOOPBACK: u32 = 1;
/// The oldest kernel that bridge is tested on.
const FLOOR: (u32, u32) = (6, 1);

pub(super) fn check(context: &Context<'_>) -> Vec<Finding> {
    vec![
        version(&rustix::system::uname().release().to_string_lossy()),
        btf(Path::new("/sys/kernel/btf/vmlinux")),
        jit("/proc/sys/net/core/bpf_jit_enable"),
        hooks(),
        bpffs(&context.global.pin_root),
        cgroup2(context),
        capability(),
        lockdown("/sys/kernel/security/lockdown"),
    ]
}

fn version(release: &str) -> Finding {
    const CHECK: &str = "kernel.version";
    let mut numbers = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version < FLOOR {
        let remedy = "bridge is tested on Linux 6.1 or later: update the kernel, or see docs/kernels.md";
        return Finding::warn(CHECK, format!("Linux {release}"), remedy);
    }
    Finding::ok(CHECK, format!("Linux {release}"))
}

fn btf(file: &Path) -> Finding {
    const CHECK: &str = "kernel.btf";
    match fs::metadata(file) {
        Ok(found) if found.len() > 0 => {
            Finding::ok(CHECK, format!("{} has {} bytes", file.display(), found.len()))
        }
        _ => Finding::fail(
            CHECK,
            format!("there is no {}", file.display()),
            "no eBPF program can be loaded: install a kernel with CONFIG_DEBUG_INFO_BTF=y, and mount sysfs",
        ),
    }
}

fn jit(file: &str) -> Finding {
    const CHECK: &str = "kernel.jit";
    match read(file).as_deref() {
        Some("0") => Finding::warn(
            CHECK,
            "net.core.bpf_jit_enable is 0",
            "each packet is interpreted, several times slower: sysctl -w net.core.bpf_jit_enable=1",
        ),
        Some(value) => Finding::ok(CHECK, format!("net.core.bpf_jit_enable is {value}")),
        None => {
            Finding::not_run(CHECK, "net.core.bpf_jit_enable is shown in the first network namespace only")
        }
    }
}

fn hooks() -> Finding {
    const CHECK: &str = "kernel.hooks";
    match bpf::tcx_programs(LOOPBACK, bpf_attach_type::BPF_TCX_INGRESS) {
        Ok(_) => Finding::ok(CHECK, "TCX"),
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
            Finding::not_run(CHECK, "bpf(2) needs CAP_NET_ADMIN and CAP_BPF: run as root")
        }
        Err(_) => Finding::ok(CHECK, "clsact: this kernel has no TCX (Linux 6.6)"),
    }
}

fn bpffs(pin_root: &Path) -> Finding {
    const CHECK: &str = "kernel.bpffs";
    let existing = pin_root.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    match rustix::fs::statfs(existing) {
        Ok(found) if found.f_type == BPF_FS_MAGIC => {
            Finding::ok(CHECK, format!("{} is on a BPF file system", pin_root.display()))
        }
        _ => Finding::fail(
            CHECK,
            format!("{} is not on a BPF file system", pin_root.display()),
            "enforcement could not outlive the agent: mount -t bpf bpf /sys/fs/bpf, or choose another --pin-root",
        ),
    }
}

fn cgroup2(context: &Context<'_>) -> Finding {
    const CHECK: &str = "kernel.cgroup2";
    let needed = context.config.as_ref().is_some_and(|config| config.port_pool.is_some());
    match attach::mount_point() {
        Ok(mount) => Finding::ok(CHECK, format!("mounted on {}", mount.display())),
        Err(error) if needed => Finding::fail(
            CHECK,
            "no cgroup2 file system is mounted, and portPool needs one",
            error.to_string(),
        ),
        Err(_) => Finding::ok(CHECK, "not mounted; only a port pool needs it"),
    }
}

fn capability() -> Finding {
    const CHECK: &str = "kernel.capabilities";
    let needed = [
        ("CAP_BPF", CapabilitySet::BPF),
        ("CAP_PERFMON", CapabilitySet::PERFMON),
        ("CAP_NET_ADMIN", CapabilitySet::NET_ADMIN),
        ("CAP_NET_RAW", CapabilitySet::NET_RAW),
    ];
    let Ok(sets) = capabilities(None) else {
        return Finding::not_run(CHECK, "capget(2) failed");
    };
    let missing: Vec<&str> =
        needed.iter().filter(|(_, bit)| !sets.effective.contains(*bit)).map(|(name, _)| *name).collect();
    if missing.is_empty() {
        return Finding::ok(CHECK, needed.map(|(name, _)| name).join(", "));
    }
    Finding::fail(
        CHECK,
        format!("missing: {}", missing.join(", ")),
        "the agent could not load its programs: run as root, or add these to the unit or the container",
    )
}

fn lockdown(file: &str) -> Finding {
    const CHECK: &str = "kernel.lockdown";
    match read(file) {
        Some(modes) if modes.contains("[confidentiality]") => Finding::fail(
            CHECK,
            modes,
            "this mode forbids eBPF to read kernel memory: boot with lockdown=integrity, or without it",
        ),
        Some(modes) => Finding::ok(CHECK, modes),
        None => Finding::not_run(CHECK, format!("{file} is not there: securityfs or the LSM is missing")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::Outcome;

    #[test]
    fn a_kernel_without_btf_fails() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(btf(&directory.path().join("vmlinux")).outcome, Outcome::Fail);
    }

    #[test]
    fn an_old_kernel_is_named() {
        assert_eq!(version("5.15.0-91-generic").outcome, Outcome::Warn);
        assert_eq!(version("6.1.0-18-amd64").outcome, Outcome::Ok);
    }

    /// Both settings are of the whole machine, so the file that a kernel would show stands for it.
    #[test]
    fn a_kernel_without_jit_is_named_and_one_in_lockdown_fails() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("value");
        let path = file.to_str().unwrap();
        let with = |text: &str, check: fn(&str) -> Finding| {
            fs::write(&file, text).unwrap();
            check(path).outcome
        };
        assert_eq!((with("0\n", jit), with("1\n", jit)), (Outcome::Warn, Outcome::Ok));
        assert_eq!(with("none integrity [confidentiality]\n", lockdown), Outcome::Fail);
        assert_eq!(with("none [integrity] confidentiality\n", lockdown), Outcome::Ok);
        assert_eq!(lockdown("/nonexistent").outcome, Outcome::NotRun);
    }
}
