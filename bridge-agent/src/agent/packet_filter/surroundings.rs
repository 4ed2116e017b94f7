//! The interfaces of the node, as the rules of a packet filter name them.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use crate::{
    conntrack::Forgetting,
    firewall::Surveyor,
    interfaces::{Bindings, Observer, Selection},
    model::Topology,
};

/// An interface without address and route that is older than this is not that of a pod that is being made.
const NEW: Duration = Duration::from_millis(300);

/// Why the pods are behind other interfaces than the rules name, as of the last survey.
#[derive(Clone, Debug, Default)]
pub(super) struct Misled(Arc<Mutex<Option<String>>>);

impl Misled {
    /// Returns the reason, if there is one.
    pub(super) fn why(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, why: Option<String>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = why;
    }
}

/// Returns a reader of the interfaces in the network namespace of this thread, and its finding whether routes mislead it.
pub(super) fn surveyor(selection: &Selection) -> io::Result<(Surveyor, Misled)> {
    let misled = Misled::default();
    let told = misled.clone();
    let mut observer = Observer::open()?;
    let selection = selection.clone();
    // Routes to pods are wanted, also where the interfaces are named.
    let by_route = Selection { internal: Vec::new(), ..selection.clone() };
    let (mut hosted, mut bindings) = (BTreeMap::new(), Bindings::default());
    let mut forgetting = Forgetting::default();
    let (mut prefixes, mut seen) = (BTreeSet::new(), BTreeMap::new());
    let surveyor: Surveyor = Box::new(move || {
        let mut snapshot = observer.snapshot(&by_route)?;
        seen.retain(|index, _| snapshot.links.contains_key(index));
        let now = Instant::now();
        let old = snapshot.links.keys().filter(|index| now - *seen.entry(**index).or_insert(now) >= NEW);
        snapshot.in_use.extend(old);
        let before = std::mem::replace(&mut hosted, by_route.hosted(&snapshot, &mut bindings).pods);
        let gone: BTreeSet<IpAddr> = before
            .iter()
            .filter(|(address, interface)| hosted.get(address) != Some(interface))
            .map(|(address, _)| *address)
            .collect();
        forgetting.add(gone);
        forgetting.try_again();
        told.set(selection.misled(&snapshot));
        let mut topology = selection.topology(&snapshot);
        remember(&mut prefixes, &mut topology);
        Ok(topology)
    });
    Ok((surveyor, misled))
}

/// Adds prefixes of pods' interfaces that were seen before: while there is no pod, the next one sends its first packets before the
/// interfaces are read.
fn remember(prefixes: &mut BTreeSet<String>, topology: &mut Topology) {
    let named = |prefix: &str, name: &String| name.starts_with(prefix.trim_end_matches('+'));
    let remote: Vec<&String> = topology.remote.iter().map(|remote| &remote.interface).collect();
    let others = || topology.external.iter().chain(&topology.tunnel_interfaces).chain(remote.iter().copied());
    prefixes.extend(topology.internal.iter().filter(|name| name.ends_with('+')).cloned());
    prefixes.retain(|prefix| !others().any(|name| named(prefix, name)));
    topology.internal.extend(prefixes.iter().cloned());
    topology.internal.sort_unstable();
    topology.internal.dedup();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_of_pods_stay_until_another_interface_has_them() {
        let topology = |external: &[&str], internal: &[&str]| Topology {
            external: external.iter().map(ToString::to_string).collect(),
            internal: internal.iter().map(ToString::to_string).collect(),
            ..Topology::default()
        };
        let (mut prefixes, mut seen) = (BTreeSet::new(), topology(&["eth0"], &["cali+", "cni0"]));
        remember(&mut prefixes, &mut seen);
        assert_eq!(seen.internal, ["cali+", "cni0"]);
        let mut none = topology(&["eth0"], &[]);
        remember(&mut prefixes, &mut none);
        assert_eq!(none.internal, ["cali+"]);
        let mut other = topology(&["eth0", "calico-lan"], &[]);
        remember(&mut prefixes, &mut other);
        assert!(other.internal.is_empty(), "{other:?}");
    }
}
