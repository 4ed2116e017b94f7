//! The agent in the lab, end to end: real sockets, and the packets that the kernel let through or did not.

mod audit;
mod fast_path;
mod gateway;
mod icmp;
mod masquerade;
mod node_ports;
mod path_mtu;
mod reject;
mod reload;
mod scope;
mod shield;
mod support;
