//! The packet path, packet by packet.

mod audit;
mod cost;
mod crowding;
mod denials;
mod flow_cache;
mod flow_filter;
mod fragments;
mod icmp;
mod node_ports;
mod ports;
mod reject;
mod scope;
mod sctp;
mod shield;
mod sources;
mod tcp;
mod transport;
mod truncation;
mod world;
