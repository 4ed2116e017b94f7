//! Writes sysctls of the network namespace, on a host and in a container.

use std::{fs, io};

/// Sysctls of the network namespace of this process.
const NET: &str = "/proc/sys/net/";
/// The same files, mounted from the host. A container runtime makes /proc/sys read-only, but not this mount. The namespace
/// that a file below /proc/sys/net belongs to depends on the process that opens it (`net_ctl_header_lookup`,
/// net/sysctl_net.c).
const NET_OF_HOST: &str = "/host/proc/sys/net/";

/// Writes a sysctl of the network, such as `ipv4/ip_forward`; through /host/proc/sys/net if /proc/sys is read-only.
///
/// # Errors
/// The kernel refuses the value, or both places are read-only or missing. Returns the error of the first place.
pub(crate) fn write_net(name: &str, value: &str) -> io::Result<()> {
    match fs::write(format!("{NET}{name}"), value) {
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => {
            fs::write(format!("{NET_OF_HOST}{name}"), value).map_err(|second| match second.kind() {
                // Not mounted.
                io::ErrorKind::NotFound | io::ErrorKind::ReadOnlyFilesystem => error,
                _ => second,
            })
        }
        result => result,
    }
}
