//! Enters connections that were open before into the flow tables.

use std::io;

use crate::{
    conntrack,
    datapath::{self, Maps},
    policy::Tables,
};

/// Takes over the connections that conntrack knows. Without them, they would be cut; that is no reason not to
/// enforce.
pub(super) fn seed(maps: &Maps, tables: &Tables) -> Option<usize> {
    let scope = conntrack::Scope::new(tables);
    let now = datapath::now();
    let (mut known, mut seeded, mut failure) = (0_usize, 0, None);
    let read = conntrack::for_each(|connection| {
        known += 1;
        match maps.seed_flows(&scope.flows(&connection, now)) {
            Ok(count) => seeded += count,
            Err(error) => failure = Some(error),
        }
    });
    match (read, failure) {
        (Err(error), _) if error.kind() == io::ErrorKind::Unsupported => {
            tracing::warn!(
                "this kernel has no conntrack: connections that are already open must be opened again"
            );
            None
        }
        (Err(error), _) => {
            tracing::warn!(%error, seeded, "conntrack could not be read: open connections may be cut");
            Some(seeded)
        }
        (Ok(()), Some(error)) => {
            tracing::warn!(%error, seeded, "not all open connections could be taken over");
            Some(seeded)
        }
        (Ok(()), None) if known == 0 => {
            tracing::info!(
                "conntrack knows no connections here: if some are open, they must be opened again"
            );
            Some(0)
        }
        (Ok(()), None) => {
            tracing::info!(known, seeded, "took over open connections from conntrack");
            Some(seeded)
        }
    }
}
