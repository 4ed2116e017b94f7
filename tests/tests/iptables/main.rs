//! The iptables driver on a real kernel: both back ends, each test in network namespaces of its own. Needs root.

mod lab;
mod repair;
mod saved;
mod support;
mod tables;
mod traffic;
