//! Who a process is: its command, its control group, its pod, its network namespace.

use std::{
    fs,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io,
    os::{
        fd::{AsFd, AsRawFd as _},
        unix::{fs::MetadataExt as _, net::UnixDatagram},
    },
    path::Path,
    sync::OnceLock,
};

use schemars::JsonSchema;
use serde::Serialize;

use super::attach;

/// Facts about a process from `/proc`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Owner {
    /// Process id in the agent's namespace.
    pub pid: u32,
    /// User id.
    pub uid: u32,
    /// Name of the program.
    pub command: String,
    /// Path of its control group (version 2) below the mount.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<String>,
    /// UID of its pod, if it runs in one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
}

impl Owner {
    /// Returns a number that stands for the pod or the control group: the id that the hooks see, if the group is found below
    /// the mount. 0: neither is known.
    #[must_use]
    pub fn group(&self) -> u64 {
        let Some(cgroup) = &self.cgroup else { return 0 };
        let directory = attach::mount_point().map(|mount| mount.join(cgroup.trim_start_matches('/')));
        let id = directory.ok().and_then(|directory| fs::metadata(directory).ok());
        id.map_or_else(
            || {
                let mut hasher = DefaultHasher::new();
                self.pod.as_ref().unwrap_or(cgroup).hash(&mut hasher);
                hasher.finish() >> 1
            },
            |metadata| metadata.ino(),
        )
    }

    /// Returns the facts about a process by its id; fields stay empty if the process has ended.
    #[must_use]
    pub fn of(pid: u32, uid: u32, command: Option<String>) -> Self {
        let proc = Path::new("/proc").join(pid.to_string());
        let read = |name: &str| fs::read_to_string(proc.join(name)).ok();
        let command =
            command.or_else(|| read("comm").map(|comm| printable(comm.trim_end()))).unwrap_or_default();
        let cgroup = cgroup(pid);
        let pod = cgroup.as_deref().and_then(pod_of);
        Self { pid, uid, command, cgroup, pod }
    }
}

/// Replaces characters that a terminal acts on.
pub(super) fn printable(text: &str) -> String {
    text.replace(char::is_control, "?")
}

/// Returns the path of the control group (version 2) of a process below the mount.
pub(crate) fn cgroup(pid: u32) -> Option<String> {
    let table = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    cgroup_of(&table).map(str::to_owned)
}

/// The version 2 line of `/proc/PID/cgroup`.
fn cgroup_of(table: &str) -> Option<&str> {
    table.lines().find_map(|line| line.strip_prefix("0::"))
}

/// The pod's UID in the name of its control group, as both of kubelet's drivers write it (`pod<uid>`,
/// `kubepods-besteffort-pod<uid with _>.slice`).
pub(crate) fn pod_of(cgroup: &str) -> Option<String> {
    cgroup.split('/').rev().find_map(|part| {
        let part = part.strip_suffix(".slice").unwrap_or(part);
        let at = part.rfind("pod")?;
        let uid = part[at + 3..].replace('_', "-");
        let shape: Vec<usize> = uid.split('-').map(str::len).collect();
        let hex = uid.chars().all(|c| c == '-' || c.is_ascii_hexdigit());
        (hex && (shape == [8, 4, 4, 4, 12] || shape == [32])).then_some(uid)
    })
}

/// `SO_NETNS_COOKIE` (Linux 5.14) of a socket. For one that `accept` has made from a connection to a unix socket it is that
/// of the client: its end is made in the client's network namespace (`unix_stream_connect`, net/unix/af_unix.c).
///
/// # Errors
/// The kernel is too old.
pub fn netns_cookie(socket: impl AsFd) -> io::Result<u64> {
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let mut cookie = 0_u64;
    let mut length: libc::socklen_t = 8;
    // SAFETY: the kernel writes at most `length` bytes to a u64.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

/// [`netns_cookie`] of this process, if the kernel has it.
pub fn own_netns() -> Option<u64> {
    static OWN: OnceLock<Option<u64>> = OnceLock::new();
    *OWN.get_or_init(|| UnixDatagram::unbound().and_then(netns_cookie).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pod_is_read_from_the_control_group_of_either_driver() {
        let uid = "1f0c3e9a-7a2b-4c5d-8e9f-0a1b2c3d4e5f";
        let systemd = "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1f0c3e9a_7a2b_4c5d_8e9f_0a1b2c3d4e5f.slice/cri-containerd-abc.scope";
        assert_eq!(pod_of(systemd).as_deref(), Some(uid));
        assert_eq!(pod_of(&format!("/kubepods/burstable/pod{uid}/0123abcd")).as_deref(), Some(uid));
        assert_eq!(pod_of("/kubepods.slice/podman-1234.scope"), None);
        assert_eq!(pod_of("/user.slice/user-0.slice"), None);
    }

    #[test]
    fn the_version_2_line_is_the_one_with_number_0() {
        assert_eq!(cgroup_of("12:pids:/x\n1:name=systemd:/y\n0::/z\n"), Some("/z"));
        assert_eq!(cgroup_of("12:pids:/x\n"), None);
    }
}
