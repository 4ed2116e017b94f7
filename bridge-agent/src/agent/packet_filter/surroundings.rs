//! The interfaces of the node, as the rules of a packet filter name them.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
};

use crate::{
    conntrack::Forgetting,
    firewall::Surveyor,
    interfaces::{Bindings, Observer, Selection},
};

/// Returns a reader of the interfaces in the network namespace of this thread.
pub(super) fn surveyor(selection: &Selection) -> io::Result<Surveyor> {
    let mut observer = Observer::open()?;
    let selection = selection.clone();
    // Routes to pods are wanted, also where the interfaces are named.
    let by_route = Selection { internal: Vec::new(), ..selection.clone() };
    let (mut hosted, mut bindings) = (BTreeMap::new(), Bindings::default());
    let mut forgetting = Forgetting::default();
    Ok(Box::new(move || {
        let snapshot = observer.snapshot(&by_route)?;
        let before = std::mem::replace(&mut hosted, by_route.hosted(&snapshot, &mut bindings).pods);
        let gone: BTreeSet<IpAddr> = before
            .iter()
            .filter(|(address, interface)| hosted.get(address) != Some(interface))
            .map(|(address, _)| *address)
            .collect();
        forgetting.add(gone);
        forgetting.try_again();
        Ok(selection.topology(&snapshot))
    }))
}
