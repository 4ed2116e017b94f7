//! Control groups (version 2) and where they are.

use std::{
    collections::HashSet,
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

/// Why a control group cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file that was read.
        path: PathBuf,
        /// Error of the kernel.
        source: io::Error,
    },
    #[error(
        "no cgroup2 file system is mounted, so no program can be hooked; mount one: mkdir -p /sys/fs/cgroup/unified && \
         mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified"
    )]
    NotMounted,
    #[error("there is no control group {path}: {source}; see the directories below {mount}")]
    Missing {
        /// The directory.
        path: PathBuf,
        /// Where the hierarchy is mounted.
        mount: PathBuf,
        /// Error of the kernel.
        source: io::Error,
    },
}

/// Where the cgroup2 hierarchy is mounted, from `/proc/self/mountinfo`; works on hybrid systems too, where it is beside
/// version 1.
///
/// # Errors
/// [`CgroupError`].
pub fn mount_point() -> Result<PathBuf, CgroupError> {
    let path = Path::new("/proc/self/mountinfo");
    let table = fs::read_to_string(path).map_err(|source| CgroupError::Read { path: path.into(), source })?;
    find_mount(&table).ok_or(CgroupError::NotMounted)
}

/// The control group `path`, below the mount.
///
/// # Errors
/// [`CgroupError::Missing`].
pub fn open(mount: &Path, path: &Path) -> Result<fs::File, CgroupError> {
    let path = mount.join(path.strip_prefix("/").unwrap_or(path));
    let open = |path: &Path| {
        let file = fs::File::open(path)?;
        if file.metadata()?.is_dir() { Ok(file) } else { Err(io::Error::from(io::ErrorKind::NotADirectory)) }
    };
    open(&path).map_err(|source| CgroupError::Missing { path, mount: mount.into(), source })
}

/// The ids of all control groups, as hooks see them; `None` if not the whole hierarchy is to be seen.
pub(super) fn ids(mount: &Path) -> Option<HashSet<u64>> {
    /// Of the root of the hierarchy.
    const ROOT: u64 = 1;
    let mut ids = HashSet::new();
    let mut left = vec![mount.to_owned()];
    while let Some(directory) = left.pop() {
        let entries = match fs::metadata(&directory).and_then(|found| Ok((found, fs::read_dir(&directory)?)))
        {
            Ok((found, entries)) => {
                ids.insert(found.ino());
                entries
            }
            // It has just been removed.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV)) => continue,
            Err(_) => return None,
        };
        let directories = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        left.extend(directories.map(|entry| entry.path()));
    }
    ids.contains(&ROOT).then_some(ids)
}

/// The directories in `directory` whose names begin with `prefix`; none if it cannot be read.
pub(super) fn entries(directory: &Path, prefix: &'static str) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let begins =
        move |entry: &fs::DirEntry| entry.file_name().to_str().is_some_and(|name| name.starts_with(prefix));
    entries.filter(begins).map(|entry| entry.path())
}

/// The first cgroup2 mount that shows the whole hierarchy, else the first one (proc_pid_mountinfo(5)).
///
/// The root is seen from the reader's cgroup namespace (`cgroup_show_path`, kernel/cgroup/cgroup.c). In a container
/// with a namespace of its own `/` is the container's group, and the whole hierarchy, mounted from the host, is
/// `/../..`.
fn find_mount(table: &str) -> Option<PathBuf> {
    let mounts = table.lines().filter_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        if right.split(' ').next()? != "cgroup2" {
            return None;
        }
        let mut fields = left.split(' ').skip(3);
        Some((fields.next()?, PathBuf::from(unescape(fields.next()?))))
    });
    let mounts: Vec<_> = mounts.collect();
    let above = mounts
        .iter()
        .find(|(root, _)| root.starts_with("/..") && root[1..].split('/').all(|part| part == ".."));
    above.or(mounts.iter().find(|(root, _)| *root == "/")).or(mounts.first()).map(|(_, mount)| mount.clone())
}

/// Undoes the octal escapes of the mount table.
fn unescape(text: &str) -> String {
    ["\\040", "\\011", "\\012", "\\134"]
        .iter()
        .zip([" ", "\t", "\n", "\\"])
        .fold(text.to_owned(), |text, (escape, plain)| text.replace(escape, plain))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ids_of_groups_are_those_of_their_directories_below_the_root() {
        let part = tempfile::tempdir().unwrap();
        assert_eq!(ids(part.path()), None, "not the root of a hierarchy");
        let Ok(mount) = mount_point() else { return };
        if let Some(found) = ids(&mount) {
            let own = fs::read_to_string("/proc/self/cgroup").unwrap();
            let own = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap();
            assert!(found.contains(&fs::metadata(mount.join(own)).unwrap().ino()));
        }
    }

    #[test]
    fn a_hybrid_hierarchy_is_found_beside_version_1() {
        let table = "\
            25 1 0:22 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro\n\
            26 25 0:23 / /sys/fs/cgroup/systemd rw shared:9 - cgroup cgroup rw,name=systemd\n\
            27 25 0:24 / /sys/fs/cgroup/unified rw shared:10 - cgroup2 cgroup2 rw\n";
        assert_eq!(find_mount(table), Some("/sys/fs/cgroup/unified".into()));
    }

    #[test]
    fn in_a_container_the_hierarchy_of_the_host_comes_before_its_own() {
        let table = "\
            60 50 0:38 / /sys/fs/cgroup ro - cgroup2 cgroup rw\n\
            61 50 0:38 /../../other /part rw - cgroup2 cgroup2 rw\n\
            62 50 0:38 /../.. /host/sys/fs/cgroup ro - cgroup2 cgroup2 rw\n";
        assert_eq!(find_mount(table), Some("/host/sys/fs/cgroup".into()));
    }

    #[test]
    fn a_mount_of_a_part_of_the_hierarchy_comes_second() {
        let table = "\
            30 1 0:24 /kubepods /mnt/part rw - cgroup2 cgroup2 rw\n\
            31 1 0:24 / /mnt/all\\040of\\040it rw - cgroup2 cgroup2 rw\n";
        assert_eq!(find_mount(table), Some("/mnt/all of it".into()));
        assert_eq!(find_mount("30 1 0:24 /x /mnt/part rw - cgroup2 cgroup2 rw\n"), Some("/mnt/part".into()));
        assert_eq!(find_mount("1 1 0:1 / / rw - ext4 /dev/vda rw\n"), None);
    }
}
