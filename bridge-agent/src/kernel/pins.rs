//! Pins in a BPF file system, and the lock that keeps a second agent away from them.

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use rustix::fs::FlockOperation;

/// Why a pin root cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Pins can only live in a BPF file system.
    #[error("{} is not in a BPF file system, so nothing can be pinned there: `mount -t bpf bpf {}`, or set another directory with --pin-root", path.display(), mount_point.display())]
    NotBpffs {
        /// Where pins should go.
        path: PathBuf,
        /// Where a BPF file system would help.
        mount_point: PathBuf,
    },
    /// A name that the BPF file system has no place for.
    #[error("the pin directory {} holds a dot, which a BPF file system does not take: choose a name without", .0.display())]
    DotInPath(PathBuf),
    /// Another agent uses the same pins.
    #[error("an agent{} already works on {}: stop that one first, or use another --pin-root", pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default(), path.display())]
    Locked {
        /// The other agent, if it is in a PID namespace that we see.
        pid: Option<u32>,
        /// The pin root.
        path: PathBuf,
    },
    /// An operation on a file or pin failed.
    #[error("{action} {}: {source}", path.display())]
    Path {
        /// The action that failed.
        action: &'static str,
        /// The path of the action.
        path: PathBuf,
        /// Error of the kernel.
        source: io::Error,
    },
}

/// Result of working with pins.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn path(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Path { action, path: path.into(), source }
    }
}

/// The directory above all pins of an agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PinRoot(PathBuf);

/// Held by the one agent that works on a pin root.
#[derive(Debug)]
pub struct Lock {
    directory: File,
}

impl Lock {
    /// Moves the lock to the present root of the pins, which is made if it is missing, unless the lock is held on it
    /// already.
    ///
    /// # Errors
    ///
    /// Those of [`PinRoot::prepare`] and [`PinRoot::lock`]; the lock stays on the former root then.
    pub(crate) fn renew(&mut self, root: &PinRoot) -> Result<()> {
        let place = |of: io::Result<fs::Metadata>| of.map(|of| (of.dev(), of.ino())).ok();
        let held = place(self.directory.metadata());
        if held.is_none() || held != place(fs::metadata(&root.0)) {
            root.prepare()?;
            *self = root.lock()?;
        }
        Ok(())
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing is not enough while a child between fork and exec has the descriptor too.
        if let Err(error) = rustix::fs::flock(&self.directory, FlockOperation::Unlock) {
            tracing::warn!(%error, "the lock on the pins cannot be given back");
        }
    }
}

impl PinRoot {
    /// Pins under `path`.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Makes the root, if it is missing, and refuses any file system but BPF.
    ///
    /// # Errors
    ///
    /// [`Error::NotBpffs`], [`Error::DotInPath`], [`Error::Path`].
    pub fn prepare(&self) -> Result<()> {
        let parent = self.0.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
        let system = rustix::fs::statfs(parent)
            .map_err(|error| Error::path("looking at the file system of", parent)(error.into()))?;
        if system.f_type != libc::BPF_FS_MAGIC {
            let mount_point =
                if self.0.starts_with("/sys/fs/bpf") { Path::new("/sys/fs/bpf") } else { parent }.to_owned();
            return Err(Error::NotBpffs { path: self.0.clone(), mount_point });
        }
        let below = self.0.strip_prefix(parent).unwrap_or(&self.0);
        if below.to_string_lossy().contains('.') {
            return Err(Error::DotInPath(self.0.clone()));
        }
        make_directory(&self.0)
    }

    /// Keeps every other agent away from these pins until the lock is dropped. The lock is on the directory itself, so
    /// that it ends with its holder, however that ends.
    ///
    /// # Errors
    ///
    /// [`Error::Locked`] with the process id of the holder.
    pub fn lock(&self) -> Result<Lock> {
        /// A child between fork and exec has the lock, too, for so long at the most, also of an agent that has been killed.
        const EXEC: Duration = Duration::from_secs(5);
        let end = Instant::now() + EXEC;
        loop {
            let directory = File::open(&self.0).map_err(Error::path("opening", &self.0))?;
            match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    let pid = holder(&directory);
                    if pid.is_some_and(|pid| !is_alive(pid)) && Instant::now() < end {
                        thread::sleep(Duration::from_millis(10));
                        continue;
                    }
                    return Err(Error::Locked { pid, path: self.0.clone() });
                }
                Err(error) => return Err(Error::path("locking", &self.0)(error.into())),
            }
            // The former holder may have removed the directory that we hold now.
            let held = directory.metadata().map_err(Error::path("looking at", &self.0))?.ino();
            match fs::metadata(&self.0) {
                Ok(named) if named.ino() == held => return Ok(Lock { directory }),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => make_directory(&self.0)?,
                Err(error) => return Err(Error::path("looking at", &self.0)(error)),
            }
        }
    }

    /// The agent that holds the lock, if one does and is in a PID namespace that we see.
    #[must_use]
    pub fn holder(&self) -> Option<u32> {
        holder(&File::open(&self.0).ok()?)
    }
}

/// Returns the entries of a directory, in order of name; none if it is missing.
pub(crate) fn entries(directory: &Path) -> Result<Vec<PathBuf>> {
    let read = match fs::read_dir(directory) {
        Ok(read) => read,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::path("reading", directory)(error)),
    };
    let mut paths = read
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<io::Result<Vec<_>>>()
        .map_err(Error::path("reading", directory))?;
    paths.sort();
    Ok(paths)
}

pub(crate) fn make_directory(path: &Path) -> Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(Error::path("making", path))
}

/// Removes a pin; that it is not there is fine.
pub(crate) fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::path("removing", path)(error)),
        _ => Ok(()),
    }
}

/// Removes a directory of pins with all that is in it, and goes on after errors.
pub(crate) fn remove_tree<E: From<Error>>(path: &Path, errors: &mut Vec<E>) {
    remove_tree_except(path, &|_| false, errors);
}

/// As [`remove_tree`], but keeps the entries of the directory that `stays` selects; then the directory stays, too.
pub(crate) fn remove_tree_except<E: From<Error>>(
    path: &Path,
    stays: &dyn Fn(&Path) -> bool,
    errors: &mut Vec<E>,
) {
    let mut empty = true;
    match entries(path) {
        Ok(below) => {
            for path in below {
                if stays(&path) {
                    empty = false;
                } else if path.is_dir() {
                    remove_tree(&path, errors);
                } else if let Err(error) = remove(&path) {
                    errors.push(error.into());
                }
            }
        }
        Err(error) => errors.push(error.into()),
    }
    if !empty {
        return;
    }
    match fs::remove_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            errors.push(Error::path("removing", path)(error).into())
        }
        _ => {}
    }
}

fn is_alive(pid: u32) -> bool {
    let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
    pid.is_some_and(|pid| rustix::process::test_kill_process(pid) != Err(rustix::io::Errno::SRCH))
}

/// Who has the lock on an open directory, from /proc/locks (proc_pid_locks(5)).
fn holder(directory: &File) -> Option<u32> {
    let metadata = directory.metadata().ok()?;
    let (device, inode) = (metadata.dev(), metadata.ino());
    let file = format!("{:02x}:{:02x}:{inode}", rustix::fs::major(device), rustix::fs::minor(device));
    let locks = fs::read_to_string("/proc/locks").ok()?;
    locks.lines().find_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let is_lock = fields.nth(1)? == "FLOCK";
        let pid = fields.nth(2)?.parse().ok()?;
        (is_lock && fields.next()? == file).then_some(pid)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_outside_of_a_bpf_file_system_is_refused_with_the_command_that_mounts_one() {
        let directory = tempfile::tempdir().unwrap();
        let error = PinRoot::new(directory.path().join("bridge")).prepare().unwrap_err();
        assert!(matches!(error, Error::NotBpffs { .. }));
        assert!(
            error.to_string().contains(&format!("mount -t bpf bpf {}", directory.path().display())),
            "{error}"
        );
    }

    #[test]
    fn a_second_lock_is_refused_and_names_the_holder() {
        let directory = tempfile::tempdir().unwrap();
        let pins = PinRoot::new(directory.path());
        let lock = pins.lock().unwrap();
        let error = pins.lock().unwrap_err();
        assert!(
            matches!(error, Error::Locked { pid: Some(pid), .. } if pid == std::process::id()),
            "{error}"
        );
        drop(lock);
        pins.lock().unwrap();
    }
}
