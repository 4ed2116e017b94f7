//! iptables and ip6tables, on either of their back ends.

pub mod observe;
pub mod plan;
pub mod render;
pub mod ruleset;
