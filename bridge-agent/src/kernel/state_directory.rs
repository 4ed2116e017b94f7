//! The directory in which the agent keeps state across restarts. Only the agent's user may write there; in particular it is
//! not the directory of the socket, which pods mount.
//!
//! ```text
//! /var/lib/bridge/kubernetes.json        the cluster as last known: enforced after a reboot until the API server answers
//! /var/lib/bridge/boot-ID/               state of this boot: a trial, reserved ports, discovered pods
//! ```

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

/// Default path, for an agent with the default socket.
pub const DEFAULT: &str = "/var/lib/bridge";
/// Prefix of a directory that belongs to one boot.
const BOOT: &str = "boot-";

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateDirectory(PathBuf);

/// A state directory that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot use the state directory {}: {source}; choose another one with --state-dir, and in a container mount a \
     directory of the host there", path.display()
)]
pub struct UnusableState {
    path: PathBuf,
    source: io::Error,
}

impl StateDirectory {
    /// The directory at `path`.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// The default directory of the agent with this socket. A second agent of a host has a socket of its own, and with it a
    /// directory of its own.
    #[must_use]
    pub fn of_socket(socket: &Path, default_socket: &Path) -> Self {
        if socket == default_socket {
            return Self::new(DEFAULT);
        }
        let name = socket.to_string_lossy().trim_start_matches('/').replace('/', "-");
        Self(Path::new(DEFAULT).join("sockets").join(name))
    }

    /// For state that survives a reboot.
    #[must_use]
    pub fn lasting(&self) -> &Path {
        &self.0
    }

    /// For state of this boot.
    #[must_use]
    pub fn boot(&self) -> PathBuf {
        let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        self.0.join(format!("{BOOT}{}", id.trim()))
    }

    /// Creates the directory, refuses one that other users may write to, and removes the state of earlier boots.
    ///
    /// # Errors
    /// [`UnusableState`].
    pub fn prepare(&self) -> Result<(), UnusableState> {
        let failed = |source| UnusableState { path: self.0.clone(), source };
        let boot = self.boot();
        DirBuilder::new().recursive(true).mode(0o700).create(&boot).map_err(failed)?;
        for directory in [&self.0, &boot] {
            check(&fs::symlink_metadata(directory).map_err(failed)?).map_err(failed)?;
        }
        for entry in fs::read_dir(&self.0).map_err(failed)?.flatten() {
            let of_a_boot = entry.file_name().to_string_lossy().starts_with(BOOT);
            if of_a_boot && entry.path() != boot {
                // A leftover takes a little space and is not read.
                drop(fs::remove_dir_all(entry.path()));
            }
        }
        Ok(())
    }
}

/// Opens a file of the state for reading. Refuses a link, and a file that another user may have written.
///
/// # Errors
/// As for opening; `PermissionDenied` for a file that another user may have written.
pub fn open(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
    check(&file.metadata()?)?;
    Ok(file)
}

/// Refuses a file or directory that another user may have written.
fn check(found: &fs::Metadata) -> io::Result<()> {
    let own = rustix::process::geteuid().as_raw();
    let refuse = |reason: String| Err(io::Error::new(io::ErrorKind::PermissionDenied, reason));
    if !found.is_dir() && !found.is_file() {
        return refuse("it is neither a file nor a directory".to_owned());
    }
    if found.uid() != own && found.uid() != 0 {
        return refuse(format!("user {} owns it", found.uid()));
    }
    if found.mode() & 0o022 != 0 {
        return refuse(format!("other users may write to it (mode {:o})", found.mode() & 0o7777));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    #[test]
    fn state_of_earlier_boots_is_removed_and_lasting_state_stays() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDirectory::new(folder.path().join("bridge"));
        state.prepare().unwrap();
        assert_eq!(fs::metadata(state.lasting()).unwrap().mode() & 0o777, 0o700);
        let earlier = state.lasting().join("boot-0");
        fs::create_dir(&earlier).unwrap();
        fs::write(state.lasting().join("kubernetes.json"), "{}").unwrap();
        fs::write(state.boot().join("trial.json"), "{}").unwrap();
        state.prepare().unwrap();
        assert!(!earlier.exists());
        assert!(state.lasting().join("kubernetes.json").exists() && state.boot().join("trial.json").exists());
    }

    #[test]
    fn state_that_another_user_may_have_written_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("kubernetes.json");
        fs::write(&file, "{}").unwrap();
        open(&file).unwrap();
        for mode in [0o620, 0o602, 0o666] {
            fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(open(&file).unwrap_err().kind(), io::ErrorKind::PermissionDenied, "{mode:o}");
        }
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        symlink(&file, folder.path().join("link")).unwrap();
        open(&folder.path().join("link")).unwrap_err();
        let shared = StateDirectory::new(folder.path().join("shared"));
        shared.prepare().unwrap();
        fs::set_permissions(shared.lasting(), fs::Permissions::from_mode(0o777)).unwrap();
        let error = shared.prepare().unwrap_err().to_string();
        assert!(error.contains("--state-dir") && error.contains("777"), "{error}");
    }

    #[test]
    fn each_socket_has_a_directory_of_its_own() {
        let default = Path::new("/run/bridge/agent.sock");
        let of = |socket: &str| StateDirectory::of_socket(Path::new(socket), default).lasting().to_owned();
        assert_eq!(of("/run/bridge/agent.sock"), Path::new("/var/lib/bridge"));
        assert_eq!(of("/run/b/agent.sock"), Path::new("/var/lib/bridge/sockets/run-b-agent.sock"));
    }
}
