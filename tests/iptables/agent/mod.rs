//! The engine as `bridge-agent run` has it: in the lab, on both back ends, with eBPF beside it and without.

mod damage;
mod divergence;
mod engines;
mod faults;
mod node;
#[path = "../../../bridge-agent/tests/openapi/mod.rs"]
mod openapi;
mod refusals;
mod traces;
mod trial;
