//! A process as a client of the pool: its control group, and the addresses that it connects from.

use std::{
    collections::BTreeSet,
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
};

use super::owner::Owner;

/// Why a process cannot be examined.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// See the text.
    #[error("there is no process {0}: write its number, as `pgrep -a NAME` shows it")]
    Gone(u32),
    /// See the text.
    #[error("/proc/{pid} cannot be read: {source}; run the command as root")]
    Read {
        /// Id of the process.
        pid: u32,
        /// Error of the kernel.
        source: io::Error,
    },
    /// See the text.
    #[error(
        "process {0} has no control group of version 2 here, so no hook can see it: mount cgroup2, or run the command on the \
         host of the process"
    )]
    NoGroup(u32),
}

/// A process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Its id.
    pub pid: u32,
    /// Name of its program.
    pub command: String,
    /// Path of its control group (version 2) below the mount.
    pub cgroup: String,
    /// Addresses of its network namespace, without those of the loopback and of one link.
    pub addresses: BTreeSet<IpAddr>,
    /// Whether its network namespace is that of this process.
    pub is_here: bool,
}

impl Process {
    /// Examines a process.
    ///
    /// # Errors
    /// [`ProcessError`].
    pub fn of(pid: u32) -> Result<Self, ProcessError> {
        let proc = Path::new("/proc").join(pid.to_string());
        match fs::metadata(&proc) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(ProcessError::Gone(pid)),
            Err(source) => return Err(ProcessError::Read { pid, source }),
            Ok(_) => {}
        }
        let owner = Owner::of(pid, 0, None);
        let cgroup = owner.cgroup.ok_or(ProcessError::NoGroup(pid))?;
        let read = |name: &str| fs::read_to_string(proc.join(name)).unwrap_or_default();
        let mut addresses = of_trie(&read("net/fib_trie"));
        addresses.extend(of_if_inet6(&read("net/if_inet6")));
        let netns = |path: &Path| fs::read_link(path.join("ns/net")).ok();
        let is_here = netns(&proc).is_some_and(|other| netns(Path::new("/proc/self")) == Some(other));
        Ok(Self { pid, command: owner.command, cgroup, addresses, is_here })
    }
}

/// Reads the local addresses of `/proc/PID/net/fib_trie`.
fn of_trie(trie: &str) -> BTreeSet<IpAddr> {
    let mut found = BTreeSet::new();
    let mut last = None;
    for line in trie.lines().map(str::trim) {
        if let Some(address) = line.strip_prefix("|-- ") {
            last = address.parse::<Ipv4Addr>().ok();
        } else if line.starts_with("/32 host LOCAL") {
            found.extend(last.filter(|address| !address.is_loopback()).map(IpAddr::V4));
        }
    }
    found
}

/// Reads the global addresses of `/proc/PID/net/if_inet6`: address, index, prefix length, scope, flags and name.
fn of_if_inet6(table: &str) -> BTreeSet<IpAddr> {
    const GLOBAL: &str = "00";
    let address = |line: &str| {
        let mut words = line.split_whitespace();
        let bits = u128::from_str_radix(words.next()?, 16).ok()?;
        (words.nth(2)? == GLOBAL).then(|| IpAddr::V6(Ipv6Addr::from_bits(bits)))
    };
    table.lines().filter_map(address).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_the_kernel_writes_them() {
        let trie = "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 0.0.0.0\n        /0 universe UNICAST\n     |-- 10.200.1.0\n        /24 \
                    link UNICAST\nLocal:\n     |-- 10.200.1.91\n        /32 host LOCAL\n     |-- 10.200.1.255\n        /32 link \
                    BROADCAST\n           |-- 127.0.0.1\n              /32 host LOCAL\n";
        assert_eq!(of_trie(trie), BTreeSet::from([IpAddr::from([10, 200, 1, 91])]));
        let table = "fd200001000000000000000000000091 02 40 00 80     eth0\nfe80000000000000000000fffe000001 02 40 20 80 eth0\n\
                     00000000000000000000000000000001 01 80 10 80       lo\n";
        assert_eq!(of_if_inet6(table), BTreeSet::from(["fd20:1::91".parse::<IpAddr>().unwrap()]));
    }

    #[test]
    fn a_process_that_has_ended_is_named() {
        let error = Process::of(u32::MAX).unwrap_err().to_string();
        assert!(error.contains("there is no process") && error.contains("pgrep"), "{error}");
    }
}
