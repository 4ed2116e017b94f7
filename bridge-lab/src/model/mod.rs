//! A second opinion: the verdict written down once more, from the documentation, in plain Rust, and random packets
//! by which it is compared with the programs. docs/reliability.md has the results.
//!
//! The forwarding of established flows (the fast path) is not in the model; the
//! comparison of engines ([`crate::parity`]) has it.

mod classify;
mod compare;
mod explain;
mod flow;
mod frames;
mod header;
mod traffic;
mod verdict;

pub use self::compare::{Difference, PACKETS_PER_CASE, Report, compare};
pub use self::flow::Key;
pub use self::traffic::Step;
pub use self::verdict::{Expected, Model, Regime};
