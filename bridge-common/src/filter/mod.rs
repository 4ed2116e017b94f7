//! The packet filter: keys, values and events of its maps.

pub mod address;
pub mod control;
pub mod counters;
pub mod denial;
pub mod event;
pub mod fast_path;
pub mod flow;
pub mod flow_cache;
pub mod flow_filter;
pub mod interface;
pub mod policy;
pub mod shares;
pub mod shield;
