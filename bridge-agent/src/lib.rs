//! The user side of bridge.
//!
//! One direction of dependency: configuration and cluster become a desired state ([`model`]), a plan is made from
//! it by pure functions, and a thin layer applies the plan to the kernel and reads back what became of it.

pub mod model;
pub mod pool;
