//! Removes the traces of a lab: at its end, and for labs whose owner was killed.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, kill_process};

use super::id::LabId;
use super::netns::NAMES;
use super::process;
use crate::wait::eventually;

/// Where labs keep sockets, configuration and logs, one directory each.
const RUNTIME: &str = "/run/bridge-lab";
/// Where labs pin eBPF objects, one directory each.
const BPFFS: &str = "/sys/fs/bpf";
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

/// Where control groups are mounted: version 2, and each controller of version 1.
pub(crate) fn cgroup_hierarchies() -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let is_cgroup = |line: &&str| matches!(line.split(' ').nth(2), Some("cgroup" | "cgroup2"));
    mounts.lines().filter(is_cgroup).filter_map(|line| Some(line.split(' ').nth(1)?.into())).collect()
}

/// Where cgroup v2 is mounted; `None` if it is not.
pub(super) fn cgroup_root() -> Option<PathBuf> {
    cgroup_hierarchies().into_iter().find(|root| root.join("cgroup.controllers").exists())
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
    let folders = [NAMES, RUNTIME, BPFFS].into_iter().map(PathBuf::from).chain(cgroup_hierarchies());
    folders.flat_map(|folder| names(&folder)).filter_map(|name| LabId::of(&name)).collect()
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
    let of_lab = |path: &PathBuf| path.file_name()?.to_str().and_then(LabId::of);
    let in_hierarchy = |root: PathBuf| names(&root).into_iter().map(move |name| root.join(name));
    let cgroups = cgroup_hierarchies().into_iter().flat_map(in_hierarchy);
    let cgroups: Vec<_> = cgroups.filter(|path| of_lab(path) == Some(lab)).collect();
    // Containers of a cluster have an environment of their own: their control group names their owner.
    for directory in &cgroups {
        kill_members(directory);
    }
    for name in names(Path::new(NAMES)).into_iter().filter(|name| LabId::of(name) == Some(lab)) {
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
    for directory in cgroups {
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

/// Kills every process in a control group and in those below it.
fn kill_members(directory: &Path) {
    for child in names(directory).into_iter().map(|name| directory.join(name)).filter(|path| path.is_dir()) {
        kill_members(&child);
    }
    let members = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
    for member in members.lines().filter_map(|line| Pid::from_raw(line.parse().ok()?)) {
        // It may have ended since.
        let _ = kill_process(member, Signal::KILL);
    }
}

/// Names in a directory; none if it cannot be read.
fn names(directory: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect()
}
