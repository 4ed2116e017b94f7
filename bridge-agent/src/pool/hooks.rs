//! The programs of the pool, and the control groups that they are attached to.

use std::{
    collections::{BTreeMap, HashSet},
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use aya::programs::{
    CgroupAttachMode, Program,
    links::{FdLink, LinkError},
};

use super::{
    KernelPool,
    attach::{self, CgroupError},
    error::KernelPoolError,
    pins,
    programs::PROGRAMS,
};

/// Prefix of the control groups of `bridge-agent exec`; directly below the mount.
pub const EXEC_PREFIX: &str = "bridge-exec-";

/// Prefix of the directories of pinned links.
pub(super) const LINKS_PREFIX: &str = "cgroup-";

/// As [`LINKS_PREFIX`], for control groups of pods that take part because they say so.
pub(super) const POD_LINKS_PREFIX: &str = "pod-";

/// Result of [`KernelPool::set_pods`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hooked {
    /// Pods that are hooked now.
    pub hooked: usize,
    /// Of them, those that were not before, or by an earlier agent.
    pub added: usize,
    /// Hooks that were taken away; those of a group that is gone included.
    pub removed: usize,
    /// The failures.
    pub failures: Vec<String>,
}

impl KernelPool {
    /// Hooks a control group, given by its path below `mount`, and pins the links: the hooks stay when the agent ends.
    ///
    /// Hooks of an earlier agent are replaced without a gap: for a moment both are there, and the second one finds the
    /// port already claimed.
    ///
    /// # Errors
    /// [`KernelPoolError`].
    pub fn attach(&mut self, mount: &Path, cgroup: &Path) -> Result<(), KernelPoolError> {
        let group = attach::open(mount, cgroup)?;
        let directory = self.links(LINKS_PREFIX, &group)?;
        self.attach_and_pin(&group, &directory)
    }

    fn attach_and_pin(&mut self, group: &fs::File, directory: &Path) -> Result<(), KernelPoolError> {
        pins::make_directory(directory)?;
        self.kept.keep_directory(directory);
        for name in PROGRAMS {
            let link = self.attach_one(name, group)?;
            let (path, next) = (directory.join(name), directory.join(format!("{name}_next")));
            let _ = fs::remove_file(&next);
            link.pin(&next)
                .map_err(|error| KernelPoolError::Link { path: next.clone(), reason: error.to_string() })?;
            fs::rename(&next, &path)
                .map_err(|error| KernelPoolError::Link { path: path.clone(), reason: error.to_string() })?;
            self.keep_pinned(path)?;
        }
        Ok(())
    }

    /// Hooks these control groups of pods, by UID, and no other pods'. A group that cannot be hooked does not affect
    /// the others; one that has vanished meanwhile is no failure.
    pub fn set_pods(&mut self, groups: &BTreeMap<String, PathBuf>) -> Hooked {
        let mut done = Hooked::default();
        let mut wanted = HashSet::new();
        for (uid, path) in groups {
            match self.hook_pod(path) {
                Ok((links, new)) => {
                    done.added += usize::from(new);
                    wanted.insert(links);
                }
                Err(_) if !path.exists() => {}
                Err(error) => done.failures.push(format!("pod {uid}: {error}")),
            }
        }
        for links in attach::entries(&self.pins, POD_LINKS_PREFIX).filter(|links| !wanted.contains(links)) {
            self.kept.release_all(&links);
            match fs::remove_dir_all(&links) {
                Ok(()) => done.removed += 1,
                Err(error) => done.failures.push(format!("{}: {error}", links.display())),
            }
        }
        done.hooked = wanted.len();
        self.pods = wanted;
        done
    }

    /// Hooks a pod's control group, unless this agent has done so already; answers whether it had not.
    fn hook_pod(&mut self, path: &Path) -> Result<(PathBuf, bool), KernelPoolError> {
        let group = attach::open(path, Path::new(""))?;
        let links = self.links(POD_LINKS_PREFIX, &group)?;
        let new = !self.pods.contains(&links);
        if new {
            self.attach_and_pin(&group, &links)?;
        }
        Ok((links, new))
    }

    /// Hooks these control groups, and no others; those of `bridge-agent exec` and of pods stay as they are.
    ///
    /// # Errors
    /// [`KernelPoolError`]; if a group is missing, before anything was changed.
    pub fn set_cgroups(&mut self, cgroups: &[PathBuf]) -> Result<(), KernelPoolError> {
        let mount = match attach::mount_point() {
            Err(CgroupError::NotMounted) if cgroups.is_empty() => return Ok(()),
            mount => mount?,
        };
        let of_exec = attach::entries(&mount, EXEC_PREFIX).filter_map(|path| fs::File::open(path).ok());
        let links = |group: &fs::File| self.links(LINKS_PREFIX, group);
        let mut wanted = of_exec.map(|group| links(&group)).collect::<Result<HashSet<_>, _>>()?;
        for cgroup in cgroups {
            wanted.insert(links(&attach::open(&mount, cgroup)?)?);
        }
        for cgroup in cgroups {
            self.attach(&mount, cgroup)?;
        }
        for links in attach::entries(&self.pins, LINKS_PREFIX).filter(|links| !wanted.contains(links)) {
            self.kept.release_all(&links);
            fs::remove_dir_all(&links)
                .map_err(|error| KernelPoolError::Link { path: links, reason: error.to_string() })?;
        }
        Ok(())
    }

    /// bpffs takes no dots in names, so a group goes by the number of its directory, which is also its id.
    fn links(&self, prefix: &str, group: &fs::File) -> Result<PathBuf, KernelPoolError> {
        let id =
            group.metadata().map_err(|source| CgroupError::Read { path: "cgroup".into(), source })?.ino();
        Ok(self.pins.join(format!("{prefix}{id}")))
    }

    fn attach_one(&mut self, name: &'static str, group: &fs::File) -> Result<FdLink, KernelPoolError> {
        let error = |source| KernelPoolError::Program { name, source };
        let pin = |error: LinkError| KernelPoolError::Link { path: name.into(), reason: error.to_string() };
        // A link is always one among several, and takes no flag that says so.
        let mode = CgroupAttachMode::Single;
        match self.ebpf.program_mut(name).ok_or(KernelPoolError::Missing(name))? {
            Program::CgroupSockAddr(program) => {
                let id = program.attach(group, mode).map_err(error)?;
                program.take_link(id).map_err(error)?.try_into().map_err(pin)
            }
            Program::CgroupSock(program) => {
                let id = program.attach(group, mode).map_err(error)?;
                program.take_link(id).map_err(error)?.try_into().map_err(pin)
            }
            Program::SockOps(program) => {
                let id = program.attach(group, mode).map_err(error)?;
                program.take_link(id).map_err(error)?.try_into().map_err(pin)
            }
            _ => Err(KernelPoolError::Missing(name)),
        }
    }
}
