//! Routes from LAN hosts to pod networks, in network namespaces of their own. Needs root.

mod agent;
mod commands;
mod discovery;
mod exports;
mod faults;
mod health;
mod kernel;
mod resync;
