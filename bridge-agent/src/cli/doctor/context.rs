//! Facts that several checks need.

use crate::{
    cli::Global,
    config::{Config, Role},
    interfaces::{Chosen, Observer, Selection, Snapshot},
};

/// Facts that several checks need.
pub(super) struct Context<'a> {
    pub(super) global: &'a Global,
    /// The configuration, where it is valid.
    pub(super) config: Option<Config>,
    /// Links, addresses and routes.
    pub(super) snapshot: Snapshot,
    /// Interfaces towards LAN and pods.
    pub(super) chosen: Chosen,
}

impl<'a> Context<'a> {
    pub(super) fn new(global: &'a Global, config: Option<Config>) -> Self {
        let selection = config.as_ref().map(Selection::of).unwrap_or_default();
        // Without names, so that routes to the LAN are read as well.
        let by_route = Selection { external: Vec::new(), internal: Vec::new(), ..selection.clone() };
        let read = Observer::open().and_then(|mut observer| observer.snapshot(&by_route));
        let snapshot = read.unwrap_or_default();
        let chosen = selection.choose(&snapshot);
        Self { global, config, snapshot, chosen }
    }

    /// The configuration of a node; `None` on a LAN host.
    pub(super) fn node(&self) -> Option<&Config> {
        self.config.as_ref().filter(|config| config.role == Role::Node)
    }
}

/// Reads a file of the kernel, without the newline at its end.
pub(super) fn read(path: &str) -> Option<String> {
    Some(std::fs::read_to_string(path).ok()?.trim().to_owned())
}
