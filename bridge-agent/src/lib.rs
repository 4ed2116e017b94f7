//! The user side of bridge.
//!
//! One direction of dependency: configuration and cluster become a desired state ([`model`]), a plan is made from
//! it by pure functions, and a thin layer applies the plan to the kernel and reads back the result.

pub mod agent;
pub mod api;
pub mod cli;
pub mod config;
pub mod conntrack;
pub mod datapath;
pub mod explain;
mod fault;
pub mod firewall;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod interfaces;
pub mod iptables;
pub mod kernel;
pub mod kubectl;
pub mod kubernetes;
pub mod log;
pub mod model;
pub mod nftables;
pub mod nodeport_range;
pub mod policy;
pub mod pool;
pub mod routes;
pub mod state;
pub mod ui;
