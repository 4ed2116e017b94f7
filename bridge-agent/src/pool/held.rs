//! Counts of held ports.

/// How many ports are not free for everybody, over all destinations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// In use.
    pub held: u64,
    /// Only for the network namespace that used them last.
    pub warm: u64,
    /// In use towards the one destination that has most of them.
    pub busiest: u64,
}
