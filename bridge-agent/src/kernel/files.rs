//! Files that are replaced in one step: a reader finds the former content or the new one, also after a crash.

use std::{
    ffi::OsStr,
    fs::{self, File, Metadata, Permissions},
    io::{self, BufWriter, Write},
    os::unix::fs::{MetadataExt, PermissionsExt, fchown},
    path::Path,
};

/// Owner and permissions of a new file.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Ownership<'a> {
    /// The agent's own, and readable by it alone.
    Private,
    /// Those of another file, often of the one that is replaced.
    Like(&'a Metadata),
}

/// Replaces a file. Its directory is created if it does not exist.
pub(crate) fn replace(path: &Path, ownership: Ownership<'_>, content: &[u8]) -> io::Result<()> {
    replace_with(path, ownership, |file| file.write_all(content))
}

/// Replaces a file with the content that `write` writes.
pub(crate) fn replace_with(
    path: &Path,
    ownership: Ownership<'_>,
    write: impl FnOnce(&mut BufWriter<&File>) -> io::Result<()>,
) -> io::Result<()> {
    let directory = match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => return Err(io::ErrorKind::InvalidInput.into()),
    };
    fs::create_dir_all(directory)?;
    let mut prefix = OsStr::new(".").to_owned();
    prefix.push(path.file_name().ok_or(io::ErrorKind::InvalidInput)?);
    prefix.push(".bridge-new-");
    remove_leftovers(directory, &prefix);
    // Created with mode 0600.
    let new = tempfile::Builder::new().prefix(&prefix).tempfile_in(directory)?;
    let mut writer = BufWriter::new(new.as_file());
    write(&mut writer)?;
    writer.flush()?;
    drop(writer);
    if let Ownership::Like(like) = ownership {
        // Before the permissions: chown(2) clears set-user-ID. Only root may give files away.
        match fchown(new.as_file(), Some(like.uid()), Some(like.gid())) {
            Err(error) if error.kind() != io::ErrorKind::PermissionDenied => return Err(error),
            _ => {}
        }
        new.as_file().set_permissions(Permissions::from_mode(like.mode() & 0o7777))?;
    }
    new.as_file().sync_all()?;
    new.persist(path).map_err(|error| error.error)?;
    sync_directory(directory);
    Ok(())
}

/// Removes temporary files that a killed process has left. A process that writes the same file at the same time gets an
/// error from its rename, never a mixture.
fn remove_leftovers(directory: &Path, prefix: &OsStr) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        if entry.file_name().as_encoded_bytes().starts_with(prefix.as_encoded_bytes()) {
            drop(fs::remove_file(entry.path()));
        }
    }
}

/// Makes renames in a directory durable, where its file system can.
pub(crate) fn sync_directory(directory: &Path) {
    if let Ok(directory) = File::open(directory) {
        drop(directory.sync_all());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_with_the_permissions_of_another_and_without_leftovers() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new/folder/file");
        replace(&path, Ownership::Private, b"1").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        // As a killed process leaves it.
        fs::write(path.with_file_name(".file.bridge-new-x"), "half").unwrap();
        let like = fs::metadata(&path).unwrap();
        replace(&path, Ownership::Like(&like), b"2").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"2");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o644);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn a_failed_write_leaves_the_former_content() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        replace(&path, Ownership::Private, b"1").unwrap();
        let failed = replace_with(&path, Ownership::Private, |file| {
            file.write_all(b"2")?;
            Err(io::ErrorKind::StorageFull.into())
        });
        assert_eq!(failed.unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert_eq!(fs::read(&path).unwrap(), b"1");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
