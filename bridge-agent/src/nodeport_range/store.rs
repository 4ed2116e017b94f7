//! Replacing a manifest that kubelet watches.
//!
//! kubelet starts a pod for every file in its manifest directory whose name does not begin with a dot
//! (`sourceFile.extractFromDir`, pkg/kubelet/config/file.go). So the backup goes into another directory, else it would
//! run as a second kube-apiserver and fight the first one for its name and port; and the new text is written to a name
//! that begins with a dot, and comes into place whole.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use super::Error;
use crate::kernel::{
    clock,
    files::{self, Ownership},
};

/// Reads a manifest.
///
/// # Errors
/// [`Error::File`].
pub fn read(path: &Path) -> Result<String, Error> {
    fs::read_to_string(path).map_err(|source| {
        let remedy = match source.kind() {
            io::ErrorKind::NotFound => {
                "name the manifest with --manifest; it is on the nodes of the control plane"
            }
            io::ErrorKind::InvalidData => "save the file as UTF-8",
            _ => "run as root",
        };
        Error::File { action: "read", path: path.to_owned(), source, remedy }
    })
}

/// The directory for backups where none is named: beside the one that kubelet watches, on the same file system.
#[must_use]
pub fn backup_directory(manifest: &Path) -> PathBuf {
    let watched = manifest.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    watched.join("../bridge-backup")
}

/// Writes `new` in the place of `old`, of which it leaves a copy in `backups`; answers where.
///
/// # Errors
/// [`Error::File`], [`Error::Manifest`]; the manifest is unchanged, or as another program has changed it meanwhile.
pub fn replace(
    manifest: &Path,
    old: &str,
    new: &str,
    backups: &Path,
    since_epoch: Duration,
) -> Result<PathBuf, Error> {
    let file = |action, path: &Path, remedy| {
        let path = path.to_owned();
        move |source| Error::File { action, path, source, remedy }
    };
    let name = manifest.file_name().unwrap_or_default().to_string_lossy().into_owned();
    // Through a symbolic link: its target is replaced, not the link.
    let target = manifest.canonicalize().map_err(file("find", manifest, "check the path"))?;
    let elsewhere = "name a directory that can be written with --backup-dir";
    fs::create_dir_all(backups).map_err(file("make", backups, elsewhere))?;
    let backups = backups.canonicalize().map_err(file("find", backups, elsewhere))?;
    for watched in
        [manifest.parent().and_then(|parent| parent.canonicalize().ok()), target.parent().map(Into::into)]
    {
        if watched.is_some_and(|watched| watched == backups) {
            return Err(Error::Manifest {
                path: backups,
                problem:
                    "kubelet watches this directory, and would run the backup as a second kube-apiserver"
                        .into(),
                remedy: "name another directory with --backup-dir",
            });
        }
    }
    let metadata = target.metadata().map_err(file("read", &target, "run as root"))?;
    let stamp: String = clock::rfc3339(since_epoch).chars().filter(|c| c.is_ascii_alphanumeric()).collect();
    let backup = backups.join(format!("{name}.{stamp}"));
    write(&backup, old, &metadata).map_err(file("write", &backup, elsewhere))?;
    if read(&target)? != old {
        return Err(Error::Manifest {
            path: target,
            problem: "another program has changed it just now".into(),
            remedy: "look at it, and try again",
        });
    }
    let hint = "run as root, on a file system that can be written";
    write(&target, new, &metadata).map_err(file("write", &target, hint))?;
    Ok(backup)
}

fn write(path: &Path, text: &str, like: &fs::Metadata) -> io::Result<()> {
    files::replace(path, Ownership::Like(like), text.as_bytes())
}
