//! iptables and ip6tables, on either of their back ends.

mod apply;
pub mod backend;
mod budget;
pub mod divergence;
mod driver;
mod edit;
mod error;
mod kernel;
pub mod observe;
pub mod others;
pub mod plan;
mod programs;
mod question;
pub mod render;
pub mod ruleset;
pub mod save;
pub mod walk;
pub mod watch;

pub use budget::{MAX_LINES, check};
pub use driver::{Config, Iptables, Observed, Plan};
pub use error::Error;
pub use kernel::legacy_in_use;
pub use programs::{Backend, Programs};
