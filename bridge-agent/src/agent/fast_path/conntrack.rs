//! Conntrack beside the fast path.
//!
//! Conntrack follows the sequence numbers of a TCP connection. Packets that bypass it leave its window behind, and
//! later packets are invalid to it, which most packet filters deny. And data whose acknowledgement bypassed it counts
//! as unacknowledged, so that it forgets the connection after minutes of silence instead of days. The kernel's own flow
//! tables notify it of both for each connection that they forward; from outside the kernel this is possible only for
//! all connections together.

use std::{fs, io};

use crate::kernel::sysctl;

/// 0: segments out of window are invalid.
const BE_LIBERAL: &str = "netfilter/nf_conntrack_tcp_be_liberal";
/// Lifetime of idle connections, in seconds.
const ESTABLISHED: &str = "netfilter/nf_conntrack_tcp_timeout_established";
/// Lifetime of idle connections with unacknowledged data, in seconds.
const UNACKNOWLEDGED: &str = "netfilter/nf_conntrack_tcp_timeout_unacknowledged";

/// Whether TCP may pass conntrack by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tracking {
    /// There is none.
    Absent,
    /// It minds neither windows nor acknowledgements.
    Liberal,
    /// It does.
    Strict,
}

impl Tracking {
    /// Of the network namespace of this process.
    pub(super) fn read() -> io::Result<Self> {
        let liberal = match read(BE_LIBERAL) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::Absent),
            value => value?.trim() != "0",
        };
        let patient = seconds(UNACKNOWLEDGED)? >= seconds(ESTABLISHED)?;
        Ok(if liberal && patient { Self::Liberal } else { Self::Strict })
    }

    /// Makes it liberal.
    pub(super) fn relax() -> io::Result<()> {
        let (established, unacknowledged) = (seconds(ESTABLISHED)?, seconds(UNACKNOWLEDGED)?);
        if unacknowledged < established {
            sysctl::write_net(UNACKNOWLEDGED, &established.to_string())?;
        }
        sysctl::write_net(BE_LIBERAL, "1")
    }

    /// Returns the reason that keeps TCP from the fast path.
    pub(super) fn remark(error: Option<&io::Error>) -> String {
        let why = error.map(|error| format!(" ({error})")).unwrap_or_default();
        format!(
            "TCP takes no fast path: conntrack would take it for out of window, or forget it too soon, and that cannot be \
             changed from here{why}; set net.netfilter.nf_conntrack_tcp_be_liberal=1 and \
             net.netfilter.nf_conntrack_tcp_timeout_unacknowledged to no less than nf_conntrack_tcp_timeout_established \
             with sysctl(8), then reload"
        )
    }
}

fn read(name: &str) -> io::Result<String> {
    fs::read_to_string(format!("/proc/sys/net/{name}"))
}

fn seconds(name: &str) -> io::Result<u64> {
    read(name)?.trim().parse().map_err(io::Error::other)
}
