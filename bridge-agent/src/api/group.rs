//! The group of the socket, by the name service: /etc/group, LDAP, or whatever nsswitch.conf(5) names.

use std::{io, process::Command, time::Duration};

use crate::kernel::program;

/// A directory that does not answer is given up after this time.
const LIMIT: Duration = Duration::from_secs(10);

/// The number of a group, given by name or number. `None`: there is no such group.
pub(super) fn id(group: &str) -> io::Result<Option<u32>> {
    if let Ok(number) = group.parse() {
        return Ok(Some(number));
    }
    // getgrnam(3): these errors too say that there is no such group.
    match nix::unistd::Group::from_name(group) {
        Ok(Some(found)) => Ok(Some(found.gid.as_raw())),
        Ok(None) | Err(nix::Error::ENOENT | nix::Error::ESRCH | nix::Error::EBADF | nix::Error::EPERM) => {
            by_getent(group)
        }
        Err(error) => Err(error.into()),
    }
}

/// Asks the C library of the system: that of a static program reads /etc/group alone.
fn by_getent(group: &str) -> io::Result<Option<u32>> {
    let mut command = Command::new("getent");
    command.args(["--", "group", group]);
    let output = match program::run(command, None, LIMIT) {
        Ok(output) => output,
        Err(program::Error::Run(error)) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io::Error::other(error)),
    };
    let number = String::from_utf8_lossy(&output.stdout).split(':').nth(2).and_then(|id| id.parse().ok());
    match output.status.code() {
        Some(0) => number.map(Some).ok_or_else(|| io::ErrorKind::InvalidData.into()),
        // getent(1): the key is not in the database.
        Some(2) => Ok(None),
        _ => Err(io::Error::other(format!("getent: {}", output.status))),
    }
}
