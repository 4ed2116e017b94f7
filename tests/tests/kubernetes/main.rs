//! Agents that follow a real API server, on real packets.

mod follow;
mod outage;
mod pool;
mod resources;
mod selectors;
mod support;
mod trial;
