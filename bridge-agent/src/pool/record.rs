//! The record of the ports that the agent has added to `net.ipv4.ip_local_reserved_ports`.
//!
//! An agent that starts again needs it: without it, its own ports count as those of another program, and none is left for
//! the pool. A damaged record costs a warning at most.

use std::{fs, io, path::Path};

use tracing::warn;

use crate::{
    kernel::files::{self, MAX_SMALL, Ownership, read_regular_text},
    model::{PortRange, PortSet},
};

/// Name of the file.
pub(crate) const NAME: &str = "pool-reserved-ports";

/// A record that can be read.
#[derive(Debug, PartialEq, Eq)]
struct Record {
    ports: PortSet,
    /// Whether its line has an end. Versions before 0.2 wrote none, in a file that could be truncated.
    complete: bool,
}

/// Replaces the record in one step.
pub(super) fn write(path: &Path, ports: &PortSet) -> io::Result<()> {
    if fs::symlink_metadata(path).is_ok_and(|found| found.is_dir()) {
        // No rename replaces a directory.
        fs::remove_dir_all(path)?;
    }
    files::replace(path, Ownership::Private, format!("{ports}\n").as_bytes())
}

/// Returns the recorded ports; `None` if there is no record.
///
/// # Errors
/// The record is damaged.
pub(super) fn ports(path: &Path) -> io::Result<Option<PortSet>> {
    Ok(read(path)?.map(|record| record.ports))
}

/// Returns the ports in `reserved`, the content of the sysctl, that the agent has reserved itself. If the record is damaged,
/// and every port of the pool is reserved (`pool`: those that it would have without the sysctl), these are its own.
pub(super) fn own(path: &Path, reserved: &PortSet, pool: &PortSet) -> PortSet {
    let (known, fault) = match read(path) {
        Ok(None) => return PortSet::default(),
        Ok(Some(Record { ports, complete })) => {
            (ports, (!complete).then(|| "it may be truncated".to_owned()))
        }
        Err(error) => (PortSet::default(), Some(error.to_string())),
    };
    let Some(fault) = fault else { return known };
    let mut lost = pool.clone();
    lost.remove_all(&known);
    let mut free = lost.clone();
    free.remove_all(reserved);
    let is_tail = known.iter().next_back() < lost.iter().next();
    let file = path.display();
    if !lost.is_empty() && free.is_empty() && is_tail {
        warn!(
            %file,
            fault,
            "the record of reserved ports is damaged: the agent takes all ports of the pool that are in \
             net.ipv4.ip_local_reserved_ports for its own"
        );
        return known.ranges().into_iter().chain(lost.ranges()).collect();
    }
    if known.is_empty() {
        warn!(
            %file,
            fault,
            "the record of reserved ports is damaged: ports in net.ipv4.ip_local_reserved_ports count as reserved by others"
        );
    }
    known
}

fn read(path: &Path) -> io::Result<Option<Record>> {
    let text = match read_regular_text(path, MAX_SMALL) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        text => text?,
    };
    let ports = text.trim_end().split(',').map(range).collect::<Option<PortSet>>();
    let ports = ports.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "it is no list of ports"))?;
    Ok(Some(Record { ports, complete: text.ends_with('\n') }))
}

fn range(text: &str) -> Option<PortRange> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (first.parse().ok()?, last.parse().ok()?);
    (first <= last).then_some(PortRange { first, last })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(ranges: &[(u16, u16)]) -> PortSet {
        ranges.iter().map(|&(first, last)| PortRange { first, last }).collect()
    }

    #[test]
    fn a_damaged_record_costs_no_port_of_the_pool() {
        use rustix::fs::{CWD, FileType, Mode, mknodat};
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(NAME);
        let (pool, reserved) = (set(&[(61001, 61100)]), set(&[(8080, 8080), (61001, 61100)]));
        let of = |content: &str| {
            fs::write(&path, content).unwrap();
            own(&path, &reserved, &pool)
        };
        assert_eq!(own(&path, &reserved, &pool), PortSet::default(), "no record: others have reserved them");
        for damaged in ["", "\n", "61001-", "61001-611", "61001", "{}", "\0\0\0\0", "61001-99999\n"] {
            assert_eq!(of(damaged), pool, "{damaged:?}");
        }
        fs::write(&path, b"\xff\xfe").unwrap();
        assert_eq!(own(&path, &reserved, &pool), pool);
        let replaced = |make: &dyn Fn()| {
            fs::remove_file(&path).unwrap();
            make();
            assert_eq!(own(&path, &reserved, &pool), pool);
            write(&path, &pool).unwrap();
            assert_eq!(ports(&path).unwrap(), Some(pool.clone()));
        };
        replaced(&|| fs::create_dir(&path).unwrap());
        replaced(&|| mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap());
        replaced(&|| std::os::unix::fs::symlink("/dev/zero", &path).unwrap());
    }

    #[test]
    fn ports_that_others_have_reserved_stay_theirs() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(NAME);
        let (pool, own_ports) = (set(&[(61001, 61100)]), set(&[(61001, 61049), (61051, 61100)]));
        let reserved = pool.clone();
        write(&path, &own_ports).unwrap();
        assert_eq!(own(&path, &reserved, &pool), own_ports);
        // As versions before 0.2 wrote it.
        fs::write(&path, own_ports.to_string()).unwrap();
        assert_eq!(own(&path, &reserved, &pool), own_ports);
        // Not all of the pool is reserved: the agent has not reserved it, or not lately.
        fs::write(&path, "").unwrap();
        assert_eq!(own(&path, &set(&[(61001, 61049)]), &pool), PortSet::default());
        assert!(ports(&path).is_err());
    }
}
