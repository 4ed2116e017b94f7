//! Removes the traces of a lab: at its end, and for labs whose owner was killed.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};

use super::id::LabId;
use super::netns::NAMES;
use super::process;
use crate::wait::eventually;

/// Where labs keep sockets, configuration and logs, one directory each.
const RUNTIME: &str = "/run/bridge-lab";
/// Where labs pin eBPF objects, one directory each.
const BPFFS: &str = "/sys/fs/bpf";
/// Where cgroup v2 may be mounted: alone, or beside version 1.
const CGROUPS: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];
/// How long a killed process may take to be gone.
const DYING: Duration = Duration::from_secs(5);

/// The directory for sockets, configuration and logs of a lab.
pub(super) fn runtime_directory(lab: LabId) -> PathBuf {
    Path::new(RUNTIME).join(lab.to_string())
}

/// The directory for pinned eBPF objects of a lab.
pub(super) fn pin_directory(lab: LabId) -> PathBuf {
    Path::new(BPFFS).join(lab.to_string())
}

/// Where cgroup v2 is mounted; `None` if it is not.
pub(super) fn cgroup_root() -> Option<&'static Path> {
    CGROUPS.iter().map(Path::new).find(|root| root.join("cgroup.controllers").exists())
}

/// Removes the leftovers of labs whose owners are dead, and returns their names. Failures to remove are in the errors;
/// the rest is removed all the same.
pub fn clean() -> (Vec<LabId>, Vec<String>) {
    let gone: Vec<_> = all().into_iter().filter(|lab| !lab.owner_lives()).collect();
    let errors = gone.iter().flat_map(|lab| remove(*lab)).collect();
    (gone, errors)
}

/// Removes every lab of this process, which has to end at once; failures to remove are in the errors.
pub fn remove_own() -> Vec<String> {
    all().into_iter().filter(|lab| lab.is_own()).flat_map(remove).collect()
}

/// Every lab of which there is a trace.
pub fn all() -> BTreeSet<LabId> {
    [NAMES, RUNTIME, BPFFS].into_iter().chain(CGROUPS).flat_map(names).filter_map(|n| LabId::of(&n)).collect()
}

/// Removes every trace of a lab, its processes first; goes on after errors and returns them.
pub(super) fn remove(lab: LabId) -> Vec<String> {
    let mut errors = Vec::new();
    let mut note = |path: &Path, result: io::Result<()>| match result {
        Err(e) if e.kind() != io::ErrorKind::NotFound => errors.push(format!("{}: {e}", path.display())),
        _ => {}
    };
    let running = process::kill_all(lab, DYING);
    if running > 0 {
        note(Path::new("processes"), Err(io::Error::other(format!("{running} could not be killed"))));
    }
    for name in names(NAMES).into_iter().filter(|name| LabId::of(name) == Some(lab)) {
        let path = Path::new(NAMES).join(name);
        // EINVAL: killed between making the name and mounting the namespace on it.
        match unmount(&path, UnmountFlags::DETACH) {
            Ok(()) | Err(Errno::INVAL) => note(&path, fs::remove_file(&path)),
            Err(e) => note(&path, Err(e.into())),
        }
    }
    for directory in [runtime_directory(lab), pin_directory(lab)] {
        note(&directory, fs::remove_dir_all(&directory));
    }
    let cgroups =
        CGROUPS.iter().flat_map(|root| names(root).into_iter().map(|name| Path::new(root).join(name)));
    let of_lab = |path: &PathBuf| path.file_name()?.to_str().and_then(LabId::of);
    for directory in cgroups.filter(|path| of_lab(path) == Some(lab)) {
        note(&directory, remove_cgroup(&directory));
    }
    errors
}

/// A cgroup's files cannot be unlinked: its directories are removed from the leaves up, each as soon as the kernel has
/// released its last process.
fn remove_cgroup(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_cgroup(&entry.path())?;
        }
    }
    let busy = |result: &io::Result<()>| matches!(result, Err(e) if e.kind() == io::ErrorKind::ResourceBusy);
    eventually(DYING, || Some(fs::remove_dir(directory)).filter(|result| !busy(result)))
        .unwrap_or_else(|| fs::remove_dir(directory))
}

/// Names in a directory; none if it cannot be read.
fn names(directory: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect()
}
