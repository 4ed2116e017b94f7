//! The lab: LAN hosts, nodes and pods as network namespaces on one machine, joined by veth pairs, with real
//! sockets and hand-made packets to send through them. `cargo xtask run`, the privileged tests and the
//! benchmarks all stand on it.
//!
//! Needs root, iproute2, and for masquerade, NodePorts and connection tracking nftables.

pub mod agent;
pub mod attack;
pub mod bench;
pub mod cluster;
pub mod container;
pub mod cpu;
pub mod gap;
pub mod kubernetes;
pub mod lab;
pub mod mediation;
pub mod model;
pub mod netns;
pub mod packet;
pub mod parity;
pub mod pool;
pub mod prog;
pub mod routes;
pub mod scenes;
pub mod soak;
pub mod traffic;
pub mod wait;
pub mod wire;
