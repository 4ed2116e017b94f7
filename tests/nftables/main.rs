//! The nftables engine as `bridge-agent run` has it, alone and beside eBPF, with the rules of others around it. Needs root.

mod agent;
mod alone;
mod counters;
mod handover;
mod large;
mod node;
mod others;
mod pods;
