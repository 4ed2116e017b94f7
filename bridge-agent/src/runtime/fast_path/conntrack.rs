//! Conntrack beside the fast path.
//!
//! Conntrack follows the sequence numbers of a TCP connection. Those that pass by it leave its window behind, and what it
//! sees of the connection later is invalid to it, which most packet filters deny. The kernel's own flow tables tell it not
//! to look at the window of the connections that they forward; from outside the kernel that can be said for all
//! connections only: `net.netfilter.nf_conntrack_tcp_be_liberal`.

use std::{fs, io};

const BE_LIBERAL: &str = "/proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal";

/// Whether TCP may pass conntrack by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::runtime) enum Tracking {
    /// There is none.
    Absent,
    /// It does not look at windows.
    Liberal,
    /// It does.
    Strict,
}

impl Tracking {
    /// Of the network namespace of this process.
    pub(in crate::runtime) fn read() -> io::Result<Self> {
        match fs::read_to_string(BE_LIBERAL) {
            Ok(value) if value.trim() == "0" => Ok(Self::Strict),
            Ok(_) => Ok(Self::Liberal),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::Absent),
            Err(error) => Err(error),
        }
    }

    /// Makes it liberal.
    pub(in crate::runtime) fn relax() -> io::Result<()> {
        fs::write(BE_LIBERAL, "1")
    }

    /// What TCP is kept from the fast path by.
    pub(in crate::runtime) fn remark(error: Option<&io::Error>) -> String {
        let why = error.map(|error| format!(" ({error})")).unwrap_or_default();
        format!(
            "TCP takes no fast path: conntrack would take it for out of window, and that cannot be changed from here{why}; \
             set net.netfilter.nf_conntrack_tcp_be_liberal=1 with sysctl(8), then reload"
        )
    }
}
