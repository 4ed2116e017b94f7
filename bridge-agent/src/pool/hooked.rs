//! Whether the hooks of the pool see the sockets of a process, and the ports that are free to it.

use std::{
    fs,
    net::SocketAddr,
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::Path,
};

use aya_obj::generated::bpf_attach_type;
use bridge_common::pool::{
    bitmap::Memory as _,
    slots::{self, Tables as _},
};

use super::{
    attach,
    backend::Backend,
    client::Transport,
    hooks::{LINKS_PREFIX, POD_LINKS_PREFIX},
    kernel::KernelPoolError,
    service::destination,
    tables::lock,
};
use crate::{
    kernel::bpf,
    model::{PortRange, PortSet},
};

/// The program whose link stands for all of a control group: each other one is attached with it.
const HOOK: &str = "pool_connect4";

/// Whether the kernel runs the hooks of the pool for connects of a control group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hooked {
    /// By those of this control group: itself, or one above.
    By(String),
    /// No.
    No,
}

/// The ports of the pool towards a destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Supply {
    /// The ports that a `connect` may get.
    pub ports: Vec<PortRange>,
    /// Their number.
    pub all: u32,
    /// Of them, those that every network namespace may get.
    pub free: u32,
    /// Of them, those that only the namespace may get that has used them lately.
    pub warm: u32,
}

impl Backend {
    /// Returns the hooks that the kernel runs for connects of a control group, given by its path below the mount.
    ///
    /// # Errors
    /// [`KernelPoolError::Cgroup`]: there is no such group, or its programs cannot be listed.
    pub fn hooked(&self, cgroup: &Path) -> Result<Hooked, KernelPoolError> {
        let Self::Kernel(pool, _) = self else { return Ok(Hooked::No) };
        let pins = lock(pool).pins.clone();
        let mount = attach::mount_point()?;
        let group = attach::open(&mount, cgroup)?;
        let hook = bpf_attach_type::BPF_CGROUP_INET4_CONNECT;
        let running = bpf::cgroup_programs(group.as_fd(), hook)
            .map_err(|source| attach::CgroupError::Read { path: cgroup.to_owned(), source })?;
        for above in cgroup.ancestors() {
            let Ok(directory) = attach::open(&mount, above).and_then(|file| {
                file.metadata().map_err(|source| attach::CgroupError::Read { path: above.to_owned(), source })
            }) else {
                continue;
            };
            let is_running = |prefix: &&str| {
                let pin = pins.join(format!("{prefix}{}", directory.ino())).join(HOOK);
                let program = bpf::obj_get(&pin).and_then(|link| bpf::link_program(link.as_fd()));
                program.is_ok_and(|program| running.contains(&program))
            };
            if [LINKS_PREFIX, POD_LINKS_PREFIX].iter().any(is_running) {
                return Ok(Hooked::By(above.to_string_lossy().into_owned()));
            }
        }
        Ok(Hooked::No)
    }

    /// Returns the ports towards a destination.
    ///
    /// # Errors
    /// [`KernelPoolError`].
    pub fn supply(&self, to: SocketAddr, transport: Transport) -> Result<Supply, KernelPoolError> {
        let destination = destination(to, transport);
        let ports: PortSet = self.layout().template(slots::template(&destination));
        let mut supply = Supply { ports: ports.ranges(), all: ports.len(), free: ports.len(), warm: 0 };
        if let Self::Kernel(pool, _) = self {
            let pool = lock(pool);
            let tables = pool.tables();
            let geometry = pool.layout().geometry();
            let count = |slot: u32| {
                let words = (0..geometry.words).map(|word| tables.load(geometry.free(slot).word(word)));
                words.map(u64::count_ones).sum::<u32>()
            };
            if let Some(slot) = tables.destination_slot(&destination) {
                supply.free = count(slot);
                let owners =
                    tables.owners().map_err(|source| KernelPoolError::Map { name: "POOL_OWNERS", source })?;
                let of_destination = owners.iter().filter(|(owner, _)| owner.slot == slot);
                supply.warm = of_destination.map(|(_, slot)| count(*slot)).sum();
            }
        }
        Ok(supply)
    }
}

/// Whether a control group is one of these, or below one, by their paths.
#[must_use]
pub fn covers<'a>(groups: &'a [String], cgroup: &str) -> Option<&'a String> {
    let cgroup = Path::new("/").join(cgroup.trim_start_matches('/'));
    groups.iter().find(|group| cgroup.starts_with(Path::new("/").join(group.trim_start_matches('/'))))
}

/// The ports that this host gives to clients (`net.ipv4.ip_local_port_range`, for IPv6 as well).
#[must_use]
pub fn ephemeral() -> Option<PortRange> {
    let text = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").ok()?;
    let mut numbers = text.split_whitespace().map(str::parse);
    let (first, last) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
    Some(PortRange { first, last })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_covers_what_is_below_it_and_no_sibling() {
        let groups = ["/kubepods.slice".to_owned(), "/a/b".to_owned()];
        let by = |cgroup| covers(&groups, cgroup).map(String::as_str);
        assert_eq!(by("/kubepods.slice/pod1/x"), Some("/kubepods.slice"));
        assert_eq!(by("/a/b"), Some("/a/b"));
        assert_eq!((by("/kubepods.slice2"), by("/a")), (None, None));
        assert_eq!(covers(&["/".to_owned()], "/any").map(String::as_str), Some("/"));
    }
}
