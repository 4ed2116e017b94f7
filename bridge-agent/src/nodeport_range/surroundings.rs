//! Reads the uses of ports on this node.

use std::{fs, path::Path};

use super::{Error, conflicts::Surroundings, listeners};
use crate::{
    config::{self, PortPool},
    model::{PortRange, parse_ephemeral, parse_ranges},
};

/// Looks at this node, with the pool of a configuration.
///
/// # Errors
/// [`Error::File`]: something cannot be read. Nothing is taken for free then.
pub fn look(pool: Option<&PortPool>, own_port: Option<u16>, range: PortRange) -> Result<Surroundings, Error> {
    let read = |path: &'static str| {
        fs::read_to_string(path).map_err(|source| Error::File {
            action: "read",
            path: path.into(),
            source,
            remedy: "run this on the node, where /proc is mounted",
        })
    };
    let ephemeral = parse_ephemeral(&read("/proc/sys/net/ipv4/ip_local_port_range")?);
    let reserved = parse_ranges(&read("/proc/sys/net/ipv4/ip_local_reserved_ports")?);
    let listeners = listeners::read(|port| range.contains(port)).map_err(|source| Error::File {
        action: "list the sockets in",
        path: "/proc/net".into(),
        source,
        remedy: "run this on the node, where /proc is mounted",
    })?;
    let pool = pool.map(PortPool::available).unwrap_or_default();
    Ok(Surroundings { pool, ephemeral, reserved, listeners, own_port })
}

/// The agent's configuration; `None` if there is none where one need not be.
///
/// # Errors
/// [`Error::Syntax`]: the configuration is not valid, so the ports of the pool are unknown.
pub fn configuration(path: &Path, optional: bool) -> Result<Option<config::Config>, Error> {
    if optional && !path.exists() {
        return Ok(None);
    }
    Ok(Some(config::load(path)?.config))
}
