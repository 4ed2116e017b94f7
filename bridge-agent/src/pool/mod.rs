//! The port pool: source ports from an allowed range, never the same 4-tuple twice.
//!
//! [`settings`] and [`layout`] say which ports there are (pure), [`kernel`] loads and pins the hooks, [`tables`] are
//! the words and tables that the hooks and the agent change together, [`attach`] finds control groups.

pub mod attach;
pub mod backend;
pub mod checks;
pub mod client;
mod clients;
pub mod conntrack;
mod error;
pub mod fifo;
pub mod held;
pub mod hooked;
pub mod hooks;
pub mod kernel;
pub mod layout;
pub mod masquerade;
pub mod owner;
pub mod pins;
pub mod pods;
pub mod process;
pub mod programs;
pub(crate) mod record;
pub mod remedy;
pub mod run;
pub mod service;
pub mod settings;
pub mod summary;
pub mod sweep;
pub mod tables;
pub mod walk;
pub mod words;

#[cfg(test)]
mod model_tests;

pub use kernel::KernelPool;
pub use layout::Layout;
pub use settings::Settings;
pub use summary::Summary;
