//! Agents that follow a real API server, on real packets.

mod crowd;
mod events;
mod follow;
mod limits;
mod measure;
mod names;
mod namespaces;
mod networks;
mod node_name;
mod outage;
mod pool;
mod resources;
mod rights;
mod selectors;
mod status;
mod support;
mod table;
mod trial;
