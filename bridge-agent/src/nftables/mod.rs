//! nftables: the same rules as sets and verdict maps of one table, for IPv4 and IPv6.

mod budget;
mod carry;
mod driver;
mod error;
mod layers;
mod programs;
mod read;
pub mod render;
pub mod ruleset;
pub mod save;
mod script;
pub mod watch;

pub use budget::{MAX_ELEMENTS, check};
pub use driver::{Config, Nftables, Observed, Plan};
pub use error::Error;
pub use programs::Programs;
pub use render::Options;
pub use ruleset::TABLE;
pub use script::full as script;
