//! The iptables engine on a real kernel: both back ends, each test in network namespaces of its own. Needs root.
//!
//! The driver by itself, and in `agent` the whole of it as `bridge-agent run` has it.

mod agent;
mod lab;
mod repair;
mod saved;
mod support;
mod tables;
mod traffic;
