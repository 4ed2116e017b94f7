//! Changes at the interfaces that programs are attached to.

use crate::model::Hook;

/// A change at one interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Name of the interface.
    pub interface: String,
    /// The program.
    pub hook: Hook,
    /// The change.
    pub action: Action,
}

/// See [`Change::action`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Newly attached.
    Attached,
    /// The program of an earlier agent was replaced.
    Replaced,
    /// Detached, or its interface is gone.
    Removed,
    /// The interface has a new name.
    Renamed,
}
