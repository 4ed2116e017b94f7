//! The interfaces of the node, as the rules of a packet filter name them.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
};

use crate::{
    conntrack::Forgetting,
    firewall::Surveyor,
    interfaces::{Bindings, Observer, Selection},
};

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
    let surveyor: Surveyor = Box::new(move || {
        let snapshot = observer.snapshot(&by_route)?;
        let before = std::mem::replace(&mut hosted, by_route.hosted(&snapshot, &mut bindings).pods);
        let gone: BTreeSet<IpAddr> = before
            .iter()
            .filter(|(address, interface)| hosted.get(address) != Some(interface))
            .map(|(address, _)| *address)
            .collect();
        forgetting.add(gone);
        forgetting.try_again();
        told.set(selection.misled(&snapshot));
        Ok(selection.topology(&snapshot))
    });
    Ok((surveyor, misled))
}
