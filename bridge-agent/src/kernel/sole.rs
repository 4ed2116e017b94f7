//! A claim that one process at a time has in a network namespace.

use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

use rustix::net::sockopt::socket_peercred;
use rustix::process::{Uid, geteuid};

/// The claim; it ends with this value, or with the process.
#[derive(Debug)]
pub struct Sole {
    _listener: Option<UnixListener>,
}

/// Why there is no claim.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A process with the same rights has it.
    #[error("process {0} has it")]
    Taken(i32),
    /// Of the kernel.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl Sole {
    /// Claims `name` in the network namespace of this thread. An unprivileged process that has taken the name does not count.
    ///
    /// # Errors
    /// [`Error::Taken`], and those of socket(2).
    pub fn claim(name: &str) -> Result<Self, Error> {
        // Names of this kind are apart for each network namespace, and go with the socket.
        let address = SocketAddr::from_abstract_name(name)?;
        match UnixListener::bind_addr(&address) {
            Ok(listener) => Ok(Self { _listener: Some(listener) }),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                let Ok(there) = UnixStream::connect_addr(&address) else {
                    // It does not listen, or no more connections wait: no agent.
                    return Ok(Self { _listener: None });
                };
                let owner = socket_peercred(&there).map_err(io::Error::from)?;
                if owner.uid == Uid::ROOT || owner.uid == geteuid() {
                    return Err(Error::Taken(owner.pid.as_raw_nonzero().get()));
                }
                tracing::warn!(
                    name,
                    uid = owner.uid.as_raw(),
                    "an unprivileged process has the name of a lock of bridge"
                );
                Ok(Self { _listener: None })
            }
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_has_it_and_then_another() {
        let name = format!("bridge-test-{}", std::process::id());
        let first = Sole::claim(&name).unwrap();
        assert!(
            matches!(Sole::claim(&name), Err(Error::Taken(pid)) if pid == std::process::id().cast_signed())
        );
        drop(first);
        Sole::claim(&name).unwrap();
    }
}
