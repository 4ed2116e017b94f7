//! Files that are replaced in one step: a reader finds the former content or the new one, also after a crash. And files
//! that others write: they are read only if they are regular files, and up to a limit.

use std::{
    ffi::OsStr,
    fs::{self, File, Metadata, OpenOptions, Permissions},
    io::{self, BufWriter, Read, Write},
    os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown},
    path::Path,
};

/// Limit of the configuration file and of the files that it names for routes. A million rules take about 150 MB.
pub(crate) const MAX_CONFIGURATION: u64 = 512 * 1024 * 1024;
/// Limit of keys, tokens, certificates, a kubeconfig and small records of the state.
pub(crate) const MAX_SMALL: u64 = 1024 * 1024;

/// Reads a file that others may write. Refuses a FIFO, a device, a socket and a directory: such a read could block for
/// ever or never end. Refuses a file of more than `limit` bytes.
///
/// # Errors
/// As for reading; see [`is_refusal`] for the others.
pub(crate) fn read_regular(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    // Before it is opened: that alone has effects on some devices.
    check(path, limit)?;
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
    let metadata = file.metadata()?;
    check_metadata(&metadata, limit)?;
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(usize::try_from(metadata.len()).unwrap_or_default().saturating_add(1))?;
    // It may grow meanwhile, and the size of a file of /proc is 0.
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit { Err(too_large(limit)) } else { Ok(bytes) }
}

/// As [`read_regular`], for a file in UTF-8.
pub(crate) fn read_regular_text(path: &Path, limit: u64) -> io::Result<String> {
    String::from_utf8(read_regular(path, limit)?)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.utf8_error()))
}

/// Refuses the same files as [`read_regular`], without reading them: for a file that another library reads next.
pub(crate) fn check(path: &Path, limit: u64) -> io::Result<()> {
    check_metadata(&fs::metadata(path)?, limit)
}

/// Whether [`read_regular`] has refused a file for its type or size.
pub(crate) fn is_refusal(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::IsADirectory | io::ErrorKind::Unsupported | io::ErrorKind::FileTooLarge
    )
}

fn too_large(limit: u64) -> io::Error {
    io::Error::new(io::ErrorKind::FileTooLarge, format!("it is larger than {limit} bytes"))
}

fn check_metadata(metadata: &Metadata, limit: u64) -> io::Result<()> {
    let found = metadata.file_type();
    let name = match () {
        () if found.is_file() && metadata.len() > limit => return Err(too_large(limit)),
        () if found.is_file() => return Ok(()),
        () if found.is_dir() => "a directory",
        () if found.is_fifo() => "a FIFO",
        () if found.is_socket() => "a socket",
        () => "a device",
    };
    let kind = if found.is_dir() { io::ErrorKind::IsADirectory } else { io::ErrorKind::Unsupported };
    Err(io::Error::new(kind, format!("it is {name}, not a regular file")))
}

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
    fn only_a_regular_file_of_limited_size_is_read() {
        use rustix::fs::{CWD, FileType, Mode, mknodat};
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        fs::write(path("file"), "12345").unwrap();
        std::os::unix::fs::symlink("file", path("link")).unwrap();
        assert_eq!(read_regular(&path("file"), 5).unwrap(), b"12345");
        assert_eq!(read_regular_text(&path("link"), 5).unwrap(), "12345");
        mknodat(CWD, path("fifo"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        std::os::unix::fs::symlink("/dev/zero", path("zero")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
        File::create(path("sparse")).unwrap().set_len(1 << 40).unwrap();
        for (name, text) in [
            ("fifo", "it is a FIFO, not a regular file"),
            ("zero", "it is a device, not a regular file"),
            ("socket", "it is a socket, not a regular file"),
            (".", "it is a directory, not a regular file"),
            ("sparse", "it is larger than 4 bytes"),
            ("file", "it is larger than 4 bytes"),
        ] {
            let error = read_regular(&path(name), 4).unwrap_err();
            assert!(is_refusal(&error), "{name}: {error:?}");
            assert_eq!(error.to_string(), text);
        }
        assert!(!is_refusal(&read_regular(&path("missing"), 4).unwrap_err()));
        // The size of a file of /proc is 0, whatever it holds.
        assert!(!read_regular(Path::new("/proc/self/status"), 1 << 20).unwrap().is_empty());
        assert!(is_refusal(&read_regular(Path::new("/proc/self/status"), 4).unwrap_err()));
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
